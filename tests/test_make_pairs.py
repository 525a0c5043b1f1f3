# SPDX-License-Identifier: Apache-2.0
"""`trl-parm make_pairs`: from prompts to pairs that `trl-parm train` takes."""

import json
import shlex
import shutil

import pytest
from conftest import tiny_tokenizer
from judge_server import JudgeServer
from test_cli import _no_progress_bars, folder, run  # noqa: F401 - the fixtures
from tokenizers import decoders

from trl_parm.cli.make_pairs import ANSWERS, as_conversation, choose_pairs, is_cut
from trl_parm.evaluation.answering import Answering
from trl_parm.records import read_rows


def answer(prompt, response, **rewards):
    return {"prompt": prompt, "response": response, **rewards}


ANSWERED = [
    answer("p", "short", a=1.0, b=5.0),
    answer("p", "middle", a=2.0, b=4.0),
    answer("p", "long", a=3.0, b=4.5),
    answer("p", "long", a=3.0, b=4.5),
    answer("p", "  ", a=9.0, b=9.0),
    answer("q", "one", a=1.0, b=1.0),
    answer("q", "two", a=1.1, b=1.0),
    answer("r", "alone", a=1.0, b=1.0),
]


def test_the_best_and_the_worst_by_each_objective_are_pairs():
    found = [(pair["prompt"], {pair["response_0"], pair["response_1"]}) for pair in choose_pairs(ANSWERED, ["a", "b"])]
    assert found == [("p", {"short", "long"}), ("p", {"short", "middle"}), ("q", {"one", "two"})]
    assert len(choose_pairs(ANSWERED, ["a", "a2"][:1])) == 2
    assert choose_pairs(ANSWERED[::-1], ["a"]) == choose_pairs(ANSWERED, ["a"])[::-1]
    assert [pair["prompt"] for pair in choose_pairs(ANSWERED, ["a"], tie_margin=0.5)] == ["p"]


def test_a_place_in_a_pair_tells_nothing():
    rows = [
        answer(f"p{i}", f"{kind} {i}", a=value) for i in range(200) for kind, value in (("good", 1.0), ("bad", 0.0))
    ]
    first = sum(pair["response_0"].startswith("good") for pair in choose_pairs(rows, ["a"]))
    assert 70 < first < 130


def test_a_pair_is_read_as_the_model_read_the_prompt():
    pair = as_conversation({"prompt": "p", "response_0": "x", "response_1": "y"})
    assert pair["prompt"] == [{"role": "user", "content": "p"}]
    assert pair["response_1"] == [{"role": "assistant", "content": "y"}]


