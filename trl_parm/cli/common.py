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
from trl_parm.processes import ALONE, Processes


if TYPE_CHECKING:
    from datasets import Dataset


UNJUDGED_PROMPTS = (
    "{} prompts have an answer on which a judge failed, and are left out of all methods. `trl-parm evaluate`, given "
    "again, and `trl-parm rescore` ask again; what was answered comes from the cache."
)
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
        quiet (`bool`, *optional*, defaults to `False`): Say nothing, as another process does.
    """

    def __init__(self, total: int, unit: str, done: int = 0, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.total, self.unit, self.first, self.done = total, unit, done, done
        self.start = self.said = time.monotonic()
        self.quiet, terminal = quiet, sys.stderr.isatty() and not quiet
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
        elif not self.quiet and (note or now - self.said >= EVERY):
            self.said, gone = now, now - self.start
            left = gone / max(1, self.done - self.first) * (self.total - self.done)
            times = f"{timedelta(seconds=round(gone))} gone, about {timedelta(seconds=round(left))} to go"
            told = f": {note}" if note else ""
            print(f"{self.unit} {self.done} of {self.total}{told}; {times}", file=sys.stderr, flush=True)


def say(text: str, processes: Processes = ALONE) -> None:
    """A line on standard output, at once, from the first of several processes."""
    from tqdm import tqdm

    if processes.is_first:
        tqdm.write(text)


def write_run(folder: str | Path, verb: str, arguments: Any, processes: Processes = ALONE) -> None:
    """Writes the resolved arguments, seeds and versions beside results, in the first of several processes."""
    from trl_parm import records

    if processes.is_first:
        records.write_run(Path(folder) / "run.yaml", verb, vars(arguments))


def load_data(given: Any) -> Dataset:
    """A data set by what stands in YAML: a path, or a mapping with the keys of [`PairData`]."""
    from trl_parm.training.config import as_pair_data

    return cast(Any, as_pair_data(given).load())


def load_rewards(given: Any) -> dict[str, Any]:
    """Objective → [`RewardSource`], whose models have a configuration and are not loaded yet, and whose functions are
    there, or a [`Judge`] that answers."""
    from peft_pblora.preference import check_objectives
    from trl_parm.endpoint import Endpoint
    from trl_parm.judges import SOURCE, Judge, judge_of
    from trl_parm.reward_models import RewardSource

    if not isinstance(given, Mapping):
        raise ValueError(f"`rewards` is {given!r}, but it must map each objective to a reward.")
    sources = {}
    for name in check_objectives(given):
        source, of = given[name], f"The reward of {name!r}"
        if isinstance(source, Mapping) and source.get("source") == SOURCE:
            sources[name] = judge_of(check_fields(check_fields(source, Endpoint, of), Judge, of))
            continue
        source = {"source": source} if not isinstance(source, Mapping) else source
        sources[name] = RewardSource.of(check_fields(source, RewardSource, of))
    for source in sources.values():
        if isinstance(source, Judge):
            source.endpoint.check()
        elif source.is_model:
            from trl_parm.evaluation.models import read_config

            read_config(source.source, "reward model")
        else:
            source.load()
    return sources


def tell_costs(rewards: Mapping[str, Any], processes: Processes = ALONE) -> None:
    """Says what judges were asked; several processes each say their own."""
    from trl_parm.judges import Judge

    who = "" if processes.count == 1 else f"Process {processes.number}: "
    for name, judge in rewards.items():
        if isinstance(judge, Judge):
            say(f"{who}{name} was judged by {judge.endpoint.cost()}.")


def grid(
    preferences: Any, steps: int | None, objectives: list[str], allow_off_simplex: bool = False
) -> list[list[float]]:
    """The preferences that are given, points of the simplex unless others are allowed, or the regular grid of so many
    steps. Raises `ValueError` for both or neither."""
    from peft_pblora import as_preference, preference_grid

    if preferences and steps is not None:
        raise ValueError("`preferences` are given, and `grid_steps` too, which makes others. Leave one of them out.")
    if preferences:
        allow = allow_off_simplex
        return [as_preference(one, objectives, allow_off_simplex=allow).tolist() for one in preferences]
    if steps is None:
        raise ValueError("Give `preferences`, points of the simplex, or `grid_steps`, for a regular grid.")
    return preference_grid(objectives, steps).tolist()
