# SPDX-License-Identifier: Apache-2.0
"""An adapter at every preference that is asked for, as LoRAs that are exported when they are first needed."""

from __future__ import annotations

import itertools
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_pblora import get_objectives, save_as_lora
from peft_pblora.export import vllm_rank
from trl_parm.evaluation.unloaded import Unloaded, own_rank


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
        self._arm, self._name = Unloaded(base).adapter(arm)
        self.objectives = get_objectives(self._arm, self._name)
        self._folder, self._most = folder, most
        self._numbers = itertools.count(1)
        self._kept: OrderedDict[tuple[float, ...], Export] = OrderedDict()
        self.rank = vllm_rank(own_rank(self._arm, self._name))

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
            export = self._export(list(preference))  # where it fails, none has gone for it
            gone = [self._kept.pop(other) for other in free[: max(0, surplus)]]
            self._kept[key] = export
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
        save_as_lora(self._arm, path, preference, self._name, self.rank)
        return Export(number, path)