@pytest.fixture
def words(folder, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "digits.py").write_text(
        "def ones(prompts, responses):\n    return [response.count('1') for response in responses]\n"
        "def twos(prompts, responses):\n    return [response.count('2') for response in responses]\n"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # spaces between words
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = json.dumps({"ones": "digits:ones", "twos": "digits:twos"})
    return (
        "make_pairs", "--model_name_or_path", tmp_path / "base", "--prompts_data", folder / "pairs.jsonl", "--rewards",
        rewards, "--output_dir", tmp_path / "made", "--max_new_tokens", 8, "--num_answers", 4, "--test_size", 0.2,
    )  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_go_straight_into_training(words, tmp_path, capsys):
    assert run(*words, "--keep_unfinished") == 0
    told = capsys.readouterr().out
    rows = [row for name in ("train", "test") for row in rows_of(tmp_path / f"made/{name}.jsonl")]
    answers = [row for number in range(4) for row in read_rows(tmp_path / f"made/{ANSWERS}/{number}.jsonl")]
    assert len(answers) == 4 * 8
    assert len({row["response"] for row in answers if row["prompt"] == "w1"}) > 1  # each has noise of its own
    for row in rows:
        first, second = (row[name][0]["content"] for name in ("response_0", "response_1"))
        assert {"role": "user", "content": row["prompt"][0]["content"]} == row["prompt"][0]
        differences = [second.count(digit) - first.count(digit) for digit in "12"]
        labels = [-1 if not d else int(d > 0) for d in differences]
        assert [row["ones"], row["twos"]] == labels
        assert {first, second} <= {a["response"] for a in answers if a["prompt"] == row["prompt"][0]["content"]}
    train = shlex.split(told.split("A reward model for them: ")[1])
    short = ("--max_steps", 1, "--target_modules", "q_proj", "--report_to", "none", "--use_cpu", True, "--bf16", False)
    assert run(*train[1:], *short) == 0
    assert "Objectives, by the columns with labels: ones, twos." in capsys.readouterr().out
    assert (tmp_path / "made/arm/adapter_config.json").is_file()


def test_it_goes_on_where_it_was_and_keeps_what_is_not_its_own(words, tmp_path, capsys):
    words = (*words, "--keep_unfinished")
    assert run(*words) == 0
    made = {path: path.read_bytes() for path in (tmp_path / "made").rglob("*.jsonl")}
    first = tmp_path / f"made/{ANSWERS}/0.jsonl"
    first.write_bytes(made[first][: len(made[first]) // 2])
    assert run(*words) == 0
    texts = [
        [row["response"] for row in map(json.loads, data.splitlines())] for data in (made[first], first.read_bytes())
    ]
    assert texts[0] == texts[1]
    assert (tmp_path / "made/train.jsonl").read_bytes() == made[tmp_path / "made/train.jsonl"]
    before = (tmp_path / "made/run.yaml").read_bytes()
    assert run(*words, "--temperature", 0.5) == 2  # other answers than those that are kept
    assert (tmp_path / "made/run.yaml").read_bytes() == before
    (tmp_path / "made/test.jsonl").write_text("mine")
    capsys.readouterr()
    assert run(*words, "--output_dir", tmp_path / "made") == 2
    assert "test.jsonl was not written by 'relabel'" in capsys.readouterr().err
    assert (tmp_path / "made/test.jsonl").read_text() == "mine"


def test_more_answers_or_another_margin_make_other_pairs(words, tmp_path, capsys):
    words = (*words, "--keep_unfinished", "--num_answers")
    assert run(*words, 2) == 0
    first = (tmp_path / f"made/{ANSWERS}/0.jsonl").read_bytes()
    assert run(*words, 3) == 0
    assert run(*words, 3, "--tie_margin", 1) == 0
    assert (tmp_path / f"made/{ANSWERS}/0.jsonl").read_bytes() == first
    made = {path: path.read_bytes() for path in (tmp_path / "made").glob("*.*")}
    capsys.readouterr()
    assert run(*words, 3, "--temperature", 0.5) == 2
    assert "with `restart`" in capsys.readouterr().err
    assert run(*words, 3, "--tie_margin", 99) == 2
    assert {path: path.read_bytes() for path in made} == made  # nothing of a command that is refused, run.yaml neither
    assert run(*words, 3, "--temperature", 0.5, "--restart") == 0
    assert (tmp_path / f"made/{ANSWERS}/0.jsonl").read_bytes() != first


def test_a_template_is_what_training_reads(words, tmp_path):
    assert run(*words, "--keep_unfinished", "--template", "user {prompt} assistant", "--ranked") == 0
    row = rows_of(tmp_path / "made/train.jsonl")[0]
    assert row["prompt"] == f"user {row['raw_prompt']} assistant"
    assert isinstance(row["response_0"], str)
    assert {path.name for path in (tmp_path / "made/ranked").glob("*.jsonl")} == {"ones.jsonl", "twos.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--max_new_tokens", 1), "There are no pairs: no prompt has two answers that differ in a reward, and 3"),
        (("--num_answers", 1), "`num_answers` is 1, but a pair needs 2 or more"),
        (("--do_sample", "false"), "`do_sample` is false, but greedy answers to a prompt are all the same"),
        (("--rewards", '{"prompt": "digits:ones"}'), "'prompt'"),
        (("--test_size", "-1"), "`test_size` is -1.0, but it must be 0 or larger"),
    ],
)
def test_bad_input_is_one_line(words, tmp_path, capsys, change, message):
    assert run(*words, *change) == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1]
    assert not (tmp_path / "made/train.jsonl").exists()


def test_a_judge_is_asked_again_without_decoding(words, tmp_path, capsys, monkeypatch):
    with JudgeServer(lambda question: (503, "out of order")) as server:
        judge = {"source": "openai", "base_url": server.url, "model": "stub", "template": "Rate: {response}"}
        rewards = json.dumps(
            {"ones": {**judge, "retries": 0, "cache": str(tmp_path / "cache")}, "twos": "digits:twos"}
        )
        words = (*words, "--keep_unfinished", "--rewards", rewards)
        assert run(*words) == 2
        assert "A judge failed on 32 of 32 answers: the same command asks again." in capsys.readouterr().err
        paths = [tmp_path / f"made/{ANSWERS}/{number}.jsonl" for number in range(4)]
        before = [row for path in paths for row in read_rows(path)]
        server.answer = lambda question: str(len(question))
        monkeypatch.setattr(Answering, "rows", None)  # what decodes
        assert run(*words) == 0
    for row in before:
        row["ones"] = len(f"Rate: {row['response']}")
        del row["unjudged"]
    assert [row for path in paths for row in read_rows(path)] == before
    assert "pairs of answers to 8 prompts" in capsys.readouterr().out


def test_prompts_may_have_messages_of_several_shapes(words, tmp_path):
    (tmp_path / "base/chat_template.jinja").write_text(
        "{% for m in messages %}user {{ m.content if m.content is string else m.content[0].text }} <eos> {% endfor %}"
    )
    prompts = [[{"role": "user", "content": content}] for content in ("w1", [{"type": "text", "text": "w2"}])]
    given = tmp_path / "prompts.jsonl"
    given.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert run(*words, "--keep_unfinished", "--prompts_data", given, "--test_size", 0) == 0
    assert {json.dumps(row["prompt"]) for row in rows_of(tmp_path / "made/train.jsonl")} == set(
        map(json.dumps, prompts)
    )


@pytest.mark.parametrize(
    ("row", "cut"),
    [
        ({"tokens": 8, "capped": False}, False),
        ({"tokens": 8, "capped": True}, True),
        ({"tokens": 8, "capped": None}, True),
        ({"tokens": 8}, True),
        ({"tokens": 7}, False),
    ],
)
def test_an_answer_that_ends_with_its_last_token_is_not_cut_off(row, cut):
    assert is_cut(row, 8) is cut
