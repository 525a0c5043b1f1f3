# SPDX-License-Identifier: Apache-2.0
"""What the papers' experiments need: the page has what the script prints, which has the sizes of the models."""

import re
from pathlib import Path
from types import SimpleNamespace

import papers_cost
import pytest
import torch
from papers_cost import CONFIGS, EXPERIMENTS, MODELS, Config, command, configs, need, runs_of, tables
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
)

from peft_pblora import preference_grid
from trl_parm.evaluation.methods import Entry
from trl_parm.evaluation.table import Table


PAGE = (Path(__file__).parents[1] / "docs/reproduce.md").read_text(encoding="utf-8")
EVALUATED = [Config(experiment, "evaluate") for experiment in EXPERIMENTS]


def test_the_page_has_what_the_script_prints(capsys):
    papers_cost.main()
    assert capsys.readouterr().out.strip() == "\n\n".join(tables())
    assert len(tables()) == 3
    for table in tables():
        assert f"\n{table}\n" in PAGE


def test_the_page_has_the_command_of_every_file_in_order():
    block = next(block for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if "# tulu" in block)
    given = [line for line in block.splitlines() if not line.startswith("#")]
    assert given == [command(config) for experiment in EXPERIMENTS for config in configs(experiment)]
    files = {path for experiment in EXPERIMENTS for path in (CONFIGS / experiment).glob("*.yaml")}
    assert files == {config.path for experiment in EXPERIMENTS for config in configs(experiment)}


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", AutoModelForCausalLM, LlamaConfig(
            vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4)),
        ("PKU-Alignment/alpaca-7b-reproduced", AutoModelForCausalLM, LlamaConfig(vocab_size=32_001)),
        ("Ray2333/gpt2-large-helpful-reward_model", AutoModelForSequenceClassification, GPT2Config(
            n_embd=1280, n_layer=36, n_head=20)),
        ("mohameddhiab/humor-no-humor", AutoModelForSequenceClassification, DistilBertConfig()),
    ],
)  # fmt: skip
def test_parameters_are_counted_as_transformers_has_them(name, kind, config):
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    assert MODELS[name].parameters == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(("file", "millions"), [("assistant/parm", 1.53), ("tulu/parm", 6.30)])
def test_adapters_have_the_sizes_of_the_papers(file, millions):
    assert papers_cost.trainable(Config(*file.split("/"))) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("config", EVALUATED, ids=lambda config: config.experiment)
def test_preferences_are_decoded_in_the_groups_of_the_evaluation(config):
    given = config.given
    rewards = list(given["rewards"])
    grid = given.get("preferences") or preference_grid(rewards, given["grid_steps"]).tolist()
    answering = SimpleNamespace(objectives=rewards, configuration={}, check_lengths=lambda *_: None)
    for entry in given["methods"]:
        runs = Entry.of(entry).runs(grid)
        table = Table(answering, runs, ["prompt"], given["batch_size"])
        assert [len(group) for group in table._together(runs)] == [n for n, _ in runs_of(entry, grid, config)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_but_the_65b_model_fit_one_gpu(experiment):
    assert max(need(config).gpus for config in configs(experiment)) == (2 if experiment == "safety_65b" else 1)
