# SPDX-License-Identifier: Apache-2.0
"""From the table of a sweep to arrays: for each method its rewards by prompt, preference and objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from numbers import Real
from typing import Any

import numpy as np

from peft_pblora.preference import check_columns
from trl_parm.rewards import is_unjudged
from trl_parm.texts import prompt_key

from .metrics import bootstrap, mean_and_error


SUMMARY = ("method", "preference", "label")
OF_OBJECTIVE = ("{}", "{}_error", "{}_low", "{}_high", "α {}")
"""The columns of a summary, and of each objective in it and in the file of a figure's numbers."""


MEASURED = ("capped", "log_prob_base", "log_ratio")
"""Columns of what was decoded that rows of 0.2.0 and before don't have."""
COSTS = ("tokens", "seconds", "extra_parameters", "extra_bytes")


def row_cell(row: Mapping[str, Any]) -> tuple[str, tuple | None, str]:
    """What a row of a table is of: the method, the preference and the prompt. Raises `KeyError`, `TypeError` or
    `ValueError` for what is no such row."""
    weights = row["preference"]
    if weights is not None and not (weights and all(_is_number(weight) for weight in weights)):
        raise ValueError(f"its preference is {weights!r}")
    if not isinstance(row["method"], str) or not isinstance(row["response"], str):
        raise TypeError(f"its method is {row['method']!r}, its response {row['response']!r}")
    return row["method"], None if weights is None else tuple(weights), prompt_key(row["prompt"])


