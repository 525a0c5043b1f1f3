# SPDX-License-Identifier: Apache-2.0
"""Trains what a method needs, in this process: ARMs, and policies by DPO."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig, from_loras
from peft_pblora.output import output_file
from peft_pblora.switch import AdapterSwitch
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.cpu import optimize_loaded
from trl_parm.training.log_probs import Responses

from .task import ONE_EACH, Task, as_json


TARGETS = ["q_proj", "k_proj", "v_proj"]
FURTHER_KINDS = ("uniarm_descriptions", "parm_prompt")
"""What the rest of the field is trained by, with one adapter for all preferences."""
TEMPLATE = "[{preference}]\n"
"""How `parm_prompt` reads α: our wording."""
FACTS = "trained.json"


@dataclass(frozen=True)
class Training:
    """One training of a kind: of all its adapters, on `steps` steps of pairs in all.

    Attributes:
        task ([`Task`]): What it is trained on.
        kind (`str`): One of [`task.KINDS`] or [`FURTHER_KINDS`].
        steps (`int`): Of `task.batch` pairs, of which an adapter for one objective gets its share.
        seed (`int`): Of the adapter, the pairs and their order.
        scale (`float`): How many times its usual `lora_alpha` an adapter has.
        rate (`float`): The learning rate.
        folder (`Path`): Where its adapters go.
        held_out (`int`): Held-out pairs that the adapters are measured on.
    """

    task: Task
    kind: str
    steps: int
    seed: int
    scale: float
    rate: float
    folder: Path
    held_out: int

    @property
    def parts(self) -> list[str]:
        """The objectives that have an adapter of their own; one part without a name for one adapter."""
        return self.task.objectives if self.kind in ONE_EACH else [""]

    def adapter(self, objective: str = "") -> str:
        """The folder of an adapter."""
        return str(self.folder / (f"{self.kind}_{objective}" if objective else self.kind))

    def adapters(self) -> dict[str, str]:
        """The folders by objective, of a kind that has one for each."""
        return {objective: self.adapter(objective) for objective in self.parts}

    def run(self) -> dict[str, Any]:
        """Trains what is not there yet, and gives `losses` on held-out pairs by objective, `metrics` and `seconds`."""
        found: dict[str, Any] = {"kind": self.kind, "scale": self.scale, "rate": self.rate}
        found |= {"losses": {}, "metrics": {}, "seconds": 0.0}
        share = self.steps // len(self.parts)
        pairs = self.task.drawn(share * len(self.parts), self.seed)
        for number, objective in enumerate(self.parts):
            size = share * self.task.batch
            facts = self._part(objective, share, pairs[number * size : (number + 1) * size])
            found["losses"] |= facts["losses"]
            found["metrics"] |= facts["metrics"]
            found["seconds"] += facts["seconds"]
        return found

    def _part(self, objective: str, steps: int, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        facts = Path(self.adapter(objective), FACTS)
        own = {
            "steps": steps, "seed": self.seed, "scale": self.scale, "rate": self.rate,
            "pairs": self.task.fingerprint(), "model": self.task.model,
        }  # fmt: skip
        if facts.exists():
            found = json.loads(facts.read_text(encoding="utf-8"))
            if found.pop("of", None) != own:
                raise ValueError(f"{facts.parent} is of another training. Move it away, or name another `--work`.")
            return found
        start = time.process_time()
        losses, metrics = self._train(objective, steps, pairs)
        found = {"losses": losses, "metrics": metrics, "seconds": time.process_time() - start}
        with output_file(facts, "reproduce_small.py") as file:
            file.write(as_json({"of": own, **found}))
        return found

    def _train(self, objective: str, steps: int, pairs: list[dict[str, Any]]) -> tuple[dict, dict]:
        objectives = [objective] if objective else self.task.objectives
        config = PreferenceARMConfig(
            **self._arguments(objective, steps),
            beta=self.task.policy_beta if self.kind == "dpo" else self.task.reward_beta,
            global_weight=1.0 if self.kind.startswith("uniarm") else 0.0,
            preference_template=TEMPLATE if self.kind == "parm_prompt" else None,
            label_columns={name: name for name in objectives},
            share_prompt=True,
            eval_preferences=torch.eye(len(objectives)).tolist(),
            card_prompt=None,
        )
        trainer = PreferenceARMTrainer(
            self._backbone(),
            config,
            train_dataset=Dataset.from_list(with_labels(pairs, objectives)),
            eval_dataset=Dataset.from_list(with_labels(self.task.held_out(self.held_out), objectives)),
            processing_class=AutoTokenizer.from_pretrained(self.task.model),
            peft_config=self._config(objectives),
        )
        if self.kind == "dpo":
            trainer.responses = AboveReference(trainer.model, config)
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        kept = {name.removeprefix("eval_"): value for name, value in metrics.items() if is_telling(name)}
        return {name: kept[f"{name}_loss@{name}"] for name in objectives}, kept

    def _arguments(self, objective: str, steps: int) -> dict[str, Any]:
        return {
            "output_dir": self.adapter(objective),
            "max_steps": steps,
            "per_device_train_batch_size": self.task.batch,
            "per_device_eval_batch_size": 4 * self.task.batch,
            "learning_rate": self.rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 20),
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_steps": max(1, steps // 4),
            "disable_tqdm": True,
            "report_to": "none",
            "seed": self.seed,
        }

    def _backbone(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.task.model, dtype=self.task.dtype)
        return optimize_loaded(model, self.task.dtype)

    def _config(self, objectives: list[str]) -> PeftConfig:
        common: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        if self.kind == "parm":
            return PBLoraConfig(objectives=objectives, r1=4, r2=4, lora_alpha=8 * self.scale, **common)
        if self.kind == "parm_disjoint":
            common |= {"r1": 0, "r2": 8, "disjoint_start": True}
            return PBLoraConfig(objectives=objectives, lora_alpha=16 * self.scale, **common)
        common |= {"r": 8, "lora_alpha": 16 * self.scale}
        if self.kind == "svd_lora":
            return SVDLoraConfig(objectives=objectives, **common)
        if self.kind == "uniarm":
            return MoSLoraConfig(objectives=objectives, embedding_size=64, **common)
        if self.kind == "uniarm_descriptions":
            return MoSLoraConfig(objective_descriptions=self.task.descriptions, **common)
        return LoraConfig(**common)


class AboveReference(Responses):
    """log π − log π_ref of responses, where the reference is the model without adapters. With these the loss of an ARM
    is DPO's (arXiv 2305.18290, equation 7), in rows that share prompts: on a CPU TRL's trainer scores every position
    of a batch by the whole vocabulary.
    """

    def log_probs(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), AdapterSwitch.of(model).only([]):
            reference = super().log_probs(model, batch)
        return super().log_probs(model, batch) - reference


def with_labels(rows: list[dict[str, Any]], objectives: list[str]) -> list[dict[str, Any]]:
    """The pairs with the labels of some objectives, without those that none of them tells apart."""
    columns = ("prompt", "response_0", "response_1", *objectives)
    kept = [{name: row[name] for name in columns} for row in rows]
    return [row for row in kept if any(row[name] in (0, 1) for name in objectives)]


def is_telling(name: str) -> bool:
    """Whether a metric of an evaluation says something of the model, other than how fast it was evaluated."""
    return not name.endswith(("_runtime", "_per_second", "_preparation_time", "epoch"))


def join_loras(genarm: Training) -> str:
    """GenARM's LoRAs as one PBLoRA, and its folder."""
    folder = genarm.folder / "from_loras"
    if not (folder / "adapter_config.json").exists():
        from_loras(genarm.adapters(), folder)
    return str(folder)
