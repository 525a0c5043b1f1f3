# SPDX-License-Identifier: Apache-2.0
"""Short runs of the trainer on tiny models, for the tests of training."""

from pathlib import Path

import torch
import yaml
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset
from pair_data import OBJECTIVES, labelled, pairs
from peft import LoraConfig

from peft_pblora import PBLoraConfig
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer


PBLORA = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def config(folder, **changes) -> PreferenceARMConfig:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "beta": 0.1, "logging_steps": 1,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    return PreferenceARMConfig(str(folder), **{**settings, **changes})


def two_sets(n: int = 6, m: int = 4) -> dict[str, Dataset]:
    return {"helpful": pairs(n), "harmless": pairs(m, 9)}


def trainer(folder, tokenizer, model=None, data=None, evaluation=None, peft_config=PBLORA, callbacks=None, **changes):
    return PreferenceARMTrainer(
        tiny_llama() if model is None else model,
        config(folder, **changes),
        train_dataset=two_sets() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def trained(folder, tokenizer, **changes) -> tuple[list[float], list[torch.Tensor]]:
    """The logged losses and the trained weights of a run."""
    run = trainer(folder, tokenizer, **changes)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in run.model.parameters() if p.requires_grad]


def without_ranks(data: dict[str, Dataset]) -> dict[str, Dataset]:
    return {name: rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}) for name, rows in data.items()}


def write_run(folder: Path) -> None:
    """A model, labelled and ranked pairs, and `config.yaml` for the training script."""
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    labelled(21, helpful=lambda i: [0, None, 1, -1][i % 4]).to_json(folder / "judged.jsonl")
    pairs(12, 9).to_json(folder / "harmless.jsonl")
    config = {
        "model_name_or_path": "base",
        "objectives": ["helpful", "harmless"],
        "target_modules": ["q_proj", "v_proj"],
        "train_data": [{"path": "judged.jsonl"}, {"objective": "harmless", "path": "harmless.jsonl"}],
        "eval_data": [{"path": "judged.jsonl", "split": "train[:7]"}],
        "beta": {"helpful": 0.1, "harmless": 0.3}, "preference_per": "pair", "max_steps": 4, "logging_steps": 1,
        "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no", "bf16": False, "use_cpu": True,
        "gradient_accumulation_steps": 2, "report_to": "none", "output_dir": "one", "per_device_train_batch_size": 4,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
