# SPDX-License-Identifier: Apache-2.0
"""Two evaluations prompt by prompt, and a judge that sees both responses."""

import csv
import json

import numpy as np
import pytest
from judge_server import JudgeServer

from trl_parm.cli.main import main
from trl_parm.endpoint import Endpoint
from trl_parm.evaluation import bootstrap, compare, judge_pairs, pair_up
from trl_parm.judges import PairJudge


OBJECTIVES = ["helpful", "harmless"]
GRID = ([1.0, 0.0], [0.25, 0.75])
COUNT = 9


def rows_of(method, seed, grid=GRID, prompts=range(COUNT), shift=0.0):
    chance = np.random.default_rng(seed)
    return [
        {
            "method": method, "preference": α, "label": "-" if α is None else f"helpful {α[0]}", "prompt": f"w{i}",
            "response": f"{'long ' * int(chance.integers(1, 4))}{method}",
            "helpful": float(chance.normal()) + shift, "harmless": float(chance.integers(3)), "tokens": 3,
            "seconds": 1.0, "seed": i, "extra_parameters": 0, "extra_bytes": 0,
        }
        for α in grid for i in prompts
    ]  # fmt: skip


def save(path, rows, objectives=OBJECTIVES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / f"{path.stem}.config.json").write_text(json.dumps({"objectives": objectives}))
    return str(path)


def test_differences_are_paired_by_prompt():
    """Against means and wins worked out row by row; the other table is in another order and lacks a prompt."""
    one, other = rows_of("PARM", 0), rows_of("PARM", 1, prompts=[8, 3, 4, 0, 1, 2, 6, 7])[::-1]
    found = compare(pair_up(one, other), OBJECTIVES)
    assert [(row["preference"], row["reward"]) for row in found] == [
        (f"helpful {α[0]}", name) for α in GRID for name in OBJECTIVES
    ]
    for row, (α, name) in zip(found, [(α, name) for α in GRID for name in OBJECTIVES], strict=True):
        pairs = [
            (a[name], b[name])
            for a in one
            for b in other
            if a["preference"] == b["preference"] == α and a["prompt"] == b["prompt"]
        ]
        assert row["prompts"] == len(pairs) == 8
        assert row["difference"] == pytest.approx(sum(a - b for a, b in pairs) / 8)
        assert row["first"] - row["second"] == pytest.approx(row["difference"])
        assert row["low"] < row["difference"] < row["high"]
        assert row["wins"] == sum((a > b) + (a == b) / 2 for a, b in pairs) / 8
    assert pair_up(one, other)[0].alone == 1


def test_what_both_share_cancels():
    """Prompts differ a lot, methods on a prompt by a tenth: the paired interval sees it."""
    one = rows_of("PARM", 0)
    other = [{**row, "helpful": row["helpful"] - 0.1 - 0.01 * (i % 2)} for i, row in enumerate(one)]
    assert compare(pair_up(one, other), ["helpful"])[0]["low"] > 0


def test_rows_that_are_there_twice_are_refused():
    rows = rows_of("PARM", 0)
    with pytest.raises(ValueError, match="has 'PARM' at .* twice for the prompt w3"):
        pair_up([*rows, {**rows[3], "helpful": 99.0}], rows)


def test_two_methods_and_a_control():
    table = [*rows_of("PARM", 0), *rows_of("GenARM", 1), *rows_of("Base", 2, grid=[None])]
    pairs = pair_up(table, table, ("PARM", "Base"))
    assert [(pair.method, pair.label) for pair in pairs] == [("PARM against Base", f"helpful {α[0]}") for α in GRID]
    assert len(pair_up(table, table, ("PARM", "GenARM"))) == 2
    assert [pair.label for pair in pair_up(table, table, ("Base", "PARM"))] == ["helpful 1.0", "helpful 0.25"]
    assert [pair.method for pair in pair_up(table, rows_of("Base", 3, grid=[None]))] == ["Base"]


def test_a_judge_that_failed_takes_the_prompt_from_its_own_reward():
    one, other = rows_of("PARM", 0), rows_of("PARM", 1)
    one[2] |= {"helpful": None, "unjudged": {"helpful": "no number"}}
    found = compare(pair_up(one, other), OBJECTIVES)
    assert [row["prompts"] for row in found] == [COUNT - 1, COUNT, COUNT, COUNT]
    for row in one:
        row |= {"helpful": None, "unjudged": {"helpful": "no number"}}
    assert compare(pair_up(one, other), ["helpful"])[0]["difference"] is None


def prefers_a(question):
    return "[[A]]"


def prefers_parm(question):
    a, b = (part.split("\n")[1] for part in question.split("[Answer ")[1:])
    if "w3" in question.split("[User]\n")[1].split("\n")[0]:
        return (500, "out of order")
    return "[[A]]" if "PARM" in a and "PARM" not in b else "[[B]]" if "PARM" in b and "PARM" not in a else "[[C]]"


