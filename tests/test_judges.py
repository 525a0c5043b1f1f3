# SPDX-License-Identifier: Apache-2.0
"""Rewards that a language model gives over HTTP: read, asked again, kept, and failed without harm to the rest."""

import json
import threading

import pytest
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset
from judge_server import JudgeServer

from trl_parm.cli.common import load_rewards
from trl_parm.cli.main import main
from trl_parm.endpoint import Endpoint, Failure
from trl_parm.evaluation import Run, rescore, summarize, sweep
from trl_parm.evaluation.fronts import judged
from trl_parm.judges import Judge, PairJudge, judge_of
from trl_parm.records import read_configuration, read_rows
from trl_parm.relabel import agreement, relabel
from trl_parm.reward_models import RewardSource, reward_configuration
from trl_parm.rewards import brevity, score


PROMPTS = ["w1 w2", "w3", "w4 w5"]
TEMPLATE = "Rate: {prompt} | {response}"


def words_of(question: str) -> str:
    return f"Rating: {len(question.split('|')[-1].split())}"


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def judge(server, cache, template=TEMPLATE, **settings) -> Judge:
    own = {key: settings.pop(key) for key in ("pattern", "least", "most", "negate") if key in settings}
    return Judge(Endpoint(server.url, "stub", cache=cache, pause=0.0, **settings), template, **own)


@pytest.mark.parametrize(
    ("answer", "settings", "expected"),
    [
        ("7", {}, 7),
        ("Rating: -2.5.", {}, -2.5),
        ("It is rated −3", {}, -3),
        ("[[8]] of gpt4 v1.2.3", {}, 8),
        ("7/10", {"pattern": r"(\d+)/10"}, 7),
        ("First 3/10, no: 4/10", {"pattern": r"(\d+)/10"}, 4),
        ("7", {"negate": True}, -7),
        ("7/10", {}, "2 numbers in the answer '7/10'"),
        ("between 3 and 4", {}, "2 numbers"),
        ("3e-1", {}, "no number in '3e-1'"),
        ("I can't say.", {}, 'no number in "I can\'t say."'),
        ("", {}, "no number"),
        ("11", {"most": 10}, "11 is out of range"),
        ("0", {"least": 1}, "0 is out of range"),
        ("good", {"pattern": "(good)"}, "'good' is no number"),
        ("Rating: nan", {"pattern": r"Rating: (\S+)", "least": 1, "most": 10}, "nan is no finite number"),
    ],
)
def test_a_number_is_read_or_the_reason_is_told(cache, answer, settings, expected):
    with JudgeServer(lambda question: answer) as server:
        (found,) = judge(server, cache, **settings)(["w1"], ["w2"])
    if isinstance(expected, str):
        assert expected in found.reason
    else:
        assert found == expected


def test_what_is_asked(cache, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    conversation = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with JudgeServer(words_of) as server:
        reward = judge(server, cache, api_key_env="MY_KEY", system="Be fair.", request={"temperature": 1})
        assert reward(["a {response}", conversation], ["w2 w3", "{prompt}"]) == [2, 1]
    assert sorted(server.questions) == ["Rate: Human: w1\n\nAssistant: w2 | {prompt}", "Rate: a {response} | w2 w3"]
    path, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["messages"][0]["content"]) == ("stub", 1, "Be fair.")
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(reward_configuration(reward))


def test_answers_are_kept_by_what_was_asked(cache):
    with JudgeServer(words_of) as server:
        first = judge(server, cache)
        assert first(["w1", "w1", "w3"], ["w2", "w2", "w4 w5"]) == [1, 1, 2]
        assert len(server.requests) == 2  # equal questions are asked once
        again = judge(server, cache)
        assert again(["w3", "w1"], ["w4 w5", "w2"]) == [2, 1]
        assert len(server.requests) == 2
        assert dict(again.endpoint.counted) == {"cached": 2}
        assert dict(first.endpoint.counted) == {"requests": 2, "prompt_tokens": 20, "completion_tokens": 4}
        assert "2 requests, 0 of them failed" in first.endpoint.cost()
        judge(server, cache, request={"temperature": 1})(["w1"], ["w2"])
        judge(server, "")(["w1"], ["w2"])
        judge(server, "")(["w1"], ["w2"])
        assert len(server.requests) == 5


def test_as_many_at_once_as_it_is_told(cache):
    meet = threading.Barrier(3, timeout=20)  # passes only if three are there at once

    def answer(question):
        meet.wait()
        return "1"

    with JudgeServer(answer) as server:
        assert judge(server, cache, concurrency=3)(["w"] * 6, list("abcdef")) == [1] * 6
        assert server.most == 3


