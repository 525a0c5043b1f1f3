# SPDX-License-Identifier: Apache-2.0
"""What commands say: help, progress in a pipe, what was written, and what went wrong in code of a user's own."""

import json
import re
import shlex
import sys

import datasets
import pandas
import pytest
import yaml
from test_cli import REWARDS, _no_progress_bars, folder, run, write  # noqa: F401 - the fixtures

from trl_parm.arguments import read
from trl_parm.cli import common
from trl_parm.cli.main import main, overview
from trl_parm.records import read_rows
from trl_parm.training.config import PairData


VECTORS, METHODS, PROMPTS = list[list | dict] | None, list[dict | str] | None, list[str | list] | None


@pytest.mark.parametrize(
    ("name", "value", "hint", "expected"),
    [
        ("preferences", ["[1,0,0]"], VECTORS, [[1, 0, 0]]),
        ("preferences", ["[1, 0]", '{"a": 1}'], VECTORS, [[1, 0], {"a": 1}]),
        ("preferences", ["[[1, 0], [0, 1]]"], VECTORS, [[1, 0], [0, 1]]),
        ("preferences", [1, 0], VECTORS, [[1, 0]]),
        ("preferences", {"a": 1}, VECTORS, [{"a": 1}]),
        ("methods", "base", METHODS, ["base"]),
        ("methods", ['["base", {"method": "parm"}]'], METHODS, ["base", {"method": "parm"}]),
        ("objectives", ['["a", "b"]'], list[str] | None, ["a", "b"]),
        ("prompts", ['["a", "b"]'], PROMPTS, ["a", "b"]),
        ("prompts", ["[INST] a", "{b}", '{"c": 1}'], PROMPTS, ["[INST] a", "{b}", '{"c": 1}']),
        ("prompts", ['[{"role": "user"}]'], PROMPTS, [[{"role": "user"}]]),
        ("train_data", ["a.jsonl", '{"path": "b"}'], list[PairData], ["a.jsonl", {"path": "b"}]),
        ("train_data", ['[{"path": "b"}]'], list[PairData], [{"path": "b"}]),
        ("rewards", '{"a": "b:c"}', dict | None, {"a": "b:c"}),
        ("data", "[x].jsonl", dict | str | None, "[x].jsonl"),
        ("beta", "0.5", dict | float, 0.5),
        ("beta", '{"a": 0.5}', dict | float, {"a": 0.5}),
        ("report_to", "none", str | list[str] | None, "none"),
    ],
)
def test_lists_and_mappings_are_json_in_a_flag(name, value, hint, expected):
    assert read(name, value, hint) == expected


def test_no_words_print_the_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == overview()


def test_a_suggested_command_runs_when_pasted(folder, tmp_path, capsys):  # noqa: F811
    words = ("--model_name_or_path", folder / "base", "--rewards", json.dumps(REWARDS), "--grid_steps", 1)
    method = json.dumps({"method": "parm", "arm": str(folder / "arm")})
    results = tmp_path / "a folder"
    words = ("evaluate", *words, "--methods", "base", method, "--prompts", "w1", "w2", "--output_dir", results)
    assert run(*words, "--max_new_tokens", 2) == 0
    plot = shlex.split(capsys.readouterr().out.split("Measures and figures: ")[1])
    assert plot[0] == "trl-parm"
    assert run(*plot[1:], "--resamples", 5) == 0
    points = shlex.split(capsys.readouterr().out.split("worse than all that counts: ")[1].splitlines()[0])
    assert run(*plot[1:], *points, "--resamples", 5) == 0
    assert "hypervolume" in capsys.readouterr().out


def test_conversations_are_printed_as_text(folder, capsys):  # noqa: F811
    words = ("generate", "--model_name_or_path", folder / "base", "--max_new_tokens", 2, "--prompts")
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    assert run(*words, json.dumps(chat), "w4") == 0  # a text among conversations is one too
    printed = capsys.readouterr().out
    assert "# Base, -: Human: w1\n\nAssistant: w2\n\nHuman: w3\n" in printed
    assert "# Base, -: w4\n" in printed
    assert "role" not in printed


def test_a_file_with_other_prompts_is_added_to_and_said_so(folder, tmp_path, capsys):  # noqa: F811
    words = ("generate", "--model_name_or_path", folder / "base", "--output", tmp_path / "texts.jsonl")
    words = (*words, "--max_new_tokens", 2, "--prompts")
    assert run(*words, "w1", "w2") == 0
    assert "2 responses in" in (told := capsys.readouterr().out)
    assert "2 new, 0 were there.\n" in told
    assert "keeps" not in told
    assert run(*words, "w2", "w3") == 0
    assert "1 new, 1 were there.\nIt keeps 1 more, of other prompts, methods or pref" in capsys.readouterr().out
    assert [row["prompt"] for row in read_rows(tmp_path / "texts.jsonl")] == ["w1", "w2", "w3"]


def test_long_work_says_in_a_pipe_where_it_is(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    relabel = ("relabel", "--data", folder / "pairs.jsonl", "--rewards", json.dumps(REWARDS), "--batch_size", 12)
    assert run(*relabel, "--output_dir", tmp_path / "quick") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "EVERY", 0.0)
    assert run(*relabel, "--output_dir", tmp_path / "slow") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [f"pair {n} of 48" for n in (12, 24, 36, 48)]
    assert all("gone, about 0:00:0" in line for line in lines)


