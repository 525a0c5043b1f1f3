# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: data and preferences, progress, and what is written beside results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from datasets import Dataset


def progress(total: int, unit: str) -> Any:
    """A progress bar; none where standard error is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True)


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
    from trl_parm.training.config import ARMArguments

    entry: Any = {"path": given} if isinstance(given, str) else given
    return cast(Any, ARMArguments("", train_data=[entry]).train_data[0].load())


def load_rewards(given: Any) -> dict[str, Any]:
    """Objective → [`RewardSource`], whose models are not loaded yet, and whose functions are there."""
    from trl_parm.reward_models import RewardSource

    if not isinstance(given, Mapping):
        raise ValueError(f"`rewards` is {given!r}, but it must map each objective to a reward.")
    sources = {name: RewardSource.of(source) for name, source in given.items()}
    for source in sources.values():
        if not source.is_model:
            source.load()
    return sources


def grid(preferences: Any, steps: int | None, objectives: list[str]) -> list[list[float]]:
    """The preferences that are given, points of the simplex, or the regular grid of so many steps."""
    from peft_pblora import as_preference, preference_grid

    if preferences:
        return [as_preference(preference, objectives).tolist() for preference in preferences]
    if steps is None:
        raise ValueError("Give `preferences`, points of the simplex, or `grid_steps`, for a regular grid.")
    return preference_grid(objectives, steps).tolist()