def check_scores(row: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises `KeyError` or `ValueError` unless a row has a finite number in each of some columns."""
    for name in names:
        if not _is_number(row[name]):
            raise ValueError(f"its {name!r} is {row[name]!r}, no finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def judged(table: Iterable[Any], objectives: Sequence[str]) -> tuple[list[Any], int]:
    """The rows of those prompts that have all numbers in all of their rows, and how many prompts were left out.

    Methods are compared on the same prompts, so that a judge that failed on one answer takes the prompt from all.
    """
    rows = list(table)
    lost = {prompt_key(row["prompt"]) for row in rows if any(is_unjudged(row, name) for name in objectives)}
    return [row for row in rows if prompt_key(row["prompt"]) not in lost], len(lost)


@dataclass(frozen=True)
class Front:
    """What a method reached.

    Attributes:
        method (`str`): Its name.
        preferences (`np.ndarray` of shape `(points, k)` or `None`): The α of its points; `None` for a control.
        labels (`list[str]`): The points' names.
        runs (`np.ndarray` of shape `(seeds, prompts, points, k)`): Rewards of one or more trainings.
        seconds (`float`): For one token, all time divided by all tokens.
        tokens (`float`): Mean length of a response.
        extra_parameters, extra_bytes (`int`): What the method keeps in memory beside the base model.
        scale (`np.ndarray` of shape `(prompts, 2, k)` or `None`): Of standardised rewards, the answers to each prompt
            that they have their scale from, in its units: their mean, and that of their squares. Over all prompts
            these are 0 and, for n answers, (n − 1)/n, whose difference is what other prompts' is compared with.
    """

    method: str
    preferences: np.ndarray | None
    labels: list[str]
    runs: np.ndarray
    seconds: float
    tokens: float
    extra_parameters: int
    extra_bytes: int
    scale: np.ndarray | None = None

    @property
    def rewards(self) -> np.ndarray:
        """Rewards of shape `(prompts, points, k)`, of several seeds their means."""
        return self.runs.mean(0)

    @property
    def points(self) -> np.ndarray:
        """Mean rewards, of shape `(points, k)`."""
        return self.rewards.mean(0)


def arrange(table: Iterable[Mapping[str, Any]], objectives: Sequence[str]) -> list[Front]:
    """Arranges a table by method. All must have the same prompts, and the same preferences if any.

    Args:
        table (`Iterable[Mapping]`): The rows of [`sweep`], or of its JSONL file.
        objectives (`Sequence[str]`): The columns with rewards.

    Returns:
        `list[Front]`: In the order of the table.

    Raises:
        ValueError: no rows, a missing column, or cells that are missing or there twice.
    """
    cells = _cells(table, objectives, COSTS)
    for weights in (weights for _, weights in cells if weights is not None):
        if len(weights) != len(objectives):
            raise ValueError(
                f"A preference has {len(weights)} weights, {list(weights)}, but there are {len(objectives)} "
                f"objectives ({', '.join(objectives)}). Give a weight of 0 to a reward that was no objective."
            )
    first, prompts = next(iter(cells))[0], list(next(iter(cells.values())))
    points: dict[str, list[tuple | None]] = {}
    for (method, weights), rows in cells.items():
        points.setdefault(method, []).append(weights)
        missing = len(set(prompts) ^ set(rows))
        if missing:
            raise ValueError(
                f"{method!r} at {weights or 'no preference'} and {first!r} differ in {missing} prompts. Methods are "
                "compared on the same prompts: let the evaluation go on to its end."
            )
    grids = {method: grid for method, grid in points.items() if grid != [None]}
    for method, grid in grids.items():
        leader, shared = next(iter(grids.items()))
        if set(grid) != set(shared):
            raise ValueError(
                f"{method!r} has {len(grid)} preferences and {leader!r} {len(shared)}, or others. Methods are "
                "compared at the same preferences: evaluate all of them on one grid."
            )
        points[method] = shared  # whose order is everybody's
    return [
        _front(method, [[cells[method, weights][prompt] for weights in grid] for prompt in prompts], objectives)
        for method, grid in points.items()
    ]


def pool_seeds(
    found: Sequence[Front], names: Mapping[str, str], files: Mapping[str, str] | None = None
) -> list[Front]:
    """Puts fronts of one method, each of a training with another seed, together as one.

    Args:
        found (`Sequence[Front]`): From [`arrange`], which compares prompts and preferences.
        names (`Mapping[str, str]`): Name of a front → the method that it is a run of.
        files (`Mapping[str, str]`, *optional*):
            Name of a front → where it was read. Methods are compared run by run, in the order of the fronts, so that
            those which have files in common must have all in common.

    Returns:
        `list[Front]`: One for each method, with a run for each of its seeds.

    Raises:
        ValueError: methods of which one has more runs than another, or runs from other files beside common ones; one
            without a preference may have a single run.
    """
    groups: dict[str, list[Front]] = {}
    for front in found:
        groups.setdefault(names[front.method], []).append(front)
    counts = {name: len(own) for name, own in groups.items() if len(own) > 1 or own[0].preferences is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{method!r} has {count}" for method, count in counts.items())
        raise ValueError(
            f"The methods have different numbers of training seeds: {listed}. Evaluate what is missing, or choose "
            "methods with `methods`; those without a preference may be there once."
        )
    read = {name: [files[front.method] for front in groups[name]] for name in counts} if files else {}
    for one, other in combinations(read, 2):
        if read[one] != read[other] and set(read[one]) & set(read[other]):
            raise ValueError(
                f"Methods are compared seed by seed, but {one!r} was read from {', '.join(read[one])} and "
                f"{other!r} from {', '.join(read[other])}. Evaluate what is missing, or choose files in which "
                "both are."
            )
    return [
        replace(
            group[0],
            method=method,
            runs=np.concatenate([front.runs for front in group]),
            seconds=float(np.mean([front.seconds for front in group])),
            tokens=float(np.mean([front.tokens for front in group])),
        )
        for method, group in groups.items()
    ]


def standardized(found: Sequence[Front], base: str, objectives: Sequence[str]) -> list[Front]:
    """The fronts with each reward minus its mean over the answers of a method, by their standard deviation.

    So objectives of different units count alike in a mean inner product. Other prompts would have another scale, which
    the intervals of [`measure`] and [`differences`] take into account.

    Args:
        found (`Sequence[Front]`): From [`arrange`].
        base (`str`): The method whose answers give the scale, mostly the bare base model.
        objectives (`Sequence[str]`): Their names, for errors.

    Raises:
        ValueError: no such method, a single answer, or a reward that is the same for all of its answers, up to the
            rounding of a model's output.
    """
    runs = next((front.runs for front in found if front.method == base), None)
    if runs is None:
        listed = ", ".join(front.method for front in found)
        raise ValueError(
            f"Rewards get the scale that they have for {base!r}, but the methods are {listed}. Evaluate it."
        )
    answers = runs.reshape(-1, runs.shape[-1])
    deviations = answers.std(0, ddof=1) if len(answers) > 1 else np.zeros(len(objectives))
    least = np.finfo(np.float32).eps * np.abs(answers).max(0)
    for name, deviation, noise in zip(objectives, deviations, least, strict=True):
        if not deviation > noise:
            raise ValueError(
                f"The reward {name!r} is the same for all answers of {base!r}, or there is one answer only, so that "
                "it has no scale. Evaluate more prompts, or leave it out of `objectives`."
            )
    mean = answers.mean(0)
    of_prompts = ((runs - mean) / deviations).swapaxes(0, 1)
    moments = np.stack([(of_prompts**power).mean((1, 2)) for power in (1, 2)], 1)
    return [replace(front, runs=(front.runs - mean) / deviations, scale=moments) for front in found]


def summarize(
    table: Iterable[Mapping[str, Any]], objectives: Sequence[str], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean rewards of each run, in the order in which the runs stand in the table.

    Args:
        table (`Iterable[Mapping]`): The rows of [`sweep`], or of its JSONL file.
        objectives (`Sequence[str]`): The columns with rewards.
        resamples, seed (`int`, *optional*): Of the [`bootstrap`].

    Returns:
        `list[dict]` with `method`, `preference`, `label` and, for each objective, `<objective>`, its standard error
        `<objective>_error` and the 95 % bootstrap interval `<objective>_low` and `<objective>_high`.

    Raises:
        ValueError: no rows, a missing column, cells that are there twice, or an objective whose columns would be those
            of another one.
    """
    check_columns(objectives, SUMMARY, OF_OBJECTIVE)
    summary = []
    for (method, weights), rows in _cells(table, objectives).items():
        values = np.array([[row[name] for name in objectives] for row in rows.values()], dtype=float)
        label = next(iter(rows.values()))["label"]
        cell = {"method": method, "preference": None if weights is None else list(weights), "label": label}
        for i, name in enumerate(objectives):
            cell[name], cell[f"{name}_error"] = mean_and_error(values[:, i].tolist())
            interval = bootstrap(lambda means: means[:, 0], values[:, [i]], resamples, seed=seed, vectorized=True)
            _, cell[f"{name}_low"], cell[f"{name}_high"] = interval
        summary.append(cell)
    return summary


def _cells(
    table: Iterable[Mapping[str, Any]], objectives: Sequence[str], costs: Sequence[str] = ()
) -> dict[tuple, dict[str, Mapping]]:
    """The rows of each method and preference, by prompt, which have all numbers that are asked for."""
    cells: dict[tuple, dict[str, Mapping]] = {}
    for number, row in enumerate(table, 1):
        for columns in ((*objectives, "method", "preference", "prompt"), ("label", *costs)):
            if missing := [name for name in columns if name not in row]:
                raise ValueError(f"The table lacks the columns {missing}; its row {number} has {sorted(row)}.")
        try:
            method, weights, prompt = row_cell({"response": "", **row})
            check_scores(row, (*objectives, *costs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The table's row {number}, of {row['method']!r}, is none: {error}.") from None
        put_once(cells, (method, weights, prompt), row)
    if not cells:
        raise ValueError("The table has no rows. Evaluate at least one method on one prompt.")
    return cells


def put_once(cells: dict[tuple, dict[str, Mapping]], cell: tuple[str, tuple | None, str], row: Mapping) -> None:
    """Puts a row among those of its method and preference, by prompt. Raises `ValueError` where there is one."""
    method, weights, prompt = cell
    rows = cells.setdefault((method, weights), {})
    if prompt in rows:
        raise ValueError(
            f"The table has {method!r} at {weights or 'no preference'} twice for the prompt {prompt[:80]}. Give each "
            "run once, and files with runs of one name as files of their own."
        )
    rows[prompt] = row


def _front(method: str, rows: list[list[Mapping[str, Any]]], objectives: Sequence[str]) -> Front:
    """The front of a method with rows by prompt and preference."""
    every = [row for of_prompt in rows for row in of_prompt]
    tokens = sum(row["tokens"] for row in every)
    grid = [row["preference"] for row in rows[0]]
    return Front(
        method=method,
        preferences=None if grid == [None] else np.array(grid, dtype=float),
        labels=[row["label"] for row in rows[0]],
        runs=np.array([[[[row[name] for name in objectives] for row in of_prompt] for of_prompt in rows]], float),
        seconds=sum(row["seconds"] for row in every) / max(1, tokens),
        tokens=tokens / len(every),
        extra_parameters=max(row["extra_parameters"] for row in every),
        extra_bytes=max(row["extra_bytes"] for row in every),
    )