@pytest.mark.parametrize(
    ("failure", "asked", "reason"),
    [
        ((500, {"error": "broken"}), 3, 'HTTP 500 Internal Server Error: {"error": "broken"}'),
        ((429, "slow", {"Retry-After": "0"}), 3, "HTTP 429"),
        ((401, {"error": "no key"}), 1, "HTTP 401"),
        ((302, "", {"Location": "http://127.0.0.1:1/"}), 1, "HTTP 302"),
        ((200, b"no json"), 1, "no chat completion"),
        ((200, {"choices": []}), 1, "no chat completion"),
        ((200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}), 1, "it ended by 'length'"),
        ((200, {"choices": "ab"}), 1, "no chat completion"),
        (5.0, 3, "no answer (timed out)"),
    ],
)
def test_what_fails_fails_alone(cache, failure, asked, reason):
    with JudgeServer(lambda question: failure if "bad" in question else "4") as server:
        reward = judge(server, cache, retries=2, timeout=0.2 if isinstance(failure, float) else 10)
        found = reward(["w", "w", "w"], ["a", "bad", "c"])
        assert (found[0], found[2]) == (4, 4)
        assert isinstance(found[1], Failure)
        assert reason in found[1].reason
        assert sum("bad" in question for question in server.questions) == asked
        assert reward.endpoint.counted["failed"] == 1
        server.answer = lambda question: "5"  # nothing of a failure is kept
        assert reward(["w", "w"], ["bad", "a"]) == [5, 4]


@pytest.mark.parametrize("text", ["The answer loses 1 point for", "4"])
def test_an_answer_that_was_cut_off_is_no_judgment(cache, text):
    """Whatever number stands in what there is of it; nothing is kept, and the endpoint counts as one that answers."""
    cut = (200, {"choices": [{"message": {"content": text}, "finish_reason": "length"}], "usage": {}})
    with JudgeServer(lambda question: cut) as server:
        reward = judge(server, cache)
        reward.endpoint.check()
        (found,) = reward(["w"], ["a"])
        assert isinstance(found, Failure)
        assert "cut off, for which `request` can have more `max_tokens`" in found.reason
        assert "1 could not be read (first: an answer that was cut off" in reward.endpoint.cost()
        server.answer = lambda question: "5"
        assert reward(["w"], ["a"]) == [5]


@pytest.mark.parametrize("usage", ["x", [1], {"prompt_tokens": "many"}, None])
def test_usage_that_is_none_is_not_counted(cache, usage):
    with JudgeServer(lambda question: (200, {"choices": [{"message": {"content": "4"}}], "usage": usage})) as server:
        reward = judge(server, cache)
        assert reward(["w"], ["a"]) == [4]
        assert reward.endpoint.counted["prompt_tokens"] == 0


def test_a_key_may_end_in_a_line_but_not_have_one(cache, monkeypatch):
    with JudgeServer(lambda question: "4") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
        assert judge(server, cache)(["w"], ["a"]) == [4]
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
        (found,) = judge(server, "")(["w"], ["b"])
        assert "the key in OPENAI_API_KEY" in found.reason
        assert "secret" not in found.reason
        assert len(server.requests) == 1


def test_a_busy_endpoint_is_asked_again(cache):
    left = [2]

    def answer(question):
        left[0] -= 1
        return (503, "busy") if left[0] >= 0 else "6"

    with JudgeServer(answer) as server:
        assert judge(server, cache)(["w"], ["a"]) == [6]
        assert len(server.requests) == 3


def test_an_answer_that_cant_be_read_is_told_and_asked_again(cache):
    with JudgeServer(lambda question: "I can't say" if "bad" in question else "4") as server:
        reward = judge(server, cache)
        assert [isinstance(one, Failure) for one in reward(["w"] * 3, ["a", "bad", "c"])] == [False, True, False]
        assert "3 requests, 0 of them failed, 1 could not be read (first: no number in" in reward.endpoint.cost()
        server.answer = lambda question: "5"
        again = judge(server, cache)
        assert again(["w"] * 3, ["a", "bad", "c"]) == [4, 5, 4]
        assert "1 requests, 0 of them failed, 2 answers from the cache" in again.endpoint.cost()
        other = judge(server, cache, pattern=r"Rating: (\d+)")  # which finds nothing in what is kept
        server.answer = lambda question: "Rating: 6"
        assert other(["w"], ["a"]) == [6]


def failing_on(word):
    return lambda question: (500, "out of order") if word in question else words_of(question)


