# SPDX-License-Identifier: Apache-2.0
"""All measures of all methods as tables: rows of plain values, each hypervolume with its reference point."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_pblora.output import output_file
from peft_pblora.preference import check_columns

from .fronts import Front
from .metrics import (
    Interval,
    hypervolumes,
    rank_correlations,
    seed_bootstrap,
    vertices,
)


WRITER = "plot"
"""Who writes tables and figures: each replaces those that were written by the other calls, and nothing else."""
STANDARD_REFERENCES = (-1, 0)
"""Reference points of standardised rewards in all objectives: a standard deviation below the base model, and at it."""
NO_VARIANCE = 1e-9
"""Up to which share of the variance of all answers those of a resample are taken for alike."""
Measure = Callable[[np.ndarray], np.ndarray]
"""Of many sets of mean rewards, `(sets, points, k)`: a number for each."""
HYPERVOLUME, INNER_PRODUCT, SPREAD = "hypervolume", "mean inner product", "spread of {}"


def measure(
    found: Sequence[Front],
    objectives: Sequence[str],
    references: Sequence[Sequence[float]],
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Hypervolume at each reference point, mean inner product, and the [`spread`] of each objective, of each method,
    with 95 % bootstrap intervals over prompts, and over training seeds where a method has several
    ([`seed_bootstrap`]). The scale of [`standardized`] rewards is resampled with the prompts. A control counts as its
    one point at every preference of the others.

    Args:
        found (`Sequence[Front]`): From [`arrange`].
        objectives (`Sequence[str]`): Their objectives.
        references (`Sequence[Sequence[float]]`): Reference points, each of length k.
        resamples, seed (`int`, *optional*): Of the [`bootstrap`].

    Returns:
        `list[dict]` with `method`, `points`, `prompts`, `seeds`, `measure`, `reference`, `value`, `low` and `high`.
        With one seed an interval lacks what another training would have changed.

    Raises:
        ValueError: a reference point of another length.
    """
    rows = []
    for (name, reference), statistic in _statistics(found, objectives, references).items():
        for front in found:
            if front.preferences is None and name not in (HYPERVOLUME, INNER_PRODUCT):
                continue  # one point is nowhere else at another preference
            of, values = _with_scale(statistic, front.runs, front.scale)
            value, low, high = seed_bootstrap(of, values, resamples, seed=seed, vectorized=True)
            low = max(low, 0.0) if name == HYPERVOLUME else low
            seeds, prompts = front.runs.shape[:2]
            head = {"method": front.method, "points": len(front.labels), "prompts": prompts, "seeds": seeds}
            rows.append({**head, "measure": name, "reference": reference, "value": value, "low": low, "high": high})
    return rows


