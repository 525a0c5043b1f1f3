# SPDX-License-Identifier: Apache-2.0
"""The pairs of the small comparison's tasks: prompts by split, labels, and the command."""

import itertools
import random

import make_task_pairs as script
import pytest
from comparison.task import Task, agreement
from conftest import tiny_llama, tiny_tokenizer
from make_pairs import DATA
from tokenizers import decoders


STORIES, SMOLLM2 = script.SOURCES["stories"], script.SOURCES["smollm2"]
HAPPY, SAD, LONG = (
    " I love this. So good!",
    " I hate this. So bad!",
    " I love this good day and all of my very good friends.",
)


def test_prompts_of_a_split_are_in_no_other():
    for source, sizes in ((STORIES, (620, 60, 120)), (SMOLLM2, (322, 56, 112))):
        found = source.prompts(random.Random(0))
        assert tuple(map(len, found.values())) == sizes
        for one, other in itertools.combinations(found.values(), 2):
            assert not set(one) & set(other)


def test_no_topic_is_in_two_splits():
    topics = (DATA / "topics.txt").read_text(encoding="utf-8").splitlines()
    found = SMOLLM2.prompts(random.Random(3))
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


def test_messages_are_whole_sentences():
    (pair,) = script.label_pairs("p", [SAD.strip(), HAPPY.strip()], SMOLLM2)
    assert pair["prompt"] == [{"role": "user", "content": "p"}]
    assert pair["response_1"] == [{"role": "assistant", "content": HAPPY.strip()}]
    assert (pair["positive"], pair["concise"]) == (1, -1)
    assert script.whole_sentences("One. Two? And thr") == "One. Two?"
    assert script.whole_sentences("no end") == ""


@pytest.mark.parametrize("task", ["stories", "smollm2"])
def test_the_command_writes_a_task(tmp_path, task, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##")  # words with spaces between them
    tokenizer.save_pretrained(tmp_path / "model")
    # The tiny model's words say nothing, and nothing ends its sentences.
    monkeypatch.setattr(script, "positivity", lambda prompts, responses: [r.count("1") for r in responses])
    monkeypatch.setattr(script, "conciseness", lambda prompts, responses: [-r.count("2") for r in responses])
    monkeypatch.setattr(script, "whole_sentences", str)
    output = tmp_path / "pairs.jsonl"
    words = ["--model", str(tmp_path / "model"), "--output", str(output), "--prompts", "3", "--samples", "4"]
    script.main([task, *words])
    objectives = script.SOURCES[task].objectives
    settings = {"name": task, "title": task, "model": "", "budgets": {}, "settings_steps": 1}
    rows = Task(**settings, pairs=str(output), rewards=dict.fromkeys(objectives, "")).rows
    assert all(1 <= len({str(row["prompt"]) for row in of_split}) <= 3 for of_split in rows.values())
    assert 0 < agreement(rows["train"], objectives) < 1


def test_stories_need_a_model(capsys):
    with pytest.raises(SystemExit):
        script.main(["stories"])
    assert "needs --model" in capsys.readouterr().err
