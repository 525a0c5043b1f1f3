# SPDX-License-Identifier: Apache-2.0
"""All measures of all methods as tables: rows of plain values, each hypervolume with its reference point."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_pblora.output import output_file
from peft_pblora.preference import check_columns

from .fronts import Front
from .metrics import Interval, bootstrap, hypervolume, mean_inner_product, rank_correlations


WRITER = "plot"
"""Who writes tables and figures: each replaces those that were written by the other calls, and nothing else."""
HYPERVOLUME, INNER_PRODUCT = "hypervolume", "mean inner product"


def measure(
    found: Sequence[Front],
    objectives: Sequence[str],
    references: Sequence[Sequence[float]],
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Hypervolume at each reference point and mean inner product of each method, with 95 % bootstrap intervals.

    A control without preference is one point; its mean inner product is that of giving this point at every preference
    of the others.

    Args:
        found (`Sequence[Front]`): From [`arrange`].
        objectives (`Sequence[str]`): Their objectives.
        references (`Sequence[Sequence[float]]`): Reference points, each of length k. The order of methods may differ
            between them.
        resamples, seed (`int`, *optional*): Of the [`bootstrap`].

    Returns:
        `list[dict]` with `method`, `points`, `prompts`, `measure`, `reference`, `value`, `low` and `high`.

    Raises:
        ValueError: a reference point of another length.
    """
    grid = _grid(found)
    rows = []
    for name, statistic in _statistics(objectives, references, grid).items():
        for front in found:
            interval = bootstrap(statistic, front.rewards, resamples, seed=seed)
            if name[0] == HYPERVOLUME:
                interval = interval._replace(low=max(interval.low, 0.0))
            head = {"method": front.method, "points": len(front.labels), "prompts": len(front.rewards)}
            rows.append({**head, **_measure(*name, interval)})
    return rows


def differences(
    found: Sequence[Front],
    objectives: Sequence[str],
    references: Sequence[Sequence[float]],
    against: str,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences of each measure between the other methods and one of them, on the same resampled prompts.

    Args:
        found, objectives, references, resamples, seed: As in [`measure`].
        against (`str`): The method that is subtracted.

    Returns:
        `list[dict]` with `method`, `minus`, `measure`, `reference`, `value`, `low`, `high` and `differs`, whether the
        interval leaves out 0.

    Raises:
        ValueError: no such method.
    """
    by_name = {front.method: front for front in found}
    if against not in by_name:
        raise ValueError(f"`against` is {against!r}, but the methods are {', '.join(by_name)}.")
    grid, other = _grid(found), by_name[against].rewards
    rows = []
    for name, value in _statistics(objectives, references, grid).items():
        for front in found:
            if front.method == against:
                continue
            both, n = np.concatenate([front.rewards, other], axis=1), front.rewards.shape[1]
            change = lambda mean, value=value, n=n: value(mean[:n]) - value(mean[n:])  # noqa: E731
            interval = bootstrap(change, both, resamples, seed=seed)
            differs = interval.low > 0 or interval.high < 0
            rows.append({"method": front.method, "minus": against, **_measure(*name, interval), "differs": differs})
    return rows


def correlations(found: Sequence[Front], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Rank correlation of α_i with reward i, see [`rank_correlations`], for each method with a preference.

    Raises:
        ValueError: an objective that is called `method`.
    """
    check_columns(objectives, ["method"])
    rows = []
    for front in found:
        if front.preferences is not None:
            values = rank_correlations(front.preferences, front.points)
            rows.append({"method": front.method, **dict(zip(objectives, values.tolist(), strict=True))})
    return rows


def costs(found: Sequence[Front], base: str | None = None) -> list[dict[str, Any]]:
    """What each method costs.

    Args:
        found (`Sequence[Front]`): From [`arrange`].
        base (`str`, *optional*): The method that is the bare base model, to which times are compared.

    Returns:
        `list[dict]` with `method`, `seconds_per_token`, `relative_to_base` (NaN without `base`), `tokens` (mean length
        of a response), `extra_parameters` and `extra_MiB` (weights beside those of the base model).
    """
    unit = next((front.seconds for front in found if front.method == base), math.nan)
    return [
        {
            "method": front.method,
            "seconds_per_token": front.seconds,
            "relative_to_base": front.seconds / unit if unit else math.nan,
            "tokens": front.tokens,
            "extra_parameters": front.extra_parameters,
            "extra_MiB": front.extra_bytes / 2**20,
        }
        for front in found
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; `low` and `high` become brackets after `value`."""
    if not rows:
        return ""
    cells = [_with_brackets(row) for row in rows]
    names = list(cells[0])
    lines = ["| " + " | ".join(map(_text, names)) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_text(row[name]) for name in names) + " |" for row in cells)])


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes rows to a CSV file with a head, numbers in full. Only a file of its own or of figures is replaced."""
    with output_file(path, WRITER) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _grid(found: Sequence[Front]) -> np.ndarray | None:
    return next((front.preferences for front in found if front.preferences is not None), None)


def _statistics(
    objectives: Sequence[str], references: Sequence[Sequence[float]], grid: np.ndarray | None
) -> dict[tuple[str, str], Callable[[np.ndarray], float]]:
    """Measures of mean rewards `(points, k)`, by name and reference point."""
    found: dict[tuple[str, str], Callable[[np.ndarray], float]] = {}
    for point in references:
        if len(point) != len(objectives):
            raise ValueError(
                f"The reference point {list(point)} has {len(point)} numbers, but there are {len(objectives)} "
                f"objectives ({', '.join(objectives)})."
            )
        name = ", ".join(f"{o} {value:g}" for o, value in zip(objectives, point, strict=True))
        found[HYPERVOLUME, name] = lambda mean, point=point: hypervolume(mean, point)
    if grid is not None:
        found[INNER_PRODUCT, "-"] = lambda mean: mean_inner_product(grid, np.broadcast_to(mean, grid.shape))
    return found


def _measure(name: str, reference: str, interval: Interval) -> dict[str, Any]:
    return {"measure": name, "reference": reference, **dict(zip(("value", "low", "high"), interval))}


def _with_brackets(row: Mapping[str, Any]) -> dict[str, Any]:
    if "low" not in row:
        return dict(row)
    value = str(Interval(row["value"], row["low"], row["high"]))
    return {key: value if key == "value" else cell for key, cell in row.items() if key not in ("low", "high")}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return " ".join(str(value).split()).replace("|", "\\|")