@pytest.fixture
def training(folder, tmp_path, monkeypatch):  # noqa: F811
    """Words of a short training on labelled pairs whose columns are not named."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"safe": i % 2, "kind": (i % 3) - 1, "response_0_level": 0, "words": 5, "raw_prompt": "x", "s": 0.5}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.disable_progress_bars()
    words = {
        "model_name_or_path": str(folder / "base"), "train_data": str(path), "eval_data": str(path), "max_steps": 4,
        "target_modules": "q_proj", "bf16": False, "report_to": "none", "use_cpu": True, "logging_steps": 2,
        "output_dir": str(tmp_path / "trained"), "per_device_train_batch_size": 2,
    }  # fmt: skip
    return lambda **changes: ("train", "--config", write(tmp_path / "train.yaml", words | changes))


def test_training_ends_with_its_model_and_its_accuracies(training, tmp_path, capsys):
    assert run(*training()) == 0
    told = capsys.readouterr()
    card = (tmp_path / "trained/README.md").read_text()
    table = told.out[told.out.index("| objective |") : told.out.index("\n\nThe model is in")]
    assert table in card
    assert re.search(r"\nIt (hardly follows|follows|ignores) α", table)
    assert f"The model is in {tmp_path / 'trained'}; its card, README.md" in told.out
    assert len(told.out.splitlines()) < 13
    assert "step 2 of 4: loss 0." in told.err
    assert "{'loss'" not in told.out


def test_training_without_held_out_pairs_says_what_it_does_not_know(training, tmp_path, capsys):
    assert run(*training(eval_data=[])) == 0
    told = capsys.readouterr().out
    assert "Whether it has learned, and follows α, was not measured: that takes held-out pairs, `eval_data`" in told
    assert "follows α" not in (tmp_path / "trained/README.md").read_text()


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_found_by_their_columns(training, tmp_path, capsys, streaming):
    data = {"path": str(tmp_path / "pairs.jsonl"), "streaming": streaming}
    assert run(*training(train_data=[data])) == 0
    assert "Objectives, by the columns with labels: safe, kind. `label_columns` names" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    assert adapter["objectives"] == ["safe", "kind"]
    written = yaml.safe_load((tmp_path / "trained/run.yaml").read_text())
    assert written["arguments"]["label_columns"] == {"safe": "safe", "kind": "kind"}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_in_use_are_no_labels_and_labels_may_be_missing(training, tmp_path, capsys, streaming):
    """A CSV has no whole numbers in a column where one is missing."""
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"held_out": i % 5 == 0, "confidence": 1, "kind": None if i == 1 else row["kind"], "safe_score_0": 1.0}
    pandas.DataFrame(rows).astype({"held_out": int}).to_csv(tmp_path / "pairs.csv", index=False)
    data = {"path": str(tmp_path / "pairs.csv"), "where": {"held_out": 0}, "streaming": streaming}
    assert run(*training(train_data=[data], eval_data=[data], weight_column="confidence")) == 0
    assert "Objectives, by the columns with labels: safe, kind. `label_columns`" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    assert adapter["objectives"] == ["safe", "kind"]


def test_objectives_of_a_plain_lora_are_refused(training, tmp_path, capsys):
    assert run(*training(adapter="lora", objectives=["safe"], label_columns={"safe": "safe"})) == 2
    assert "`objectives` is ['safe'], but a plain LoRA has no preference" in capsys.readouterr().err
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"safe": "response_1_safe", "kind": "response_1_kind"}, "has no column of labels, which are 0, 1 or -1; it"),
        ({"response_0": "chosen", "response_1": "rejected"}, "name no `objective`, which chosen and rejected are for"),
    ],
)
def test_data_without_an_objective_are_refused(training, tmp_path, capsys, columns, message):
    assert run(*training(train_data=[{"path": str(tmp_path / "pairs.jsonl"), "columns": columns}])) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "trained").exists()


def test_an_error_in_a_reward_of_a_user_shows_where(folder, tmp_path, monkeypatch):  # noqa: F811
    """A line would hide the place; bad input of ours stays a line."""
    (tmp_path / "my_rewards.py").write_text(
        "def broken(prompts, responses):\n    return [int('x') for _ in prompts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("relabel", "--data", folder / "pairs.jsonl", "--output_dir", tmp_path / "out", "--rewards")
    with pytest.raises(Exception, match="invalid literal|helpful") as caught:
        run(*words, '{"helpful": "my_rewards:broken"}')
    places = [str(entry.path) for entry in caught.traceback]
    cause = caught.value.__cause__
    while cause is not None:
        places, cause = [*places, cause.__traceback__.tb_next.tb_frame.f_code.co_filename], cause.__cause__
    assert str(tmp_path / "my_rewards.py") in places
    monkeypatch.delitem(sys.modules, "my_rewards")
    assert run(*words, '{"helpful": "my_rewards:missing"}') == 2


def test_long_work_has_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with common.Progress(4, "step", done=1) as progress:
        progress.update(2, "loss 0.5")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "3/4" in last
    assert "loss 0.5" in last
