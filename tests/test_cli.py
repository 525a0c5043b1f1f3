# SPDX-License-Identifier: Apache-2.0
"""The console command: from pairs to figures with tiny models, bad input, and help without heavy imports."""

import configparser
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template
from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TrlParser

from peft_pblora import set_preference
from peft_pblora.output import NOTES
from trl_parm import PARM, GenARM, PreferenceARMConfig, PreferenceText
from trl_parm.arguments import parse
from trl_parm.cli.common import grid, load_rewards
from trl_parm.cli.evaluate import EvaluateArguments
from trl_parm.cli.export import ExportArguments
from trl_parm.cli.main import VERBS, main
from trl_parm.cli.plot import PlotArguments
from trl_parm.cli.relabel import RelabelArguments
from trl_parm.evaluation import summarize
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.evaluation.evaluate import Entry
from trl_parm.records import read_rows, write_run
from trl_parm.training.config import ARMArguments


REWARDS = {"helpful": "trl_parm.rewards:brevity", "harmless": "trl_parm.rewards:conciseness"}


@pytest.fixture(autouse=True)
def _no_progress_bars():
    """A command switches them off before it imports transformers, which the tests have imported already."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def run(*words) -> int:
    return main([str(word) for word in words])


def write(path, content) -> str:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an ARM on it, and pairs."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "arm")
    pairs = [
        {"prompt": f"w{i % 8}", "response_0": "w1 " * (i % 4 + 1), "response_1": "w2 . " * (i % 3 + 1)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def evaluation(folder, output="results", **changes) -> dict:
    methods = ["base", {"method": "untrained_arm", "arm": str(folder / "arm"), "name": "sharpened"}]
    return {
        "model_name_or_path": str(folder / "base"), "rewards": REWARDS, "grid_steps": 2, "max_new_tokens": 4,
        "methods": [*methods, {"method": "parm", "arm": str(folder / "arm"), "beta": 0.5}], "do_sample": True,
        "prompts_data": {"path": str(folder / "pairs.jsonl")}, "num_prompts": 5, "batch_size": 2,
        "output_dir": str(folder / output), **changes,
    }  # fmt: skip


def test_from_pairs_to_a_figure(folder, monkeypatch, capsys):
    """Every verb, with what one writes read by the next."""
    monkeypatch.chdir(folder)
    relabel = {"data": {"path": "pairs.jsonl"}, "rewards": REWARDS, "output_dir": "labelled", "test_size": 6}
    assert run("relabel", "--config", write(folder / "relabel.yaml", relabel), "--seed", 3) == 0
    assert "18 pairs in labelled/train.jsonl, 6 pairs in labelled/test.jsonl" in capsys.readouterr().out
    assert yaml.safe_load((folder / "labelled/run.yaml").read_text())["arguments"]["seed"] == 3

    train = {
        "model_name_or_path": "base", "objectives": list(REWARDS), "output_dir": "trained", "max_steps": 2,
        "train_data": [{"path": "labelled/train.jsonl"}], "eval_data": [{"path": "labelled/test.jsonl"}],
        "target_modules": ["q_proj"], "bf16": False, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    assert run("train", "--config", write(folder / "train.yaml", train), "--resume", "True") == 0
    assert "starting anew" in capsys.readouterr().out
    written = yaml.safe_load((folder / "trained/run.yaml").read_text())
    assert (written["verb"], written["arguments"]["max_steps"], "torch" in written["versions"]) == ("train", 2, True)
    assert "eval_helpful_accuracy@helpful" in json.loads((folder / "trained/eval_results.json").read_text())

    evaluate = evaluation(folder, prompts_data={"path": "labelled/train.jsonl"}, num_prompts=None)
    evaluate["methods"][-1]["arm"] = "trained"
    assert run("evaluate", "--config", write(folder / "evaluate.yaml", evaluate)) == 0
    assert "| PARM | 0.50, 0.50 |" in capsys.readouterr().out
    rows = read_rows(folder / "results/results.jsonl")
    prompts = {json.loads(line)["prompt"] for line in (folder / "labelled/train.jsonl").read_text().splitlines()}
    assert len(rows) == 5 * len(prompts)
    assert {row["prompt"] for row in rows} == prompts

    plot = ("plot", "--results", "results/results.jsonl", "--output_dir", "figures", "--resamples", 20)
    assert run(*plot, "--references", "[-6, -6]", '{"helpful": -9, "harmless": -8}') == 0
    text = capsys.readouterr().out
    assert text.count("helpful -9, harmless -8") == 5
    assert "Differences from PARM" in text
    expected = {f"fronts.{kind}" for kind in ("png", "svg", "csv")} | {"measures.md", "run.yaml", NOTES}
    expected |= {f"{name}.csv" for name in ("measures", "differences", "correlations", "answers", "costs")}
    assert {path.name for path in (folder / "figures").iterdir()} == expected
    assert run(*plot) == 0
    assert "No hypervolume" in capsys.readouterr().out

    assert run("export", "--adapter", "trained", "--output_dir", "loras", "--grid_steps", 1, "--rank", 16) == 0
    assert capsys.readouterr().out.split() == ["loras/harmless", "loras/helpful"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "loras/helpful")
    assert model.peft_config["default"].r == 16


def test_generate_prints_or_writes(folder, capsys):
    method = json.dumps({"method": "parm", "arm": str(folder / "arm")})
    words = ("generate", "--model_name_or_path", folder / "base", "--prompts", "w1 w2", "w3", "--max_new_tokens", 3)
    guided = (
        "--method",
        method,
        "--preferences",
        '{"helpful": 0.3, "harmless": 0.7}',
        '{"helpful": 1, "harmless": 0}',
    )
    assert run(*words, *guided) == 0
    printed = capsys.readouterr().out
    assert "# PARM, helpful=0.3,harmless=0.7: w1 w2\n" in printed
    assert "# PARM, helpful: w3\n" in printed
    assert run(*words, *guided, "--output", folder / "texts.jsonl") == 0
    rows = read_rows(folder / "texts.jsonl")
    assert len(rows) == 4
    assert all(f"# PARM, {row['label']}: {row['prompt']}\n{row['response']}\n" in printed for row in rows)
    assert "helpful" not in rows[0]
    assert yaml.safe_load((folder / "texts.run.yaml").read_text())["arguments"]["seed"] == 0
    assert run(*words) == 0
    assert "# Base, -: w3\n" in capsys.readouterr().out


def test_relabelling_may_start_anew(folder, tmp_path, capsys):
    words = ("relabel", "--data", folder / "pairs.jsonl", "--output_dir", tmp_path / "labels", "--rewards")
    assert run(*words, '{"short": "trl_parm.rewards:brevity"}') == 0
    assert run(*words, '{"short": "trl_parm.rewards:conciseness"}') == 2
    assert "start anew with `restart`" in capsys.readouterr().err
    assert run(*words, '{"short": "trl_parm.rewards:conciseness"}', "--restart") == 0


def test_generate_counts_what_is_new_and_takes_objectives_in_any_order(folder, tmp_path, capsys):
    method = {"method": "parm", "arm": str(folder / "arm")}
    words = ("generate", "--model_name_or_path", folder / "base", "--prompts", "w1 w2", "w3", "--max_new_tokens", 3)
    words = (*words, "--output", tmp_path / "texts.jsonl", "--preferences", '{"helpful": 0.5, "harmless": 0.5}')
    assert run(*words, "--method", json.dumps(method)) == 0
    assert "2 responses in" in (told := capsys.readouterr().out)
    assert "2 new, 0 were there" in told
    assert run(*words, '{"harmless": 0, "helpful": 1}', "--method", json.dumps(method)) == 0
    assert "2 new, 2 were there" in capsys.readouterr().out
    assert read_rows(tmp_path / "texts.jsonl")[-1]["preference"] == [1.0, 0.0]
    assert run(*words[:-2], "--preferences", '{"harmless": 1, "helpful": 0}', "--method", json.dumps(method)) == 0
    assert "2 new, 0 were there" in capsys.readouterr().out
    assert read_rows(tmp_path / "texts.jsonl")[-1]["label"] == "harmless"
    assert run(*words, "--method", json.dumps({**method, "beta": 0.5}), "--restart") == 0
    assert "2 new, 0 were there" in capsys.readouterr().out


def test_generate_goes_on_after_a_kill_within_its_first_row(folder, tmp_path, capsys):
    words = ("generate", "--model_name_or_path", folder / "base", "--prompts", "w3", "--max_new_tokens", 3)
    words, path = (*words, "--output", tmp_path / "torn.jsonl"), tmp_path / "torn.jsonl"
    assert run(*words) == 0
    whole = path.read_bytes()
    for torn in (whole[:14], b"\0" * 20):
        path.write_bytes(torn)
        assert run(*words) == 0
        assert "1 new, 0 were there" in capsys.readouterr().out.splitlines()[-1]
        assert [row["prompt"] for row in read_rows(path)] == ["w3"]


@pytest.mark.parametrize("prompt", ['{"name": "', "{name: ", "[1, ", "{}"])
def test_a_prompt_may_begin_like_json(folder, capsys, prompt):
    words = ("generate", "--model_name_or_path", folder / "base", "--max_new_tokens", 1)
    for given in (("--prompts", prompt), ("--config", write(folder / "prompts.yaml", {"prompts": [prompt]}))):
        assert run(*words, *given) == 0
        assert f"# Base, -: {prompt}\n" in capsys.readouterr().out


def test_the_beginning_of_a_flag_is_none(folder, capsys):
    words = ("generate", "--model_name_or_path", folder / "base", "--prompts", "w3")
    for flag in ("--conf", "--max_new"):
        assert run(*words, flag, "5") == 2
        assert f"`{flag[2:]}` is no key of trl-parm generate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preferences", "shown"),
    [
        ([[0.125, 0.875], [0.5, 0.5]], ["0.125, 0.875", "0.500, 0.500"]),
        ([[1 / 3, 2 / 3], [1.0, 0.0]], ["0.3333, 0.6667", "1.0000, 0.0000"]),
        ([[1 / 3, 2 / 3], [0.3333, 0.6667]], ["0.33333, 0.66667", "0.33330, 0.66670"]),
    ],
    ids=str,
)
def test_no_preference_looks_like_another_in_the_summary(folder, tmp_path, capsys, preferences, shown):
    parm = {"method": "parm", "arm": str(folder / "arm")}
    changes = {"grid_steps": None, "preferences": preferences, "methods": [parm], "num_prompts": 1}
    given = evaluation(folder, output_dir=str(tmp_path / "out"), **changes)
    assert run("evaluate", "--config", write(tmp_path / "evaluate.yaml", given)) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| PARM |")] == shown


def test_weights_beyond_the_simplex(folder, tmp_path, capsys):
    """As the library decodes them; the table of them has measures, and the adapter is exported there."""
    methods = [
        {"method": "parm", "arm": str(folder / "arm")},
        {"method": "genarm", "arms": {"helpful": str(folder / "arm"), "harmless": str(folder / "base")}},
    ]
    preferences = [BEYOND, {"helpful": 0.3, "harmless": 0.7}]
    changes = {"grid_steps": None, "do_sample": False, "allow_off_simplex": True}
    config = evaluation(folder, tmp_path / "results", methods=methods, preferences=preferences, **changes)
    assert run("evaluate", "--config", write(tmp_path / "beyond.yaml", config)) == 0
    rows = read_rows(tmp_path / "results/results.jsonl")
    assert {row["label"] for row in rows} == {"helpful=1.5,harmless=-0.5", "helpful=0.3,harmless=0.7"}
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    arm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "arm").eval()
    arms = {"helpful": arm, "harmless": base}
    guided = {
        "PARM": PARM(base, arm, BEYOND, allow_off_simplex=True),
        "GenARM": GenARM(base, arms, BEYOND, allow_off_simplex=True),
    }
    for row in (row for row in rows if row["label"].startswith("helpful=1.5")):
        inputs = encode_prompts(tiny_tokenizer(), [row["prompt"]])
        text = guided[row["method"]].generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        assert tiny_tokenizer().decode(text, skip_special_tokens=True) == row["response"]
    plot = ("plot", "--results", tmp_path / "results/results.jsonl", "--output_dir", tmp_path / "figures")
    assert run(*plot, "--resamples", 10, "--references", "[-6, -6]") == 0
    export = (
        "export",
        "--adapter",
        folder / "arm",
        "--output_dir",
        tmp_path / "loras",
        "--preferences",
        "[1.5, -0.5]",
    )
    assert run(*export, "--allow_off_simplex", "True") == 0
    (exported,) = (path for path in (tmp_path / "loras").iterdir() if path.is_dir())
    ids = torch.arange(2, 12)[None]
    set_preference(arm, BEYOND, allow_off_simplex=True)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), exported)
    torch.testing.assert_close(lora(ids).logits, arm(ids).logits, atol=1e-5, rtol=1e-5)
    capsys.readouterr()


def test_train_with_descriptions_and_with_preferences_in_prompts(folder, tmp_path, capsys):
    data = {"data": str(folder / "pairs.jsonl"), "rewards": REWARDS, "output_dir": str(tmp_path / "labelled")}
    assert run("relabel", "--config", write(tmp_path / "relabel.yaml", data)) == 0
    common = {
        "model_name_or_path": str(folder / "base"), "objectives": list(REWARDS), "max_steps": 2, "use_cpu": True,
        "train_data": [{"path": str(tmp_path / "labelled/train.jsonl")}], "target_modules": ["q_proj"], "bf16": False,
        "report_to": "none",
    }  # fmt: skip
    descriptions = {"harmless": "w7 w8", "helpful": "w3"}
    moslora = {"adapter": "moslora", "adapter_kwargs": {"objective_descriptions": descriptions}}
    lora = {"adapter": "lora", "preference_template": "w9 {preference} "}
    for name, changes in (("described", moslora), ("prompted", lora)):
        config = write(tmp_path / f"{name}.yaml", {**common, **changes, "output_dir": str(tmp_path / name)})
        assert run("train", "--config", config) == 0
    found = json.loads((tmp_path / "described/adapter_config.json").read_text())
    assert found["objective_descriptions"] == descriptions
    assert found["objectives"] == list(REWARDS)
    assert PreferenceText.load(tmp_path / "prompted") == PreferenceText(list(REWARDS), "w9 {preference} ")
    methods = [
        {"method": "uniarm", "arm": str(tmp_path / "described")},
        {"method": "parm_prompt", "arm": str(tmp_path / "prompted")},
    ]
    config = evaluation(folder, tmp_path / "results", methods=methods)
    assert run("evaluate", "--config", write(tmp_path / "evaluate.yaml", config)) == 0
    assert "| PARM, α in the prompt | 0.50, 0.50 |" in capsys.readouterr().out


def test_a_plain_lora_of_one_unnamed_file_learns_a_reward(folder, tmp_path, capsys):
    pairs = tmp_path / "ranked.jsonl"
    pairs.write_text("".join(f'{{"prompt": "w{i}", "chosen": " w1", "rejected": " w2"}}\n' for i in range(8)))
    config = {
        "model_name_or_path": str(folder / "base"), "adapter": "lora", "train_data": [str(pairs)],
        "eval_data": [str(pairs)],
        "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(tmp_path / "lora"),
    }  # fmt: skip
    assert run("train", "--config", write(tmp_path / "lora.yaml", config)) == 0
    capsys.readouterr()
    assert "pairs_0" not in (tmp_path / "lora/README.md").read_text()
    assert "eval_reward_gain" in json.loads((tmp_path / "lora/eval_results.json").read_text())


def test_an_evaluation_goes_on_and_refuses_another_configuration(folder, capsys):
    config = write(folder / "again.yaml", evaluation(folder, "again"))
    assert run("evaluate", "--config", config) == 0
    results = folder / "again/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole[: len(whole) // 2])
    assert run("evaluate", "--config", config) == 0
    assert [_without_time(r) for r in read_rows(results)] == [_without_time(json.loads(x)) for x in whole.splitlines()]
    before = (folder / "again/run.yaml").read_bytes()
    capsys.readouterr()
    assert run("evaluate", "--config", config, "--max_new_tokens", 5) == 2
    assert "belongs to another configuration: generation max_new_tokens was 4" in capsys.readouterr().err
    assert (folder / "again/run.yaml").read_bytes() == before
    assert len(read_rows(results)) == whole.count(b"\n")


def _without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_chosen_prompts_do_not_depend_on_their_order(folder):
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "turned.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    chosen = []
    for name, seed in (("pairs", 0), ("turned", 0), ("pairs", 1)):
        output = f"chosen-{name}-{seed}"
        changes = {"prompts_data": {"path": str(folder / f"{name}.jsonl")}, "num_prompts": 3, "seed": seed}
        config = evaluation(folder, output, methods=["base"], max_new_tokens=1, **changes)
        assert run("evaluate", "--config", write(folder / "chosen.yaml", config)) == 0
        chosen.append({row["prompt"] for row in read_rows(folder / output / "results.jsonl")})
    assert chosen[0] == chosen[1] != chosen[2]


def bad(folder, verb, **changes):
    defaults = {
        "evaluate": evaluation(folder, "bad"),
        "relabel": {"data": str(folder / "pairs.jsonl"), "rewards": REWARDS, "output_dir": str(folder / "bad")},
        "generate": {"model_name_or_path": str(folder / "base"), "prompts": ["w1"]},
        "plot": {"results": [str(folder / "nowhere.jsonl")], "output_dir": str(folder / "bad")},
        "export": {"adapter": str(folder / "arm"), "output_dir": str(folder / "bad"), "grid_steps": 1},
        "demo": {"arm": str(folder / "arm")},
        "train": {
            "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "bad"), "use_cpu": True,
            "train_data": [str(folder / "pairs.jsonl")],
        },
    }  # fmt: skip
    given = {**defaults[verb], **changes}
    if "preferences" in changes and "grid_steps" not in changes:
        given.pop("grid_steps", None)
    return [verb, "--config", write(folder / "bad.yaml", given)]


BEYOND = {"helpful": 1.5, "harmless": -0.5}
BAD = [
    ("evaluate", {"preferences": [BEYOND]}, "unless `allow_off_simplex=True` is passed, which extrapolates"),
    (
        "generate",
        {"method": {"method": "parm", "arm": "x"}, "preferences": [BEYOND]},
        "unless `allow_off_simplex=True`",
    ),
    ("export", {"preferences": [BEYOND]}, "unless `allow_off_simplex=True`"),
    (
        "evaluate",
        {"allow_off_simplex": True, "preferences": [BEYOND], "methods": [{"method": "cage", "arm": "x"}]},
        "The method 'CAGE' has no meaning at the weights [1.5, -0.5], which are off the simplex",
    ),
    (
        "evaluate",
        {
            "allow_off_simplex": True,
            "preferences": [BEYOND],
            "methods": [{"method": "mod", "policies": {"helpful": "x"}, "divergence": "alpha"}],
        },
        "The method 'MOD' has no meaning at the weights",
    ),
    ("evaluate", {"methods": [{"method": "cage"}]}, "`cage` needs either `arm`, a preference-aware one, or `arms`"),
    (
        "train",
        {
            "objectives": ["a", "b"],
            "adapter": "moslora",
            "adapter_kwargs": {"objective_descriptions": {"a": "It is a."}},
        },
        "`objective_descriptions` describes ['a'], but the objectives are ['a', 'b']",
    ),
    (
        "train",
        {"objectives": ["a"], "adapter": "moslora", "adapter_kwargs": {"objective_descriptions": {"a": ""}}},
        "The description of the objective 'a' is '', but it must be a text",
    ),
    ("train", {"adapter": "lora", "preference_template": "x"}, "must be a text with {preference} in it"),
    ("evaluate", {"preferences": [[0.5, 0.6]]}, "the weights must sum to 1"),
    ("evaluate", {"preferences": [{"helpful": 0.5, "funny": 0.5}]}, "`preference` names ['funny']"),
    ("evaluate", {"preferences": "uniform"}, "An entry of `preferences` is 'uniform', but it must be a list or a map"),
    ("evaluate", {"preferences": [[1, 0, 0]]}, "`preference`"),
    ("evaluate", {"preferences": ["[1, 0"]}, "`preferences` is '[1, 0', which is no JSON"),
    ("evaluate", {"preferences": [[1, 0]], "grid_steps": 2}, "`preferences` are given, and `grid_steps` too"),
    ("export", {"preferences": [[1, 0]], "grid_steps": 2}, "`preferences` are given, and `grid_steps` too"),
    ("export", {"grid_steps": None}, "`grid_steps`, for a regular grid, or `vertices`, for one LoRA for each"),
    ("evaluate", {"grid_steps": None}, "Give `preferences`, points of the simplex, or `grid_steps`"),
    ("evaluate", {"grid_steps": 0}, "`grid_steps` is 0, but it must be 1 or larger"),
    ("evaluate", {"grid_steps": 2.5}, "`grid_steps` is 2.5, but it must be a whole number"),
    ("evaluate", {"methods": ["palm"]}, "A method is 'palm', but it must be one of"),
    ("evaluate", {"methods": [5]}, "An entry of `methods` is 5, but it must be a text or a mapping"),
    ("evaluate", {"methods": ['{"method": ']}, "`methods` is '{\"method\": ', which is no JSON"),
    ("evaluate", {"methods": []}, "methods must be given"),
    ("evaluate", {"methods": ["base", "base"]}, "Two methods have the same name"),
    ("evaluate", {"rewards": {"helpful": "nosuch:function"}}, "There is no function 'nosuch:function'"),
    ("evaluate", {"rewards": {"helpful": "no/such_model"}}, "There is no reward model to read at 'no/such_model'"),
    ("evaluate", {"rewards": None}, "rewards must be given, in the configuration or as a flag"),
    (
        "evaluate",
        {"rewards": "trl_parm.rewards:brevity"},
        "`rewards` is 'trl_parm.rewards:brevity', but it must be a m",
    ),
    ("evaluate", {"rewards": ["a", "b"]}, "`rewards` is ['a', 'b'], but it must be a mapping"),
    ("evaluate", {"rewards": {"helpful": {"sauce": "x"}}}, "it needs `source`"),
    ("evaluate", {"prompt_column": "question"}, "has no column 'question'; it has prompt, response_0"),
    ("evaluate", {"prompt_column": 1}, "`prompt_column` is 1, but it must be a text"),
    ("evaluate", {"num_prompts": 9}, "`num_prompts` is 9, but there are 8 distinct prompts"),
    ("evaluate", {"num_prompts": 0}, "`num_prompts` is 0, but it must be 1 or larger"),
    ("evaluate", {"prompts": ["w1"]}, "Give either `prompts` or `prompts_data`"),
    ("evaluate", {"metods": ["base"]}, "`metods` is no key of trl-parm evaluate. Did you mean `methods`?"),
    ("evaluate", {"nothing_alike": 1}, "`nothing_alike` is no key of trl-parm evaluate. `trl-parm evaluate --help`"),
    ("evaluate", {"model_name_or_path": "nowhere/nothing"}, "nowhere/nothing"),
    ("evaluate", {"model_name_or_path": None}, "`model_name_or_path` is None, but it must be a text"),
    ("evaluate", {"batch_size": 0}, "`batch_size` is 0, but it must be 1 or larger"),
    ("evaluate", {"batch_size": 2.0}, "`batch_size` is 2.0, but it must be a whole number"),
    ("evaluate", {"batch_size": True}, "`batch_size` is True, but it must be a whole number"),
    ("evaluate", {"batch_size": "many"}, "argument --batch_size/--batch-size: invalid int value: 'many'"),
    ("evaluate", {"batch_size": [2]}, "`batch_size` is [2], but it must be a whole number"),
    ("evaluate", {"batch_size": None}, "`batch_size` is None, but it must be a whole number"),
    ("evaluate", {"dtype": "float31"}, "`dtype` is 'float31', but it must be one of auto, float32"),
    ("evaluate", {"dtype": 32}, "`dtype` is 32, but it must be a text"),
    ("evaluate", {"max_new_tokens": -1}, "`max_new_tokens` is -1, but it must be 1 or larger"),
    ("evaluate", {"max_prompt_length": 0}, "`max_prompt_length` is 0, but it must be 1 or larger"),
    ("evaluate", {"seed": -1}, "`seed` is -1, but it must be from 0 to 4294967295"),
    ("evaluate", {"seed": 1.5}, "`seed` is 1.5, but it must be a whole number"),
    ("evaluate", {"do_sample": "perhaps"}, "argument --do_sample/--do-sample: Truthy value expected: got perhaps"),
    ("evaluate", {"do_sample": 2}, "`do_sample` is 2, but it must be true or false"),
    ("evaluate", {"temperature": float("nan")}, "`temperature` is nan, but it must be a number"),
    ("evaluate", {"temperature": -1}, "`temperature` is -1, but it must be 0 or larger"),
    ("evaluate", {"top_p": 1.5}, "`top_p` is 1.5, but it must be from 0 to 1"),
    ("evaluate", {"top_k": -3}, "`top_k` is -3"),
    ("evaluate", {"template": "no place"}, "The template 'no place' has no {prompt}"),
    ("evaluate", {"template": 7}, "`template` is 7, but it must be a text"),
    ("evaluate", {"output_dir": ""}, "output_dir must be given"),
    ("evaluate", {"output_dir": 3}, "`output_dir` is 3, but it must be a text"),
    ("evaluate", {"model_kwargs": "auto"}, "`model_kwargs` is 'auto', but it must be a mapping"),
    ("evaluate", {"prompts_data": {"path": "nowhere.jsonl"}}, "There is no data at 'nowhere.jsonl'"),
    ("evaluate", {"prompts_data": {"file": "x"}}, "it needs `path`"),
    ("evaluate", {"prompts_data": 5}, "`prompts_data` is 5, but it must be a text or a mapping"),
    ("evaluate", {"rewards": {"helpful": 5}}, "The reward of 'helpful': `source` is 5, but it must be a text"),
    ("evaluate", {"rewards": {5: "trl_parm.rewards:brevity"}}, "`objectives` is [5], but it must be a list of one or"),
    (
        "evaluate",
        {"rewards": {"": "trl_parm.rewards:brevity"}},
        "`objectives` is [''], but it must be a list of one or",
    ),
    (
        "evaluate",
        {"rewards": {"a": {"source": "b:c", "negate": "maybe"}}},
        "`negate` is 'maybe', but it must be true",
    ),
    ("evaluate", {"methods": [{"method": ["parm"]}]}, "A method is ['parm'], but it must be one of base"),
    ("evaluate", {"methods": [{"method": "base", "name": 5}]}, "The `name` of a method is 5, but it must be a text"),
    ("evaluate", {"methods": [{"method": "parm", "arm": 5}]}, "The method 'PARM': `arm` is 5, but it must be a text"),
    (
        "evaluate",
        {"methods": [{"method": "parm", "arm": "x", "beta": True}]},
        "`beta` is True, but it must be a number",
    ),
    ("evaluate", {"methods": [{"method": "genarm", "arms": "x"}]}, "`arms` is 'x', but it must be a mapping"),
    ("evaluate", {"model_kwargs": {"dtype": "float32"}}, "`model_kwargs` has dtype, which is a key of its own"),
    ("evaluate", {"prompts_data": {"path": 5}}, "A data set: `path` is 5, but it must be a text"),
    (
        "train",
        {"train_data": [{"path": "x", "streaming": "yes"}]},
        "A data set: `streaming` is 'yes', but it must",
    ),
    (
        "train",
        {"train_data": [{"path": "x", "columns": ["a"]}]},
        "A data set: `columns` is ['a'], but it must be a",
    ),
    ("relabel", {"data": "nowhere.jsonl"}, "There is no data at 'nowhere.jsonl'"),
    ("relabel", {"data": {"path": "a.jsonl", "streaming": True}}, "has `streaming: true`, but all pairs are read"),
    ("relabel", {"data": ["a", "b"]}, "`data` is ['a', 'b'], but it must be a text or a mapping"),
    ("relabel", {"test_size": 30}, "ask for 30 of 24 pairs"),
    ("relabel", {"test_size": -0.5}, "`test_size` is -0.5, but it must be 0 or larger"),
    ("relabel", {"test_size": "half"}, "argument --test_size/--test-size: invalid float value: 'half'"),
    ("relabel", {"tie_margin": float("inf")}, "`tie_margin` is inf, but it must be a number"),
    ("relabel", {"test_size": 5.5}, "`test_size` is 5.5, but it must be a share below 1, or a whole number of pairs"),
    ("relabel", {"tie_margin": True}, "`tie_margin` is True, but it must be a number"),
    ("relabel", {"template": "x"}, "has no {prompt}"),
    ("relabel", {"batch_size": 0}, "`batch_size` is 0, but it must be 1 or larger"),
    ("generate", {"method": "parm"}, "'PARM' has no arm"),
    ("generate", {"method": ["base"]}, "`method` is ['base'], but it must be a text or a mapping"),
    ("generate", {"method": {"method": "parm", "arm": "x", "beat": 1}}, "has beat. Its settings are arm, beta"),
    ("generate", {"preferences": [{"a": 1.0}]}, "The method 'Base' has no preference. Leave `preferences` out"),
    ("generate", {"preferences": ["[0.5, 0.5]"]}, "each must name its objectives"),
    ("generate", {"prompts": [5]}, "An entry of `prompts` is 5, but it must be a text or a list"),
    (
        "generate",
        {"prompts": [[1, 2]]},
        "row 0 of `prompts` is [1, 2]. Give a text, or a list of messages with `role` and `content`",
    ),
    (
        "generate",
        {"prompts": ['[{"role": "user"}]']},
        "row 0 of `prompts` has the message {'role': 'user'}. Give a text, or a list of mess",
    ),
    ("generate", {"prompts": None}, "Give either `prompts` or `prompts_data`"),
    ("generate", {"preferences": [{"helpful": "much"}]}, "has the weight 'much', but a weight must be a number"),
    ("generate", {"output": 5}, "`output` is 5, but it must be a text"),
    ("plot", {}, "There are no results at"),
    ("plot", {"results": 5}, "An entry of `results` is 5, but it must be a text"),
    ("plot", {"resamples": 0}, "`resamples` is 0, but it must be 1 or larger"),
    ("plot", {"references": ["0, 0"]}, "An entry of `references` is '0, 0', but it must be a list or a mapping"),
    ("plot", {"card": "nowhere"}, "There is no adapter in 'nowhere', whose card could get the figure"),
    ("export", {"adapter": "nowhere"}, "There is no adapter at 'nowhere'"),
    ("export", {"rank": 2}, "the adapter has rank 5 already"),
    ("export", {"rank": 0}, "`rank` is 0, but it must be 1 or larger"),
    ("export", {"vertices": True}, "`vertices` names the preferences already"),
    ("export", {"dtype": "half"}, "`dtype` is 'half', but it must be one of auto"),
    ("demo", {"port": 99999}, "`port` is 99999, but it must be from 0 to 65535"),
    ("demo", {"beta": "[1]"}, "invalid float value: '[1]'"),
    ("demo", {"beta": True}, "`beta` is True, but it must be a number"),
    ("train", {"train_data": [{"path": "nowhere.jsonl"}]}, "There is no data at 'nowhere.jsonl'"),
    ("train", {"train_data": ["nowhere.jsonl"]}, "There is no data at 'nowhere.jsonl'"),
    ("train", {"train_data": [3]}, "An entry of `train_data` is 3, but it must be a text or a mapping"),
    ("train", {"train_data": [{"file": "x"}]}, "it needs `path`"),
    ("train", {"train_data": []}, "train_data must be given"),
    ("train", {"loss_type": "square"}, "must be one of sigmoid, hinge"),
    ("train", {"beta": [1, 2]}, "`beta` is [1, 2], but it must be a number or a mapping"),
    ("train", {"beta": True}, "`beta` is True, but it must be a number or a mapping"),
    ("train", {"beta": "small"}, "`beta` is 'small', but it must be a number or a mapping"),
    ("train", {"beta": 0}, "`beta` is 0, but every β must be positive"),
    ("train", {"beta": {"helpful": True}}, "but every β must be positive"),
    ("train", {"objectives": ["a"], "adapter_kwargs": {"r1": "big"}}, "`adapter_kwargs`: `r1` is 'big', but"),
    (
        "train",
        {"objectives": ["a"], "adapter_kwargs": {"nosuch": 1}},
        "`adapter_kwargs` has nosuch, which PBLoraConfig",
    ),
    (
        "train",
        {"objectives": ["a"], "model_name_or_path": "nowhere"},
        "There is no model to read at 'nowhere'",
    ),
    ("train", {"output_dir": ""}, "output_dir must be given"),
    ("train", {"learning_rate": float("inf")}, "`learning_rate` is inf, but it must be a number"),
    ("train", {"num_train_epochs": -1}, "`num_train_epochs` is -1, but it must be 0 or larger"),
    ("train", {"adapter": "lore"}, "`adapter` is 'lore', but it must be one of pblora"),
    ("train", {"adapter_kwargs": [4]}, "`adapter_kwargs` is [4], but it must be a mapping"),
    ("train", {"objectives": [1, 2]}, "An entry of `objectives` is 1, but it must be a text"),
    ("train", {"label_columns": ["helpful"]}, "`label_columns` is ['helpful'], but it must be a mapping"),
    ("train", {"eval_preferences": [0.5]}, "`"),
    ("train", {"max_length": 0}, "`max_length` is 0, but it must be 1 or larger"),
    ("train", {"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0, but it must be 1 or larger"),
    ("train", {"gradient_accumulation_steps": 1.5}, "`gradient_accumulation_steps` is 1.5, but it must be a whole"),
    ("train", {"learning_rate": "fast"}, "invalid float value: 'fast'"),
    ("train", {"lr_scheduler_kwargs": 3}, "`lr_scheduler_kwargs` is 3, but it must be a text or a mapping"),
    ("train", {"max_step": 3}, "`max_step` is no key of trl-parm train. Did you mean `max_steps`?"),
    ("train", {"resume": "yesterday"}, "argument --resume: Truthy value expected"),
]


@pytest.mark.parametrize(("verb", "changes", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, capfd, verb, changes, message):
    assert main(bad(folder, verb, **changes)) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"trl-parm {verb}: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the verb '' is not known; there are make_pairs, relabel, train"),
        (["plot", "--results", "x", "--output_dir", "y", "z"], "'z' belongs to no key"),
        (["evalute"], "Did you mean 'evaluate'?"),
        (["plot", "--results"], "expected at least one argument (see trl-parm plot --help)"),
        (["plot", "--results", "x", "--output_dir", "y", "--nosuch", "1"], "`nosuch` is no key of trl-parm plot"),
        (["plot", "--config"], "--config names no file"),
        (["plot", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["plot", "--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_2(capfd, words, message):
    assert main(words) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_configuration_with_keys_that_are_lost_is_refused(tmp_path, capfd):
    path = tmp_path / "a.yaml"
    for text, message in (
        ("seed: 1\nseed: 2", "has the key `seed` 2 times. Give it once"),
        ("5: 1", "has the key '5', but a key must be a text"),
        ("? [a]\n: 1", "but a key must be a text"),
        ("", "must contain a YAML mapping"),
        ("a: [", "The configuration file is no YAML"),
    ):
        path.write_text(text)
        assert run("generate", "--config", path) == 2
        assert message in capfd.readouterr().err
    assert run("generate", "--config", path, "--config", path) == 2
    assert "--config stands there twice" in capfd.readouterr().err
    path.write_bytes(b"\xff\xfe")
    assert run("generate", "--config", path) == 2
    assert "The configuration file is no YAML" in capfd.readouterr().err


def test_an_adapter_that_names_no_base_model_is_told_so(tmp_path, folder, capfd):
    """In one line, before anything is said of results or written."""
    tiny_arm(tiny_llama()).save_pretrained(tmp_path / "arm")
    method = {"method": "parm", "arm": str(tmp_path / "arm")}
    given = {
        "generate": {"model_name_or_path": str(folder / "base"), "prompts": ["w1"], "method": method},
        "evaluate": evaluation(folder, methods=["base", method], output_dir=str(tmp_path / "out")),
        "export": {"adapter": str(tmp_path / "arm"), "vertices": True, "output_dir": str(tmp_path / "out")},
    }
    given["generate"]["preferences"] = [{"helpful": 0.5, "harmless": 0.5}]
    for verb, arguments in given.items():
        assert run(verb, "--config", write(tmp_path / "given.yaml", arguments)) == 2
        said = capfd.readouterr()
        assert "results go to" not in said.out + said.err
        assert f"The adapter {str(tmp_path / 'arm')!r} names no base model: " in said.err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_file_is_no_prompt(tmp_path, folder, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1"}\n')
    words = ["generate", "--model_name_or_path", folder / "base", "--max_new_tokens", 1, "--prompts"]
    assert run(*words, "prompts.jsonl") == 2
    assert "'prompts.jsonl' names a file. Give it as `prompts_data`" in capfd.readouterr().err
    assert run(*words, "other.jsonl") == 0


def test_prompts_of_a_file_are_checked(tmp_path, folder, capfd):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": null}\n')
    assert run("generate", "--model_name_or_path", folder / "base", "--prompts_data", path) == 2
    assert (
        "row 1 of the prompts' data is None. Give a text, or a list of messages"
        in capfd.readouterr().err.splitlines()[-1]
    )


def test_plots_of_damaged_results(folder, tmp_path, capfd):
    rows = [
        {"method": "PARM", "preference": [w, 1 - w], "label": "x", "prompt": f"p{i}", "a": w, "b": -w, "tokens": 1,
         "seconds": 1.0, "extra_parameters": 0, "extra_bytes": 0}
        for w in (0.0, 1.0) for i in range(3)
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["plot", "--results", str(path), "--output_dir", str(tmp_path / "figures"), "--resamples", "5"]
    assert main(words) == 2
    assert "results.config.json is missing, which names the objectives" in capfd.readouterr().err
    words += ["--objectives", "a", "b"]
    assert main([*words, "--references", "[1, 2, 3]"]) == 2
    assert "has 3 numbers, but there are 2 objectives" in capfd.readouterr().err
    assert main([*words, "--methods", "MOD"]) == 2
    assert "no method 'MOD'; they have PARM" in capfd.readouterr().err
    assert not (tmp_path / "figures").exists()
    path.write_text(path.read_text() + '{"method": "PARM", "pref')
    capfd.readouterr()
    assert main([*words, "--references", "[9, 9]"]) == 0
    assert capfd.readouterr().err.count("hypervolume is 0") == 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert main(words) == 2
    assert "differ in 1 prompts" in capfd.readouterr().err


def write_results(folder, method="PARM", shift=0.0, objectives=("a", "b"), name="results.jsonl"):
    """A file as `evaluate` writes it, of one method on three prompts at four preferences, and of the base."""
    weights = [None, *([w, 1 - w] for w in (0.0, 0.25, 0.75, 1.0))]
    rows = [
        {"method": "Base" if w is None else method, "preference": w, "label": str(w), "prompt": f"p{i}",
         objectives[0]: (w or [0.5])[0] + shift + i, objectives[1]: (w or [0.5, 0.5])[1] - i, "tokens": 1,
         "seconds": 1.0, "extra_parameters": 0, "extra_bytes": 0, "response": ""}
        for w in weights for i in range(3)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name).with_suffix(".config.json").write_text(json.dumps({"objectives": list(objectives)}))
    return folder / name


def table(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_runs_of_one_name_in_several_files_are_kept_apart(tmp_path, capfd):
    one, two = write_results(tmp_path / "one"), write_results(tmp_path / "two", shift=10.0)
    other = write_results(tmp_path / "other", "GenARM", shift=5.0)
    figures = tmp_path / "figures"
    plot = ("plot", "--resamples", 5, "--output_dir", figures, "--results")
    assert run(*plot, one, two, other) == 0
    means = {(row["method"], row["α a"]): float(row["a"]) for row in table(figures / "fronts.csv")}
    assert {method for method, _ in means} == {
        "PARM (one)", "PARM (two)", "GenARM", "Base (one)", "Base (two)", "Base (other)",
    }  # fmt: skip
    assert (means["PARM (one)", "1.0"], means["PARM (two)", "1.0"], means["GenARM", "1.0"]) == (2, 12, 7)
    assert {row["minus"] for row in table(figures / "differences.csv")} == {"PARM (one)"}
    assert {row["relative_to_base"] for row in table(figures / "costs.csv")} == {"1.0"}
    assert run(*plot, one, two, other, "--methods", "PARM (two)", "GenARM", "--against", "PARM") == 2
    assert "`against` is 'PARM (one)'" in capfd.readouterr().err
    assert run(*plot, one, two, "--methods", "PARM", "--against", "PARM (two)") == 0
    assert {row["method"] for row in table(figures / "fronts.csv")} == {"PARM (one)", "PARM (two)"}
    assert {row["minus"] for row in table(figures / "differences.csv")} == {"PARM (two)"}


def test_runs_of_several_training_seeds_are_one_method(tmp_path, capfd):
    files = [write_results(tmp_path / f"seed-{i}", shift=shift) for i, shift in enumerate((0.0, 0.4, 0.5))]
    figures = tmp_path / "figures"
    plot = ("plot", "--resamples", 5, "--output_dir", figures, "--references", "[-1, -4]", "--results")
    assert run(*plot, *files, "--seeds", "true") == 0
    text = capfd.readouterr().out
    assert "Measures with 95 % bootstrap intervals over prompts and training seeds" in text
    assert "of one training each" not in text
    found = {(row["method"], row["measure"], row["reference"]): row for row in table(figures / "measures.csv")}
    assert {method for method, *_ in found} == {"PARM", "Base"}
    row = found["PARM", "mean inner product", "-"]
    assert (row["seeds"], row["prompts"]) == ("3", "3")
    # α · (α_a + shift + 1, α_b − 1), the mean over α and shifts
    expected = [sum(w * (w + s + 1) + (1 - w) * (-w) for w in (0, 0.25, 0.75, 1)) / 4 for s in (0, 0.4, 0.5)]
    assert float(row["value"]) == pytest.approx(sum(expected) / 3)
    standard = {reference for _, measure, reference in found if measure == "hypervolume, standardised"}
    assert standard == {"a -1, b -1", "a 0, b 0"}
    assert found["PARM", "spread of a", "vertices"]["value"] == "1.0"
    assert run(*plot, files[0]) == 0
    assert "Intervals are of one training each: they lack what another seed" in capfd.readouterr().out
    other = (
        write_results(tmp_path / "seed-2" / "more", "GenARM"),
        write_results(tmp_path / "seed-1" / "more", "GenARM"),
    )
    assert run(*plot, *files, *other, "--seeds", "true", "--methods", "PARM", "GenARM") == 2
    assert "different numbers of training seeds: 'PARM' has 3, 'GenARM' has 2" in capfd.readouterr().err


def test_figures_have_the_intervals_that_are_asked_for(tmp_path):
    path = write_results(tmp_path / "results")
    words = ("plot", "--output_dir", tmp_path / "figures", "--results", path, "--resamples", 7, "--seed", 3)
    assert run(*words) == 0
    lows = [float(row["a_low"]) for row in table(tmp_path / "figures/fronts.csv")]
    expected = summarize(read_rows(path), ["a", "b"], 7, 3)
    assert lows == pytest.approx([row["a_low"] for row in expected])
    assert lows != pytest.approx([row["a_low"] for row in summarize(read_rows(path), ["a", "b"])])


def test_what_an_earlier_plot_wrote_and_this_one_does_not_goes(tmp_path, capfd):
    """But not what anybody has changed; a plot that is refused leaves all as it was."""
    three, two = write_results(tmp_path / "three", objectives=("a", "b")), write_results(tmp_path / "two")
    rows = [json.loads(line) | {"c": 1.0, "response": "x"} for line in three.read_text().splitlines()]
    for row in rows:
        row["preference"] = row["preference"] and [*row["preference"], 0.0]
    three.write_text("".join(json.dumps(row) + "\n" for row in rows))
    three.with_suffix(".config.json").write_text(json.dumps({"objectives": ["a", "b", "c"]}))
    figures = tmp_path / "figures"
    plot = ("plot", "--resamples", 5, "--output_dir", figures, "--results")
    assert run(*plot, three, "--html", "true") == 0
    first = {path.name for path in figures.iterdir()}
    assert {"differences.csv", "correlations.csv", "fronts.html", "fronts_3d.png"} <= first
    (figures / "fronts_pairs.svg").write_text("mine")
    assert run(*plot, three, "--objectives", "a") == 2
    assert "a front needs two or more" in capfd.readouterr().err
    assert {path.name for path in figures.iterdir()} == first
    assert run(*plot, two, "--methods", "Base") == 0
    assert {path.name for path in figures.iterdir()} == {
        "measures.md", "measures.csv", "costs.csv", "answers.csv", "fronts.png", "fronts.svg", "fronts.csv",
        "fronts_pairs.svg", "run.yaml", NOTES,
    }  # fmt: skip


def test_a_reward_without_a_scale_leaves_the_raw_measures(tmp_path, capfd):
    path = write_results(tmp_path / "results")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | ({"a": 1.0} if row["method"] == "Base" else {})) + "\n" for row in rows))
    assert run("plot", "--resamples", 5, "--output_dir", tmp_path / "figures", "--results", path) == 0
    text = capfd.readouterr().out
    assert "No measures of standardised rewards: The reward 'a' is the same for all answers of 'Base'" in text
    assert "mean inner product" in text
    assert not any("standardised" in row["measure"] for row in table(tmp_path / "figures/measures.csv"))


def test_preferences_follow_the_order_of_the_objectives(tmp_path):
    """Whatever their order is in a file, or on the command line."""
    one = write_results(tmp_path, name="one.jsonl")
    two = write_results(tmp_path, name="two.jsonl", objectives=("b", "a"))
    figures = tmp_path / "figures"
    for words in (("--results", one, two), ("--results", one, two, "--objectives", "b", "a")):
        assert run("plot", "--resamples", 5, "--output_dir", figures, *words) == 0
        rows = [row for row in table(figures / "fronts.csv") if row["α a"]]
        assert {row["method"] for row in rows} == {"PARM (one.jsonl)", "PARM (two.jsonl)"}
        assert all(
            float(row["α a"]) == pytest.approx(float(row["a"]) % 1, abs=1e-9) or row["α a"] == "1.0" for row in rows
        )
        assert {float(row[name]) for row in table(figures / "correlations.csv") for name in "ab"} == {1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["one", "one"], "A file is twice among the results"),
        (["one", "far"], "has the objectives ['a', 'c'], but"),
        (["one", "two", "called"], "Two methods would be called 'PARM (one)'"),
    ],
)
def test_files_that_can_not_be_plotted_together(tmp_path, capfd, files, message):
    write_results(tmp_path / "one")
    write_results(tmp_path / "two")
    write_results(tmp_path / "called", "PARM (one)")
    write_results(tmp_path / "far", "other", objectives=("a", "c"))
    results = [tmp_path / name / "results.jsonl" for name in files]
    assert run("plot", "--output_dir", tmp_path / "figures", "--results", *results) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_numbers_of_other_rewards_are_not_put_together(tmp_path, capfd):
    """And what texts were decoded with is told where it differs. A file alone is taken as it is."""
    files = [write_results(tmp_path / name) for name in ("one", "two")]

    def configure(path, template, negate=False, **change):
        reward = {"source": str(path), "fingerprint": "1", "negate": negate}
        known = {"objectives": ["a", "b"], "rewards": {"a": reward, "b": None}, "template": template, **change}
        path.with_suffix(".config.json").write_text(json.dumps(known))

    plot = ("plot", "--resamples", 5, "--output_dir", tmp_path / "figures", "--results", *files)
    compare = ("compare", "--resamples", 5, "--output_dir", tmp_path / "comparison", "--results", *files)
    configure(files[0], None)
    configure(files[1], None, negate=True)
    for words in (plot, compare):
        assert run(*words) == 2
        told = capfd.readouterr().err
        assert f"from {files[0]} to {files[1]} a negate was False, but is True. Score them alike" in told
        assert not words[4].exists()
    configure(files[1], "{prompt}", sampling={"top_k": 9})
    for words in (plot, compare):
        assert run(*words) == 0
        assert f"from {files[0]} to {files[1]} template was None, but is {{prompt}}" in capfd.readouterr().out
    assert run(*plot, "--seeds", "true") == 2
    assert "With `seeds` all texts must be decoded alike: from" in capfd.readouterr().err
    penalty = {"generation_config": {"repetition_penalty": 1.3}}
    for change in (penalty, {"end_tokens": [1, 7]}, {"max_prompt_length": 4}):
        configure(files[0], None, **dict.fromkeys(change))
        configure(files[1], None, **change)
        assert run(*compare) == 0
        assert f"from {files[0]} to {files[1]} {next(iter(change))} was None, but is" in capfd.readouterr().out
    files[1].with_suffix(".config.json").unlink()
    assert run(*plot, "--objectives", "a", "b") == 0


def test_a_table_in_which_files_were_put_together_by_hand_is_refused(tmp_path, capfd):
    path = write_results(tmp_path)
    path.write_text(path.read_text() * 2)
    assert run("plot", "--output_dir", tmp_path / "figures", "--results", path) == 2
    assert "The table has 'Base' at no preference twice for the prompt" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["measures.md", "costs.csv", "correlations.csv", "fronts.png", "fronts.csv"])
def test_a_plot_refuses_a_file_of_anybody_else_before_it_writes(tmp_path, capfd, name):
    path = write_results(tmp_path / "results")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / name).write_text("mine")
    assert run("plot", "--output_dir", tmp_path / "figures", "--results", path) == 2
    assert f"{name} was not written by 'plot'" in capfd.readouterr().err
    assert [(path.name, path.read_text()) for path in (tmp_path / "figures").iterdir()] == [(name, "mine")]


def test_figures_are_not_called_like_tables(tmp_path, capfd):
    path = write_results(tmp_path / "results")
    for name, message in (("Measures", "is the name of a table"), ("../up", "without any folder")):
        assert run("plot", "--output_dir", tmp_path / "figures", "--results", path, "--name", name) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_a_run_file_never_takes_the_place_of_another(tmp_path):
    """A plot beside its results, and a configuration of the user's that is called as ours."""
    path = write_results(tmp_path / "results")
    write_run(tmp_path / "results/run.yaml", "evaluate", {"seed": 1})
    plot = ("plot", "--resamples", 5, "--results", path, "--output_dir")
    for _ in range(2):
        assert run(*plot, tmp_path / "results") == 0
    assert yaml.safe_load((tmp_path / "results/run.yaml").read_text())["verb"] == "evaluate"
    assert yaml.safe_load((tmp_path / "results/run.plot.yaml").read_text())["verb"] == "plot"
    assert not list(tmp_path.glob("results/run.*.plot.yaml"))
    (tmp_path / "mine").mkdir()
    config = write(tmp_path / "mine/run.yaml", {"resamples": 7})
    assert run(*plot, tmp_path / "mine", "--config", config) == 0
    assert yaml.safe_load(Path(config).read_text()) == {"resamples": 7}
    (tmp_path / "mine/run.plot.yaml").write_text("mine")
    with pytest.raises(ValueError, match="run.plot.yaml was not written by 'trl-parm plot'"):
        write_run(tmp_path / "mine/run.yaml", "plot", {})


