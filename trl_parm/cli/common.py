# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: data and preferences, progress, and what is written beside results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl_parm.arguments import check_fields


if TYPE_CHECKING:
    from datasets import Dataset


OFF_SIMPLEX = "Take preferences with negative weights, or that do not sum to 1, which extrapolate."
"""The help of an argument."""
EVERY = 30.0
"""Seconds between two lines about long work where standard error is no terminal."""


class Progress:
    """A progress bar on a terminal; in a pipe or a file a line now and then, and none about short work.

    Args:
        total (`int`): How much there is to do.
        unit (`str`): What is counted, such as `batch`.
        done (`int`, *optional*, defaults to 0): How much an earlier run has done.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        from tqdm import tqdm

        self.total, self.unit, self.first, self.done = total, unit, done, done
        self.start = self.said = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, initial=done, dynamic_ncols=True) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends a bar; nothing else."""
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int = 1, note: str = "") -> None:
        """Counts what was done; a note, such as a loss, is shown beside it at once."""
        self.done += done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done)
            self.bar.set_postfix_str(note or self.bar.postfix or "")
        elif note or now - self.said >= EVERY:
            self.said, gone = now, now - self.start
            left = gone / max(1, self.done - self.first) * (self.total - self.done)
            times = f"{timedelta(seconds=round(gone))} gone, about {timedelta(seconds=round(left))} to go"
            told = f": {note}" if note else ""
            print(f"{self.unit} {self.done} of {self.total}{told}; {times}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line on standard output, at once."""
    from tqdm import tqdm

    tqdm.write(text)


def write_run(folder: str | Path, verb: str, arguments: Any) -> None:
    """Writes the resolved arguments, seeds and versions beside results."""
    from trl_parm import records

    records.write_run(Path(folder) / "run.yaml", verb, vars(arguments))


def load_data(given: Any) -> Dataset:
    """A data set by what stands in YAML: a path, or a mapping with the keys of [`PairData`]."""
    from trl_parm.training.config import as_pair_data

    return cast(Any, as_pair_data(given).load())


def load_rewards(given: Any) -> dict[str, Any]:
    """Objective → [`RewardSource`], whose models are not loaded yet, and whose functions are there."""
    from peft_pblora.preference import check_objectives
    from trl_parm.reward_models import RewardSource

    if not isinstance(given, Mapping):
        raise ValueError(f"`rewards` is {given!r}, but it must map each objective to a reward.")
    sources = {}
    for name in check_objectives(given):
        source = {"source": given[name]} if not isinstance(given[name], Mapping) else given[name]
        sources[name] = RewardSource.of(check_fields(source, RewardSource, f"The reward of {name!r}"))
    for source in sources.values():
        if not source.is_model:
            source.load()
    return sources


def grid(
    preferences: Any, steps: int | None, objectives: list[str], allow_off_simplex: bool = False
) -> list[list[float]]:
    """The preferences that are given, points of the simplex unless others are allowed, or the regular grid of so many
    steps."""
    from peft_pblora import as_preference, preference_grid

    if preferences:
        allow = allow_off_simplex
        return [as_preference(one, objectives, allow_off_simplex=allow).tolist() for one in preferences]
    if steps is None:
        raise ValueError("Give `preferences`, points of the simplex, or `grid_steps`, for a regular grid.")
    return preference_grid(objectives, steps).tolist()
