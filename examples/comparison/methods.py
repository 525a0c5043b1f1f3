# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared, each with what it is trained by, and the decoding of their answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.models import Models
from trl_parm.reward_models import RewardSource
from trl_parm.texts import PromptText

from .task import Task
from .training import Training, join_loras


BASE, UNTRAINED, DISJOINT = "Base", "Base × untrained ARM", "PARM, disjoint start"


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        title (`str`): Its name in tables.
        decoder (`str`): The method of `trl-parm evaluate`.
        kind (`str`): What it is trained by, one of [`task.KINDS`].
        setting (`str`): The setting of the decoder that names the adapters.
        has_beta (`bool`): Whether its guidance has a strength to choose.
        joined (`bool`): Whether it reads the LoRAs of all objectives as one PBLoRA.
        beta_of (`str`): Another method whose β it takes, instead of one that is searched for.
    """

    title: str
    decoder: str
    kind: str
    setting: str = "arm"
    has_beta: bool = True
    joined: bool = False
    beta_of: str = ""

    @property
    def searched(self) -> bool:
        """Whether it has a β of its own."""
        return self.has_beta and not self.beta_of

    def entry(self, training: Training, beta: float | None, name: str = "") -> dict[str, Any]:
        """The method as `trl-parm evaluate` takes it, with the adapters of a training."""
        if self.joined:
            adapters: Any = join_loras(training)
        else:
            adapters = training.adapters() if self.setting != "arm" else training.adapter()
        strength = {} if beta is None else {"beta": beta}
        return {"method": self.decoder, "name": name or self.title, self.setting: adapters, **strength}


METHODS = {
    "parm": Method("PARM", "parm", "parm"),
    "svd_lora": Method("SVD-LoRA", "svd_lora", "svd_lora"),
    "uniarm": Method("UniARM", "uniarm", "uniarm"),
    "genarm": Method("GenARM", "genarm", "genarm", "arms"),
    "from_loras": Method("GenARM's LoRAs as one", "parm", "genarm", joined=True),
    "rewarded_soups": Method("Rewarded Soups", "rewarded_soups", "dpo", "policies", has_beta=False),
    "mod": Method("MOD", "mod", "dpo", "policies", has_beta=False),
    "arm_alone": Method("ARM alone", "arm_alone", "parm", has_beta=False),
    "parm_disjoint": Method(DISJOINT, "parm", "parm_disjoint"),
}
"""PARM with permuted α is not among them: for two objectives its answers are PARM's at the reversed preference."""


def methods_of(kinds: Collection[str]) -> dict[str, Method]:
    """Those of [`METHODS`] that need what is trained in some kinds."""
    return {name: method for name, method in METHODS.items() if method.kind in kinds}


def decode(
    task: Task,
    prompts: Sequence[PromptText],
    preferences: Sequence[Sequence[float]],
    entries: Sequence[Any],
    path: Path,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows of [`trl_parm.evaluation.evaluate`], with `options` of its own or of `generate`, from which a run that
    was killed goes on."""
    models = Models(task.model, task.dtype, optimize=True)
    rewards = {name: RewardSource.of(source).load() for name, source in task.rewards.items()}
    table = evaluate(
        models,
        entries,
        preferences,
        prompts,
        rewards,
        path,
        on_start=lambda name: print(f"  {name}", flush=True),
        batch_size=task.batch_texts,
        **{"seed": 0, "do_sample": True, "top_k": task.top_k, "max_new_tokens": task.max_new_tokens, **options},
    )
    return table.to_list()


def mean_kl(rows: Sequence[Mapping[str, Any]]) -> float:
    """KL to the base, estimated by the mean of log π − log π_base over the tokens that were decoded."""
    return sum(row["log_ratio"] for row in rows) / sum(row["tokens"] for row in rows)