def test_an_export_beside_the_adapter_leaves_it_as_it_is(tmp_path, folder, capsys):
    shutil.copytree(folder / "arm", tmp_path / "arm")
    write_run(tmp_path / "arm/run.yaml", "train", {"seed": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "arm").iterdir() if path.name != NOTES}
    for _ in range(2):
        export = ("export", "--adapter", tmp_path / "arm", "--output_dir", tmp_path / "arm", "--grid_steps", 1)
        assert run(*export) == 0
    added = {path.name for path in (tmp_path / "arm").iterdir()} - set(before)
    assert added == {"helpful", "harmless", "run.export.yaml", NOTES}
    assert {name: (tmp_path / "arm" / name).read_bytes() for name in before} == before
    (tmp_path / "arm/helpful/notes.txt").write_text("mine")
    assert run(*export) == 2
    assert "holds notes.txt, which was not written by 'save_as_lora'" in capsys.readouterr().err
    assert (tmp_path / "arm/helpful/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["arm", "base", "checkpoints"])
def test_a_training_does_not_begin_where_a_model_of_somebody_is(tmp_path, folder, capsys, name):
    output = tmp_path / "output"
    if name == "checkpoints":
        (output / "checkpoint-5").mkdir(parents=True)
        (output / "checkpoint-5/mine.txt").write_text("mine")
    else:
        shutil.copytree(folder / name, output)
    (output / "run.yaml").write_text("mine: 1")
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    words = ("--model_name_or_path", folder / "base", "--use_cpu", "true", "--bf16", "false")
    assert run("train", *words, "--output_dir", output) == 2
    assert re.search("was not written by 'train'.* Nothing is replaced", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_help_imports_neither_torch_nor_transformers():
    """So it answers at once. Each verb's help names its keys."""
    code = (
        "import sys; from trl_parm.cli.main import VERBS, main\n"
        "for words in ([], ['--help'], *([verb, '--help'] for verb in VERBS)):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print('imported:', sorted({'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported: []"
    keys = (
        "--num_prompts",
        "--tie_margin",
        "--against",
        "--grid_steps",
        "preference_per",
        "adapter_kwargs",
        "objective",
    )
    for text in (*VERBS, *keys):
        assert text in result.stdout


def test_the_demo_gets_its_arguments(folder, monkeypatch, capfd):
    from trl_parm.demo import command

    seen = []
    monkeypatch.setattr(command, "serve", seen.append)
    config = write(folder / "demo.yaml", {"arm": "arm", "share": True, "port": 7000})
    assert run("demo", "--config", config, "--beta", 0.5) == 0
    assert command.main(["--arm", "arm", "--share", "--port", "7000", "--beta", "0.5"]) == 0
    assert seen == [command.DemoArguments("arm", beta=0.5, port=7000, share=True)] * 2
    assert run("demo") == 2
    assert "trl-parm demo: error: arm must be given" in capfd.readouterr().err


def test_the_module_is_the_command():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == f"trl-parm = {main.__module__}:{main.__name__}"
    result = subprocess.run(
        [sys.executable, "-m", "trl_parm", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout[:9]) == (0, "trl-parm ")


@pytest.mark.slow
def test_a_process_of_its_own_says_nothing_but_its_line(folder):
    words = bad(folder, "export", rank=2)
    result = subprocess.run([sys.executable, "-m", "trl_parm", *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert (
        result.stderr
        == "trl-parm export: error: `rank` is 2, but the adapter has rank 5 already. Give a larger one.\n"
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(folder):
    """SIGKILL in the middle: no row is lost, none is there twice, and the texts are those of a whole run."""
    prompts = [f"w{i} w{j}" for i in range(12) for j in range(5)]
    changes = {"prompts_data": None, "num_prompts": None, "prompts": prompts, "max_new_tokens": 16}
    environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def command(output):
        config = write(folder / f"{output}.yaml", evaluation(folder, output, **changes))
        return [sys.executable, "-m", "trl_parm", "evaluate", "--config", config]

    results = folder / "killed/results.jsonl"
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if (results.exists() and results.read_bytes().count(b"\n") > 30) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = results.read_bytes()
    for output in ("killed", "whole"):
        finished = subprocess.run(command(output), env=environment, capture_output=True, text=True, timeout=600)
        assert finished.returncode == 0, finished.stderr
    assert results.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    found = [
        [_without_time(row) for row in read_rows(folder / name / "results.jsonl")] for name in ("killed", "whole")
    ]
    assert found[0] == found[1]


CONFIGS = sorted((Path(__file__).parents[1] / "examples/configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_are_what_their_verbs_take(path, monkeypatch):
    """Keys, methods and their settings, rewards, reference points and adapters; nothing is loaded."""
    monkeypatch.setattr("trl_parm.evaluation.models.read_config", lambda name, what: None)  # models of the Hub
    verb = path.stem.split("_")[0]
    words = ["--config", str(path)]
    if verb == "relabel":
        arguments = parse(verb, RelabelArguments, words)
        load_rewards(arguments.rewards)
    elif verb == "evaluate":
        arguments = parse(verb, EvaluateArguments, words)
        objectives = list(load_rewards(arguments.rewards))
        points = grid(arguments.preferences, arguments.grid_steps, objectives, arguments.allow_off_simplex)
        assert len(points) in (3, 5, 11, 13)
        names = [Entry.of(method).name for method in arguments.methods]
        assert len(set(names)) == len(names)
    elif verb == "plot":
        points = parse(verb, PlotArguments, words).references
        assert all(isinstance(value, int | float) for point in points for value in point.values())
    elif verb == "export":
        assert parse(verb, ExportArguments, words).grid_steps
    elif verb == "dpo":
        classes = (ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig)
        given = TrlParser(classes).parse_args_and_config([*words, "--use_cpu", "true"])
        assert given[1].beta == 0.1
    else:
        arguments, config = parse("train", (ARMArguments, PreferenceARMConfig), [*words, "--use_cpu", "true"])
        adapter = arguments.peft_config(config.label_columns)
        conditioned = config.preference_template is None  # by the adapter
        assert getattr(adapter, "objectives", None) == (arguments.objectives if conditioned else None)
        assert arguments.resume


def test_reward_models_of_conversations_read_the_format_of_hh():
    """transformers drops the newline that follows a block of Jinja, so that it belongs into an expression."""
    rewards = [yaml.safe_load(path.read_text()).get("rewards", {}).values() for path in CONFIGS]
    templates = [r["chat_template"] for found in rewards for r in found if "chat_template" in r]
    assert len(templates) == 6
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for template in templates:
        (rendered,), _ = render_jinja_template([chat], chat_template=template)
        assert rendered == "\n\nHuman: w1\n\nAssistant: w2"