def differences(
    found: Sequence[Front],
    objectives: Sequence[str],
    references: Sequence[Sequence[float]],
    against: str,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired differences of each measure between the other methods and one of them, on the same resampled prompts, and
    seed by seed where both have several; one that has a single run is compared with each seed of the other.

    Args:
        found, objectives, references, resamples, seed: As in [`measure`].
        against (`str`): The method that is subtracted.

    Returns:
        `list[dict]` with `method`, `minus`, `measure`, `reference`, `value`, `low`, `high` and `differs`, whether the
        interval leaves out 0; `None` for a single prompt.

    Raises:
        ValueError: no such method.
    """
    by_name = {front.method: front.runs for front in found}
    if against not in by_name:
        raise ValueError(f"`against` is {against!r}, but the methods are {', '.join(by_name)}.")
    other = by_name.pop(against)
    rows = []
    for (name, reference), statistic in _statistics(found, objectives, references).items():
        for method, rewards in by_name.items():
            n, seeds = rewards.shape[2], max(len(rewards), len(other))
            both = [np.broadcast_to(runs, (seeds, *runs.shape[1:])) for runs in (rewards, other)]
            of, values = _with_scale(
                lambda means, n=n, of=statistic: of(means[:, :n]) - of(means[:, n:]),
                np.concatenate(both, axis=2), found[0].scale,  # which all have in common
            )  # fmt: skip
            value, low, high = seed_bootstrap(of, values, resamples, seed=seed, vectorized=True)
            head = {"method": method, "minus": against, "measure": name, "reference": reference}
            differs = None if math.isnan(low) else low > 0 or high < 0
            rows.append({**head, "value": value, "low": low, "high": high, "differs": differs})
    return rows


def both_scales(
    table: Callable[[Sequence[Front], Sequence[Sequence[float]]], list[dict[str, Any]]],
    found: Sequence[Front],
    scaled: Sequence[Front] | None,
    references: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    """The rows of raw rewards at the reference points given, and those of standardised ones at −1 and at 0.

    Args:
        table (`Callable`): Makes rows of fronts and reference points, such as [`measure`].
        found, scaled (`Sequence[Front]`): From [`arrange`] and [`standardized`]; `None` for no such rows.
        references (`Sequence[Sequence[float]]`): In raw units.
    """
    rows = table(found, references)
    if scaled is None:
        return rows
    k = scaled[0].runs.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing lies above a point that nobody has asked for
        more = table(scaled, [[float(value)] * k for value in STANDARD_REFERENCES])
    return rows + [{**row, "measure": f"{row['measure']}, standardised"} for row in more]


def correlations(found: Sequence[Front], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Rank correlation of α_i with reward i, see [`rank_correlations`], for each method with a preference.

    Raises:
        ValueError: an objective that is called `method`.
    """
    check_columns(objectives, ["method"])
    return [
        {"method": front.method, **dict(zip(objectives, rank_correlations(front.preferences, front.points).tolist()))}
        for front in found
        if front.preferences is not None
    ]


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
    names, cells = as_cells(rows)
    head, *body = (f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in (names, *cells))
    return "\n".join([head, "|" + "---|" * len(names), *body])


def as_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table as texts; `low` and `high` become brackets after `value`."""
    cells = [dict(row) for row in rows]
    for row in cells:
        if "low" in row:
            row["value"] = str(Interval(row["value"], row.pop("low"), row.pop("high")))
    return list(map(_text, cells[0])), [list(map(_text, row.values())) for row in cells]


def with_error(mean: float, error: float, forms: tuple[str, str] = (".3g", ".2g")) -> str:
    """A mean with its standard error; that of one prompt alone."""
    return f"{mean:{forms[0]}} (one prompt)" if math.isnan(error) else f"{mean:{forms[0]}} ± {error:{forms[1]}}"


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes rows to a CSV file with a head, numbers in full, and nothing where there is no number. Only a file of its
    own or of figures is replaced."""
    with output_file(path, WRITER) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)


def _with_scale(statistic: Measure, runs: np.ndarray, scale: np.ndarray | None) -> tuple[Measure, np.ndarray]:
    """A measure of mean rewards, and what it is measured on, `(seeds, prompts, ..., k)`. Standardised rewards of other
    prompts have another scale, which is resampled with them; a resample without any deviation keeps the one it has.

    Of as many answers, the variance of a resample is to that of all what E z² − (E z)² is to its value over all."""
    if scale is None:
        return statistic, runs
    whole = _variance(*scale.mean(0))

    def of_scaled(means: np.ndarray) -> np.ndarray:
        centre, square = means[:, -2:].swapaxes(0, 1)
        variance = _variance(centre, square) / whole
        deviation = np.sqrt(np.where(variance > NO_VARIANCE, variance, 1.0))
        return statistic((means[:, :-2] - centre[:, None]) / deviation[:, None])

    return of_scaled, np.concatenate([runs, np.broadcast_to(scale, (len(runs), *scale.shape))], axis=2)


def _variance(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    return square - mean**2


def _statistics(
    found: Sequence[Front], objectives: Sequence[str], references: Sequence[Sequence[float]]
) -> dict[tuple[str, str], Measure]:
    """Measures by name and reference point. One point stands for all preferences."""
    statistics: dict[tuple[str, str], Measure] = {}
    for point in references:
        if len(point) != len(objectives):
            raise ValueError(
                f"The reference point {list(point)} has {len(point)} numbers, but there are {len(objectives)} "
                f"objectives ({', '.join(objectives)})."
            )
        name = ", ".join(f"{o} {value:g}" for o, value in zip(objectives, point, strict=True))
        statistics[HYPERVOLUME, name] = lambda means, point=point: hypervolumes(means, point)
    grid = next((front.preferences for front in found if front.preferences is not None), None)
    if grid is not None:
        statistics[INNER_PRODUCT, "-"] = lambda means: (grid * means).sum(-1).mean(-1)
        places = vertices(grid)
        if len(objectives) > 1 and places is not None:
            for i, objective in enumerate(objectives):
                # how far a vertex lies above the mean of the others
                shares = np.where(np.arange(len(places)) == i, 1.0, -1.0 / (len(places) - 1))
                statistics[SPREAD.format(objective), "vertices"] = lambda means, i=i, shares=shares: (
                    np.broadcast_to(means, (len(means), *grid.shape))[:, places, i] @ shares
                )
    return statistics


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return " ".join(str(value).split())
