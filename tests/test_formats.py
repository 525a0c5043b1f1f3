# SPDX-License-Identifier: Apache-2.0
"""Results as others read them."""

import json
import re
from pathlib import Path

import pytest
from conftest import tiny_llama, tiny_tokenizer
from datasets import load_dataset

from trl_parm.cli.main import main
from trl_parm.decoding import BASE, Guided
from trl_parm.evaluation import Run, sweep
from trl_parm.records import read_rows
from trl_parm.rewards import brevity, conciseness


CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats") / "results.jsonl"
    base = tiny_llama()
    runs = [Run("Base"), *(Run("A/B", [w, 1 - w], lambda batch: Guided(base, BASE)) for w in (0.25, 1.0))]
    rewards = {"helpful": brevity, "harmless": conciseness}
    sweep(base, tiny_tokenizer(), ["w1 w2", CHAT], runs, rewards, path=path, max_new_tokens=4)
    return path


def test_model_outputs_of_alpaca_eval(results, tmp_path, capsys):
    words = ["convert", "--results", str(results), "--format", "alpaca_eval", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    files = [re.search(r"--model_outputs '(.*)'", line)[1] for line in capsys.readouterr().out.splitlines()]
    found = [entry for file in files for entry in json.loads(Path(file).read_text())]
    rows = read_rows(results)
    assert [entry["output"] for entry in found] == [row["response"] for row in rows]
    assert [entry["instruction"] for entry in found[:2]] == ["w1 w2", "Human: w1\n\nAssistant: w2\n\nHuman: w3"]
    generators = ["Base", "A/B helpful=0.25 harmless=0.75", "A/B helpful=1 harmless=0"]
    assert [entry["generator"] for entry in found[::2]] == generators
    assert len(set(files)) == 3
    assert {key for entry in found for key in entry} == {"instruction", "output", "generator"}
    assert main(words) == 0  # again
    Path(files[-1]).write_text("mine")
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in map(Path, files[:-1]):
        path.unlink()
        del kept[path]
    assert main(words) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def test_a_folder_for_the_hub(results, tmp_path, capsys):
    folder = tmp_path / "data"
    words = ["convert", "--results", str(results), "--format", "dataset", "--output_dir", str(folder)]
    assert main([*words, "--methods", "A/B"]) == 0
    data = load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))
    rows = [row for row in read_rows(results) if row["method"] == "A/B"]
    for name in rows[0]:
        assert list(data[name]) == [row[name] for row in rows], name
    assert list(data["α helpful"]) == [0.25, 0.25, 1.0, 1.0]
    card = (folder / "README.md").read_text()
    assert json.loads(card.split("```json\n")[1].split("\n```")[0])["objectives"] == ["helpful", "harmless"]
    assert main(words) == 0
    assert len(load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache2"))) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "csv"}, "must be one of alpaca_eval, dataset"), ({"methods": "C"}, "have no method 'C'")],
)
def test_bad_conversions(results, tmp_path, capsys, change, message):
    given = {"results": results, "format": "dataset", "output_dir": tmp_path / "out", **change}
    assert main(["convert", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
