# SPDX-License-Identifier: Apache-2.0
"""A base model with all adapters that methods on vLLM have, and tables of them that are compared row by row."""

import math
from pathlib import Path

import torch
from conftest import OBJECTIVES, tiny_arm, tiny_llama, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from peft_pblora import save_as_lora
from trl_parm.evaluation.fronts import row_cell
from trl_parm.rewards import brevity, conciseness


SHAPE = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 256}
"""The CPU back end of vLLM has kernels for it."""
REWARDS = {"helpful": brevity, "harmless": conciseness}
PROMPTS = ["w1 w2", "w4 w5 w6", "w7", "w8 w9 w10 w11 w12"]
GRID = [[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]]
LORAS = {"helpful": "lora_one", "harmless": "lora_two"}
METHODS = [
    "base",
    {"method": "parm", "arm": "arm", "beta": 0.5},
    {"method": "genarm", "arms": LORAS, "beta": 0.5},
    {"method": "parm_shuffled", "arm": "arm"},
    {"method": "untrained_arm", "arm": "arm", "beta": 2.0},
    {"method": "arm_alone", "arm": "arm"},
    {"method": "mod", "policies": LORAS},
    {"method": "mod", "name": "MOD with the base", "policies": {"helpful": "base", "harmless": "exported"}},
    {"method": "mod_w2s", "policies": LORAS, "reference": "base"},
    {"method": "rewarded_soups", "policies": LORAS},
]
"""The first three are the ones that matter most."""


def write_models(folder: Path, **changes) -> None:
    tiny_llama(0, **changes).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    arm = tiny_arm(tiny_llama(0, **changes))
    arm.peft_config["default"].base_model_name_or_path = str(folder / "base")
    arm.save_pretrained(folder / "arm")
    save_as_lora(arm, folder / "exported", [0.4, 0.6])
    for seed, name in enumerate(LORAS.values(), 2):
        config = LoraConfig(r=3 + seed, target_modules=["q_proj", "v_proj"], use_rslora=seed == 3)
        lora = get_peft_model(tiny_llama(0, **changes), config)
        torch.manual_seed(seed)
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
        lora.save_pretrained(folder / name)
    assert list(REWARDS) == OBJECTIVES


def same_rows(found, expected) -> list[bool]:
    """Whether each row is that of another engine: its text and all that follows from it, and its log-probabilities but
    for rounding."""
    close = ("log_prob_base", "log_ratio")
    found, expected = ({row_cell(row): row for row in rows} for rows in (found, expected))
    assert found.keys() == expected.keys()
    return [
        all(
            math.isclose(row[name], other[name], rel_tol=1e-4, abs_tol=1e-3) if name in close else value == other[name]
            for name, value in row.items()
            if name != "seconds"
        )
        for row, other in ((found[cell], expected[cell]) for cell in found)
    ]