def run(path, reward, runs=("base",), **options):
    rewards = {"helpful": reward, "short": brevity}
    return sweep(
        tiny_llama(), tiny_tokenizer(), PROMPTS, [Run(name) for name in runs], rewards, path=path, batch_size=2,
        max_new_tokens=4, **options,
    )  # fmt: skip


def test_a_failed_judge_leaves_a_row_that_says_so(tmp_path, cache):
    path = tmp_path / "results.jsonl"
    with JudgeServer(failing_on("w3 |")) as server:
        table = run(path, judge(server, cache, retries=0), runs=("one", "two"))
        rows = read_rows(path)
        assert [row["helpful"] is None for row in rows] == [False, True, False] * 2
        assert all(row["short"] == -len(row["response"].split()) for row in rows)
        assert ["unjudged" in row for row in rows] == [False, True, False] * 2
        assert "HTTP 500" in rows[1]["unjudged"]["helpful"]
        assert table["helpful"][1] is None
        assert "out of order" in table["unjudged"][1]
        asked = len(server.requests)
        assert run(path, judge(server, cache, retries=0), runs=("one", "two"))["helpful"][1] is None
        assert len(server.requests) == asked + 1  # asked again, both methods gave one answer
        assert read_rows(path) == rows
        left, lost = judged(table, ["helpful", "short"])
        assert ([row["prompt"] for row in left], lost) == (["w1 w2", "w4 w5"] * 2, 1)
        assert len(judged(table, ["short"])[0]) == 6
        assert summarize(left, ["helpful"])[0]["helpful"] == (rows[0]["helpful"] + rows[2]["helpful"]) / 2
        with pytest.raises(ValueError, match="its 'helpful' is None"):
            summarize(table, ["helpful"])
        server.answer = words_of
        asked = len(server.requests)
        again = rescore(path, {"helpful": judge(server, cache)}, tmp_path / "again.jsonl")
        assert None not in again["helpful"]
        assert "unjudged" not in again.column_names
        assert len(server.requests) == asked + 1  # all others are in the cache, and both methods gave one answer
        assert run(path, judge(server, cache), runs=("one", "two"))["helpful"] == again["helpful"]
        judged_now = read_rows(path)
        assert [row["response"] for row in judged_now] == [row["response"] for row in rows]
        assert [row["seconds"] for row in judged_now] == [row["seconds"] for row in rows]  # nothing is decoded again
        assert not any("unjudged" in row for row in judged_now)
        assert len(server.requests) == asked + 1
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    failed = tmp_path / "failed.jsonl"
    with JudgeServer(failing_on("w1 w2 |")) as server:
        rescore(path, {"short": judge(server, cache, retries=0)}, failed)
        assert [sorted(row.get("unjudged", {})) for row in read_rows(failed)[:3]] == [["short"], ["helpful"], []]
        server.answer = words_of
        rescore(path, {"short": judge(server, cache)}, failed)
    assert [sorted(row.get("unjudged", {})) for row in read_rows(failed)[:3]] == [[], ["helpful"], []]


def test_a_row_without_a_number_needs_a_reason(tmp_path, cache):
    path = tmp_path / "results.jsonl"
    with JudgeServer(words_of) as server:
        run(path, judge(server, cache))
        text = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps({**json.loads(text[0]), "helpful": None}), *text[1:]]) + "\n")
        with pytest.raises(ValueError, match="its 'helpful' is None"):
            run(path, judge(server, cache))


def test_another_judge_is_another_configuration(tmp_path, cache):
    path = tmp_path / "results.jsonl"
    with JudgeServer(words_of) as server:
        run(path, judge(server, cache))
        assert read_configuration(path)["rewards"]["helpful"]["template"] == TEMPLATE
        with pytest.raises(ValueError, match="rewards helpful template was"):
            run(path, judge(server, cache, template="Rate better: | {response}"))
        run(path, judge(server, cache, concurrency=1, retries=1, timeout=9.0))  # these change no number


def test_pairs_on_which_a_judge_failed_have_no_label(tmp_path, cache):
    pairs = [{"prompt": f"w{i}", "response_0": "w1 w2", "response_1": "bad" if i == 2 else "w4"} for i in range(4)]
    with JudgeServer(failing_on("bad")) as server:
        for _ in range(2):  # and once more from the file
            rewards = {"helpful": judge(server, cache, retries=0)}
            rows = relabel(Dataset.from_list(pairs), rewards, tmp_path, test_size=0)["train"]
    assert rows["helpful"] == [0, 0, -1, 0]
    (told,) = agreement(rows, ["helpful"])
    assert (told["ties"], told["unjudged"]) == (0, 1)
    assert (rows["helpful_score_0"][2], rows["helpful_score_1"][2]) == (2, None)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["row"] for row in scores if "unjudged" in row] == [2]