def test_a_judge_that_prefers_a_place_prefers_nobody(tmp_path):
    pairs = pair_up(rows_of("PARM", 0), rows_of("GenARM", 1), ("PARM", "GenARM"))
    with JudgeServer(prefers_a) as server:
        rates, verdicts = judge_pairs(pairs, PairJudge(Endpoint(server.url, "stub", cache="")))
    assert [(rate["wins by the judge"], rate["judged alike in both orders"]) for rate in rates] == [(0.5, 0.0)] * 2
    assert {(row["as A"], row["as B"]) for row in verdicts} == {(1.0, 0.0)}
    with JudgeServer(prefers_parm) as server:
        rates, verdicts = judge_pairs(pairs, PairJudge(Endpoint(server.url, "stub", cache="", retries=0)))
        assert len(server.requests) == 2 * 2 * COUNT
    assert [(rate["wins by the judge"], rate["failed"], rate["prompts"]) for rate in rates] == [(1, 1, COUNT - 1)] * 2
    failed = [row for row in verdicts if "unjudged" in row]
    assert [(row["prompt"], row["as A"]) for row in failed] == [("w3", None)] * 2
    with JudgeServer(lambda question: "no idea") as server:
        rates, _ = judge_pairs(pairs, PairJudge(Endpoint(server.url, "stub", cache="")))
    assert (rates[0]["wins by the judge"], rates[0]["failed"]) == (None, COUNT)


def test_the_interval_of_wins_is_that_of_the_bootstrap_that_is_asked_for():
    def judge(prompts, first, second):
        return [(1.0, float(int(prompt[1:]) % 2)) for prompt in prompts]

    (pair, _) = pair_up(rows_of("PARM", 0), rows_of("GenARM", 1), ("PARM", "GenARM"))
    wins = [[(1 + i % 2) / 2] for i in range(COUNT)]
    for options in ({"resamples": 7}, {"seed": 3}):
        ((rate,), _) = judge_pairs([pair], judge, **options)
        assert (rate["low"], rate["high"]) == bootstrap(lambda mean: float(mean[0]), wins, **options)[1:]


@pytest.mark.parametrize(
    ("pattern", "answer", "won"),
    [
        (r"Winner: (?:(A)|(B)|(tie))", "Winner: A", 1),
        (r"Winner: (?:(A)|(B)|(tie))", "Winner: A? No. Winner: B", 0),
        (r"Winner: (?:(A)|(B)|(tie))", "Winner: tie", 0.5),
        (r"(?i)better:(\s*(?:A|B|neither))", "Better: b", 0),
        (r"(?i)better:(\s*(?:A|B|neither))", "better: neither", 0.5),
    ],
)
def test_a_verdict_is_in_any_group_and_case(tmp_path, pattern, answer, won):
    with JudgeServer(lambda question: answer) as server:
        judge = PairJudge(Endpoint(server.url, "stub", cache="", retries=0), pattern=pattern)
        assert judge(["q"], ["x"], ["y"]) == [(won, 1 - won)]


def test_the_command(tmp_path, capsys):
    one = save(tmp_path / "one/results.jsonl", [*rows_of("PARM", 0, shift=1.0), *rows_of("A", 2)])
    turned = [{**row, "preference": row["preference"][::-1]} for row in rows_of("PARM", 1)]
    two = save(tmp_path / "two/results.jsonl", turned, OBJECTIVES[::-1])
    out = tmp_path / "out"
    with JudgeServer(prefers_parm) as server:
        given = {"source": "openai", "base_url": server.url, "model": "stub", "cache": "", "retries": 0}
        words = ["--output_dir", str(out), "--judge", json.dumps(given)]
        assert main(["compare", "--results", one, "--methods", "PARM", "A", *words]) == 0
    told = capsys.readouterr().out
    assert "PARM against A" in told
    assert "Judged by stub" in told
    with (out / "wins.csv").open() as file:
        assert [float(row["wins by the judge"]) for row in csv.DictReader(file)] == [1, 1]
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == 2 * COUNT
    assert main(["compare", "--results", one, "--methods", "PARM", "A", "--output_dir", str(out)]) == 0
    assert not (out / "wins.csv").exists()  # of a judge that this comparison does not have
    assert not (out / "verdicts.jsonl").exists()
    assert main(["compare", "--results", one, two, "--output_dir", str(tmp_path / "files")]) == 0
    with (tmp_path / "files/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert [row["method"] for row in rows] == ["PARM"] * 4
    expected = compare(pair_up(rows_of("PARM", 0, shift=1.0), rows_of("PARM", 1)), OBJECTIVES)
    assert [float(row["difference"]) for row in rows] == [row["difference"] for row in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one"], "name them with `methods`"),
        (["one", "two", "one"], "two at most are compared"),
        (["one", "--methods", "PARM"], "they must be two"),
        (["one", "--methods", "PARM", "GenARM"], "There is no method 'GenARM'; there are PARM, A"),
        (["one", "other"], "has the objectives"),
        (["one", "apart"], "so there are no pairs"),
        (["one", "two", "--objectives", "humor"], "The results have no reward 'humor'"),
        (["bare", "bare"], "has no objectives. Name the columns with rewards as `objectives`"),
        (["one", "two", "--judge", '{"source": "openai"}'], "needs `source: openai`, base_url, model"),
    ],
)
def test_bad_comparisons(tmp_path, capsys, words, message):
    files = {
        "one": save(tmp_path / "one.jsonl", [*rows_of("PARM", 0), *rows_of("A", 2)]),
        "two": save(tmp_path / "two.jsonl", rows_of("PARM", 1)),
        "other": save(tmp_path / "other.jsonl", rows_of("PARM", 1), ["a", "b"]),
        "bare": save(tmp_path / "bare.jsonl", rows_of("base", 1, grid=(None,)), []),
        "apart": save(tmp_path / "apart.jsonl", rows_of("PARM", 1, prompts=[77])),
    }
    given = [files.get(word, word) for word in words]
    assert main(["compare", "--results", *given, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
