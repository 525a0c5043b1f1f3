# SPDX-License-Identifier: Apache-2.0
"""The processes that `accelerate launch` has started for one command: how many, which one this is, and what they agree
on. Not what they do: each takes its share of batches, see [`Records`]."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


class Stopped(ValueError):
    """In all processes but the one that says why."""


PATIENCE = timedelta(days=14)
"""How long a process that has done its share waits for the others."""
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that take all GPUs that a process sees."""


@dataclass(frozen=True)
class Processes:
    """Processes that do one job together, or the only one.

    Attributes:
        number (`int`): This one's, from 0.
        count (`int`): How many there are.
        here (`int`): How many of them are on this machine.
    """

    number: int = 0
    count: int = 1
    here: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """Those that a launcher has started this one with, as it says in the environment. Each gets its device."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        # On CPUs processes find each other only if they are told that these are meant.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        if state.num_processes == 1:
            raise ValueError(
                f"This is one of {os.environ['WORLD_SIZE']} processes, but accelerate did not connect them "
                f"({state.distributed_type}). Start them with `accelerate launch` or `torchrun`."
            )
        return cls(state.process_index, state.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def is_first(self) -> bool:
        """Whether this process speaks, and writes what is written once."""
        return self.number == 0

    def first(self, work: Callable[[], Any]) -> None:
        """Lets the first process do something, for which all wait. After an error there others raise [`Stopped`]."""
        error: Exception | None = None
        if self.is_first:
            try:
                work()
            except Exception as caught:
                error = caught
        said = self.gather(error and str(error))[0]
        if error is not None:
            raise error
        if said is not None:
            raise Stopped(f"Process 0 of {self.count} has stopped: {said}")

    def gather(self, value: Any) -> list[Any]:
        """A small value of each process, by their numbers, which waits for all of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises `ValueError` in all processes unless each value, which JSON can hold, is the same in all of them."""
        told = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in values.items()}
        first, *others = self.gather(told)
        for number, own in enumerate(others, 1):
            names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
            if names:
                raise (ValueError if self.is_first else Stopped)(
                    f"The processes 0 and {number} differ in {', '.join(names)}. Start all of them with one "
                    "configuration, the same files and the same versions."
                )

    def check_devices(self, loading: Mapping[str, Any]) -> None:
        """Raises `ValueError` if each of several processes on a machine would put a model on all of its GPUs."""
        import torch

        place = loading.get("device_map")
        if self.here > 1 and place in SPREAD and torch.cuda.is_available():
            raise ValueError(
                f"`device_map` is {place!r}, with which each of the {self.here} processes on this machine would take "
                "all of its GPUs. Leave it out, for one GPU each, or start one process for each machine."
            )

    def end(self) -> None:
        """Ends what [`launched`] has begun, after all processes have come here."""
        if self.count > 1:
            import torch.distributed

            self.gather(None)
            torch.distributed.destroy_process_group()


ALONE = Processes()
"""A process that nobody shares its work with."""
