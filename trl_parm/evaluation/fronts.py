# SPDX-License-Identifier: Apache-2.0
"""From the table of a sweep to arrays: for each method its rewards by prompt, preference and objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_pblora.preference import check_columns
from trl_parm.texts import prompt_key

from .metrics import bootstrap, mean_and_error


SUMMARY = ("method", "preference", "label")
OF_OBJECTIVE = ("{}", "{}_error", "{}_low", "{}_high", "α {}")
"""The columns of a summary, and of each objective in it and in the file of a figure's numbers."""


@dataclass(frozen=True)
class Front:
    """What a method reached.

    Attributes:
        method (`str`): Its name.
        preferences (`np.ndarray` of shape `(points, k)` or `None`): The α of its points; `None` for a control.
        labels (`list[str]`): The points' names.
        rewards (`np.ndarray` of shape `(prompts, points, k)`): Raw rewards.
        seconds (`float`): For one token, all time divided by all tokens.
        tokens (`float`): Mean length of a response.
        extra_parameters, extra_bytes (`int`): What the method keeps in memory beside the base model.
    """

    method: str
    preferences: np.ndarray | None
    labels: list[str]
    rewards: np.ndarray
    seconds: float
    tokens: float
    extra_parameters: int
    extra_bytes: int

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
    cells = _cells(table, objectives)
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


def summarize(table: Iterable[Mapping[str, Any]], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Mean rewards of each run, in the order in which the runs stand in the table.

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
            _, cell[f"{name}_low"], cell[f"{name}_high"] = bootstrap(lambda mean: mean[0], values[:, [i]])
        summary.append(cell)
    return summary


def _cells(table: Iterable[Mapping[str, Any]], objectives: Sequence[str]) -> dict[tuple, dict[str, Mapping]]:
    """The rows of each method and preference, by prompt."""
    cells: dict[tuple, dict[str, Mapping]] = {}
    for row in table:
        missing = [name for name in (*objectives, "method", "preference", "prompt") if name not in row]
        if missing:
            raise ValueError(f"The table lacks the columns {missing}; it has {sorted(row)}.")
        weights = None if row["preference"] is None else tuple(row["preference"])
        cell, prompt = cells.setdefault((row["method"], weights), {}), prompt_key(row["prompt"])
        if prompt in cell:
            raise ValueError(
                f"The table has {row['method']!r} at {weights or 'no preference'} twice for the prompt {prompt[:80]}. "
                "Give each run once, and files with runs of one name as files of their own."
            )
        cell[prompt] = row
    if not cells:
        raise ValueError("The table has no rows. Evaluate at least one method on one prompt.")
    return cells


def _front(method: str, rows: list[list[Mapping[str, Any]]], objectives: Sequence[str]) -> Front:
    """The front of a method with rows by prompt and preference."""
    every = [row for of_prompt in rows for row in of_prompt]
    tokens = sum(row["tokens"] for row in every)
    grid = [row["preference"] for row in rows[0]]
    return Front(
        method=method,
        preferences=None if grid == [None] else np.array(grid, dtype=float),
        labels=[row["label"] for row in rows[0]],
        rewards=np.array([[[row[name] for name in objectives] for row in of_prompt] for of_prompt in rows], float),
        seconds=sum(row["seconds"] for row in every) / max(1, tokens),
        tokens=tokens / len(every),
        extra_parameters=max(row["extra_parameters"] for row in every),
        extra_bytes=max(row["extra_bytes"] for row in every),
    )
