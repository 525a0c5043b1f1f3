# SPDX-License-Identifier: Apache-2.0
"""The configurations of the small comparison, run on a tiny model: from pairs to answers of every method."""

from pathlib import Path

import pytest
import torch
import yaml
from doc_blocks import MODEL, OBJECTIVES, make_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_parm.cli.main import main
from trl_parm.evaluation.methods import METHODS
from trl_parm.records import read_rows


SMALL = Path(__file__).parents[1] / "examples/configs/small"
TRAINED = ("parm", "parm_prompt", "svd_lora", "uniarm", "uniarm_descriptions", "genarm_positive", "genarm_concise")
EVALUATED = (
    "evaluate", "evaluate_validation", "evaluate_field", "evaluate_beyond", "evaluate_cage", "evaluate_transfer_q",
)  # fmt: skip
ELSEWHERE = {"mod_w2s", "arm_alone", "parm_shuffled"}
"""Methods without a configuration here: one needs a small and a large model, two are controls."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the comparison trains, two steps each; the policies, which TRL's DPO tunes, are random."""
    folder = make_folder(tmp_path_factory.mktemp("small"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sizes = ["--validation_size", "4", "--test_size", "2"]
        assert main(["relabel", "--config", str(SMALL / "relabel.yaml"), *sizes]) == 0
        for name in TRAINED:
            assert main(["train", "--config", str(SMALL / f"{name}.yaml"), "--max_steps", "2"]) == 0
        for seed, objective in enumerate(OBJECTIVES):
            torch.manual_seed(seed)
            lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            policy = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), lora)
            policy.save_pretrained(f"runs/small/dpo_{objective}")
    return folder


@pytest.mark.parametrize("name", EVALUATED)
def test_a_configuration_runs(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    config = SMALL / f"{name}.yaml"
    assert main(["evaluate", "--config", str(config), "--num_prompts", "2", "--max_new_tokens", "2"]) == 0
    given = yaml.safe_load(config.read_text())
    methods = [entry if isinstance(entry, str) else entry["method"] for entry in given["methods"]]
    points = len(given.get("preferences", [])) or given["grid_steps"] + 1
    rows = read_rows(Path(given["output_dir"]) / "results.jsonl")
    assert len(rows) == sum(2 * (1 if METHODS[method].control else points) for method in methods)


def test_every_method_has_a_configuration():
    given = [yaml.safe_load((SMALL / f"{name}.yaml").read_text())["methods"] for name in EVALUATED]
    found = {entry if isinstance(entry, str) else entry["method"] for methods in given for entry in methods}
    assert found == set(METHODS) - ELSEWHERE