@pytest.mark.parametrize("restart", [False, True])
def test_relabelling_asks_again_after_an_outage(tmp_path, cache, restart):
    pairs = [{"prompt": f"w{i}", "response_0": "w1 w2", "response_1": f"w{i}"} for i in range(4)]
    with JudgeServer(failing_on("w")) as server:
        rewards = {"helpful": judge(server, cache, retries=0), "short": brevity}
        rows = relabel(Dataset.from_list(pairs), rewards, tmp_path / "out", test_size=0)["train"]
        assert rows["helpful"] == [-1] * 4
        asked, server.answer = len(server.requests), words_of
        again = relabel(Dataset.from_list(pairs), rewards, tmp_path / "out", test_size=0, restart=restart)["train"]
        assert len(server.requests) == asked + 8
    with JudgeServer(words_of) as server:
        rewards = {"helpful": judge(server, cache), "short": brevity}
        expected = relabel(Dataset.from_list(pairs), rewards, tmp_path / "expected", test_size=0)["train"]
    assert again.to_list() == expected.to_list()
    assert again["helpful"] == [0] * 4


def test_from_yaml_to_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    with JudgeServer(failing_on("w3 |")) as server:
        helpful = {"source": "openai", "base_url": server.url, "model": "stub", "template": TEMPLATE, "retries": 0}
        rewards = json.dumps({"helpful": {**helpful, "cache": "cache"}, "short": "trl_parm.rewards:brevity"})
        words = ["--rewards", rewards, "--output_dir", "results"]
        assert main(
            ["evaluate", "--model_name_or_path", "base", "--prompts", *PROMPTS, "--methods", "base", "--grid_steps",
             "1", "--max_new_tokens", "4", *words]
        ) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "helpful was judged by stub at" in told
    assert "1 prompts have an answer on which a judge failed" in told
    assert main(["plot", "--results", "results/results.jsonl", "--output_dir", "figures"]) == 0
    assert "1 prompts have an answer on which a judge failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": None}, "`template` is None, but it must be a text"),
        ({"model": ""}, "needs `source: openai`, base_url, model, template"),
        ({"temperature": 1}, "needs `source: openai`"),
        ({"template": "Rate {prompt}"}, "has no {response}"),
        ({"base_url": "localhost:8000"}, "must be like http://localhost:8000/v1"),
        ({"base_url": "http://me:pass@localhost/v1"}, "has a user or password in it"),
        ({"pattern": "Rating"}, "needs a group"),
        ({"pattern": "(Rating"}, "is no regular expression"),
        ({"concurrency": 0}, "`concurrency` is 0, but it must be 1 or larger"),
        ({"timeout": "long"}, "The reward of 'helpful': `timeout` is 'long', but it must be a number"),
        ({}, "The model 'stub' at http://127.0.0.1:9/v1 does not answer: no answer"),
    ],
)
def test_bad_judges_are_told_before_anything_runs(change, message):
    given = {"source": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "stub", "template": TEMPLATE}
    with pytest.raises(ValueError, match=message):
        load_rewards({"helpful": {**given, "retries": 0, **change}})


def test_a_judge_does_not_steer(cache):
    with JudgeServer(lambda question: "none") as server, pytest.raises(ValueError, match="Here every response needs"):
        score("helpful", judge(server, cache), ["w"], ["w"])
    with pytest.raises(ValueError, match="A judge .* scores whole responses"):
        RewardSource.of({"source": "openai", "base_url": "http://localhost/v1", "model": "stub"})


def longer(question: str) -> str:
    """Prefers the longer answer, the first one where they are as long, and knows nothing of `none`."""
    a, b = (part.split("\n")[1] for part in question.split("[Answer ")[1:])
    if "none" in a + b:
        return "I don't know"
    return "[[B]] it is" if len(b) > len(a) else "[[C]]" if a == "tie" else "Not [[B]] but [[A]]"


def test_two_responses_are_judged_in_both_orders(cache):
    with JudgeServer(longer) as server:
        pairs = PairJudge(Endpoint(server.url, "stub", cache=cache))
        found = pairs(["w"] * 5, ["long", "a", "same", "tie", "none"], ["s", "long", "emas", "tie", "x"])
        assert found[:4] == [(1, 1), (0, 0), (1, 0), (0.5, 0.5)]
        assert all("no verdict" in one.reason for one in found[4])
        given = {"source": "openai", "base_url": server.url, "model": "stub"}
        assert judge_of(given, PairJudge).template == pairs.template
        with pytest.raises(ValueError, match="has no {response_b}"):
            judge_of({**given, "template": "{prompt} {response_a}"}, PairJudge)
