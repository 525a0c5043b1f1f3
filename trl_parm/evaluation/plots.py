# SPDX-License-Identifier: Apache-2.0
"""Pictures of Pareto fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt


def plot_front(
    summary: Sequence[Mapping[str, Any]],
    objectives: Sequence[str],
    path: str | Path,
    reference: Sequence[float] | None = None,
) -> None:
    """Draws the mean rewards of two objectives: one line for each method, one cross of ± 1 standard error a point.

    Points of a method are coloured by the weight of the first objective; runs without a preference are drawn as
    black markers.

    Args:
        summary (`Sequence[Mapping]`): From [`trl_parm.evaluation.sweep.summarize`].
        objectives (`Sequence[str]`): The two objectives, x axis first.
        path (`str` or `Path`): File to write; its ending names the format (`.png`, `.svg`, ...).
        reference (`Sequence[float]`, *optional*): The hypervolume's reference point, drawn as a cross.

    Raises:
        ValueError: not exactly two objectives.
    """
    if len(objectives) != 2:
        raise ValueError(f"`objectives` are {list(objectives)}, but a plane shows exactly two.")
    x, y = objectives
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    guided = [row for row in summary if row["preference"] is not None]
    for method in dict.fromkeys(row["method"] for row in guided):
        front = [row for row in guided if row["method"] == method]
        weights = [row["preference"][0] for row in front]
        axes.plot([r[x] for r in front], [r[y] for r in front], color="0.6", lw=1.2, zorder=1)
        axes.errorbar(*_crosses(front, x, y), fmt="none", ecolor="0.75", elinewidth=1, zorder=1)
        dots = axes.scatter(
            [r[x] for r in front],
            [r[y] for r in front],
            c=weights,
            cmap="viridis",
            vmin=0,
            vmax=1,
            s=70,
            zorder=3,
            label=method,
        )
        for row, weight in zip(front, weights, strict=True):
            axes.annotate(f"{weight:g}", (row[x], row[y]), xytext=(6, 6), textcoords="offset points", fontsize=8)
        figure.colorbar(dots, ax=axes, label=f"weight of “{x}”") if method == guided[0]["method"] else None
    for row, marker in zip((r for r in summary if r["preference"] is None), "s^Dvp", strict=False):
        axes.errorbar(*_crosses([row], x, y), fmt=marker, color="black", ecolor="0.6", label=row["method"], zorder=2)
    if reference is not None:
        axes.scatter(*reference, marker="x", color="crimson", zorder=2)
        axes.annotate(
            "reference point", (reference[0], reference[1]), xytext=(6, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel=f"{x} (higher is better)", ylabel=f"{y} (higher is better)")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _crosses(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list, list, list, list]:
    columns = [[row[key] for row in rows] for key in (x, y, f"{y}_error", f"{x}_error")]
    return columns[0], columns[1], columns[2], columns[3]
