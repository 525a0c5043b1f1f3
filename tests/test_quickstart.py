# SPDX-License-Identifier: Apache-2.0
"""The demo, run as a user runs it: in a process of its own, in an empty folder."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset
from doc_blocks import MODEL, ROOT, run

from peft_pblora.output import NOTES


FILES = {"arm", "measures.json", "pareto.png", "report.md", "responses.jsonl", NOTES}
REPORTED = {"positive": [1.0, 0.0], "uniform": [0.5, 0.5], "concise": [0.0, 1.0]}


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    small = ["--steps", "2", "--batch-size", "2", "--eval-pairs", "2", "--max-new-tokens", "5"]
    return run(folder, str(ROOT / "examples/quickstart.py"), "--model", MODEL, *small, *arguments)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder as `make demo` leaves it, made with a tiny model and few pairs."""
    folder = tmp_path_factory.mktemp("demo")
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)
    (folder / "examples/data").mkdir(parents=True)
    lines = (ROOT / "examples/data/pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    few = [
        pair for objective in ("positive", "concise") for split in ("train", "test")
        for pair in [p for p in pairs if (p["objective"], p["split"]) == (objective, split)][:8]
    ]  # fmt: skip
    (folder / "examples/data/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in few))
    result = quickstart(folder, "--pairs", "examples/data/pairs.jsonl")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_quickstart_writes_and_prints_everything(demo_folder):
    demo, printed = demo_folder / "runs/demo", (demo_folder / "stdout").read_text()
    assert {path.name for path in demo.iterdir()} == FILES
    assert (demo / "pareto.png").read_bytes().startswith(b"\x89PNG")
    measures = json.loads((demo / "measures.json").read_text())
    assert measures["reference_point"] == {"positive": 0.0, "concise": -5.0}
    assert {(c["reward"], c["over"]) for c in measures["claims"]} == {
        ("positive", "concise"), ("positive", "base, sharpened"),
        ("concise", "positive"), ("concise", "base, sharpened"),
    }  # fmt: skip
    rows = [json.loads(line) for line in (demo / "responses.jsonl").read_text().splitlines()]
    assert {(row["method"], row["label"]) for row in rows} == {
        ("base", "-"), ("base, sharpened", "-"), ("PARM", "concise"), ("PARM", "positive=0.25,concise=0.75"),
        ("PARM", "uniform"), ("PARM", "positive=0.75,concise=0.25"), ("PARM", "positive"),
    }  # fmt: skip
    assert (demo / "report.md").read_text().strip() in printed
    assert "Held-out pair accuracy" in printed
    for claim in measures["claims"]:
        assert claim["holds"] == (claim["gain"] > 2 * claim["standard_error"])
    assert printed.count("DOES NOT HOLD") == sum(not claim["holds"] for claim in measures["claims"])


def test_a_report_of_one_prompt_has_no_errors(tmp_path, monkeypatch, capsys):
    """One prompt says nothing of how far others scatter."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    report = importlib.import_module("report")
    runs = [("base", "-", None), ("base, sharpened", "-", None), *(("PARM", n, p) for n, p in REPORTED.items())]
    rows = [
        {"method": method, "label": label, "preference": preference, "prompt": "w1", "response": "w2", "tokens": 1,
         "seconds": 1.0, "extra_parameters": 0, "extra_bytes": 0, "positive": float(i), "concise": -float(i)}
        for i, (method, label, preference) in enumerate(runs)
    ]  # fmt: skip
    monkeypatch.setattr(report, "add_results", lambda *_: None)
    report.write_report(Dataset.from_list(rows), ["positive", "concise"], [0.0, -9.0], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text + (tmp_path / "measures.json").read_text().lower()
    assert "| base, sharpened | - | 1.00 (one prompt) | -1.00 (one prompt) |" in text
    assert text.count("more than two standard errors can't be told.") == 4


@pytest.mark.slow
def test_quickstart_without_a_chat_template(demo_folder):
    shutil.copytree(demo_folder / MODEL, demo_folder / "plain")
    (demo_folder / "plain/chat_template.jinja").unlink()
    result = quickstart(
        demo_folder, "--pairs", "examples/data/pairs.jsonl", "--model", "plain", "--output", "runs/plain"
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (demo_folder / "runs/plain").iterdir()} == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "nowhere.jsonl"], "There are no pairs at nowhere.jsonl"),
        pytest.param(["--pairs", "wrong.jsonl"], "Line 1 of wrong.jsonl lacks ['chosen'", marks=pytest.mark.slow),
        pytest.param(["--output", "stdout"], "is a file", marks=pytest.mark.slow),
        pytest.param(["--output", "taken"], "was not written by 'quickstart.py'", marks=pytest.mark.slow),
        pytest.param(["--beta", "0"], "must be a positive, finite number", marks=pytest.mark.slow),
    ],
)
def test_quickstart_refuses_bad_input_in_one_line(demo_folder, arguments, message):
    (demo_folder / "wrong.jsonl").write_text('{"prompt": []}\n')
    (demo_folder / "taken").mkdir(exist_ok=True)
    (demo_folder / "taken/notes.txt").write_text("mine")
    before = {path.name for path in (demo_folder / "runs").iterdir()}
    pairs = [] if "--pairs" in arguments else ["--pairs", "examples/data/pairs.jsonl"]
    result = quickstart(demo_folder, *pairs, *arguments)
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in result.stderr
    assert {path.name for path in (demo_folder / "runs").iterdir()} == before
    assert [path.read_text() for path in (demo_folder / "taken").iterdir()] == ["mine"]


def test_pairs_can_be_made_again(demo_folder):
    """With a random model the answers are not sentences, so no pair is found; the file is there all the same."""
    script = str(ROOT / "examples/make_pairs.py")
    arguments = ["--model", MODEL, "--prompts", "3", "--max-new-tokens", "4", "--output", "new/pairs.jsonl"]
    result = run(demo_folder, script, *arguments)
    assert result.returncode == 0, result.stderr
    assert (demo_folder / "new/pairs.jsonl").exists()


def test_shipped_pairs_are_what_they_claim():
    from trl_parm.rewards import conciseness, positivity

    rewards = {"positive": positivity, "concise": conciseness}
    rows = [json.loads(line) for line in (ROOT / "examples/data/pairs.jsonl").read_text().splitlines()]
    splits = {"train": set(), "test": set()}
    for row in rows:
        prompt, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        splits[row["split"]].add(prompt)
        better, worse = rewards[row["objective"]]([prompt] * 2, [chosen, rejected])
        assert better > worse
    assert not splits["train"] & splits["test"]
