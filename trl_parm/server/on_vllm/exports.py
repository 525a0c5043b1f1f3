# SPDX-License-Identifier: Apache-2.0
"""An adapter at every preference that is asked for, as LoRAs that are exported when they are first needed."""

from __future__ import annotations

import itertools
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peft_pblora import get_objectives, load_adapter, save_as_lora
from peft_pblora.export import VLLM_RANKS
from peft_pblora.skeleton import skeleton_of
from trl_parm.evaluation.models import backbone_name, canonical


@dataclass
class Export:
    """A LoRA at one preference.

    Attributes:
        number (`int`): Its own, which no other has or will have: caches of prefixes are keyed by names and paths.
        path (`Path`): Its folder.
        users (`int`): How many requests use it now.
    """

    number: int
    path: Path
    users: int = 0

    @property
    def name(self) -> str:
        """By which the engine knows it."""
        return self.path.name


class Exports:
    """LoRAs of an adapter, the most recent ones.

    Args:
        base (`str`): The base model, of which no weights are loaded.
        arm (`str`): The adapter, which was trained on it.
        folder (`Path`): An empty folder for them.
        most (`int`): How many are kept.

    Attributes:
        objectives (`list[str]`): Of the adapter.
        rank (`int`): Of the LoRAs: the least that vLLM accepts.

    Raises:
        ValueError: an adapter without objectives, on another model, or too large for vLLM.
    """

    def __init__(self, base: str, arm: str, folder: Path, most: int) -> None:
        trained_on = backbone_name(arm)
        if trained_on is None or canonical(trained_on) != canonical(base):
            raise ValueError(
                f"The ARM {arm!r} must be an adapter on the base model {base!r}, but it is one on {trained_on!r}. "
                "One vLLM engine has one set of weights; serve it without `engine: vllm`."
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        self._arm: Any = load_adapter(skeleton_of(model, on_cpu=True), arm)
        self.objectives = get_objectives(self._arm)
        self._folder, self._most = folder, most
        self._numbers = itertools.count(1)
        self._kept: OrderedDict[tuple[float, ...], Export] = OrderedDict()
        self.rank = self._least_rank()

    def take(self, preference: Sequence[float]) -> tuple[Export, list[Export]]:
        """The LoRA at a preference, for one request more, and those that nobody uses and that have to go for it.

        Raises:
            RuntimeError: all that are kept are in use.
        """
        key = tuple(torch.tensor(preference, dtype=torch.float32).tolist())
        gone: list[Export] = []
        if key not in self._kept:
            free = [other for other, export in self._kept.items() if not export.users]
            surplus = len(self._kept) + 1 - self._most
            if surplus > len(free):
                raise RuntimeError(f"All {self._most} LoRAs are in use at other preferences.")
            gone = [self._kept.pop(other) for other in free[: max(0, surplus)]]
            self._kept[key] = self._export(list(preference))
        self._kept.move_to_end(key)
        self._kept[key].users += 1
        return self._kept[key], gone

    def give_back(self, export: Export) -> None:
        """A request is done with a LoRA."""
        export.users -= 1

    def remove(self, export: Export) -> None:
        """Removes the files of one that was exported here and is gone."""
        shutil.rmtree(export.path, ignore_errors=True)

    def _export(self, preference: list[float]) -> Export:
        number = next(self._numbers)
        path = self._folder / f"preference-{number}"
        save_as_lora(self._arm, path, preference, rank=self.rank)
        return Export(number, path)

    def _least_rank(self) -> int:
        own = max(adapter_rank(layer) for layer in self._arm.modules() if hasattr(layer, "adapters"))
        for rank in VLLM_RANKS:
            if rank >= own and rank > 1:
                return rank
        raise ValueError(f"The adapter has the rank {own}, but vLLM takes at most {VLLM_RANKS[-1]}.")


def adapter_rank(layer: Any) -> int:
    """The rank of an adapter of a layer."""
    return next(iter(layer.adapters.values())).A.weight.shape[0]
