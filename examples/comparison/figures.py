# SPDX-License-Identifier: Apache-2.0
"""The page's figures of one budget: mean rewards at every preference, and what a distance from the base buys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_parm.evaluation import draw_fronts, mean_and_error, seed_bootstrap
from trl_parm.evaluation.plots import COLOURS, MARKERS

from .methods import BASE, UNTRAINED
from .pooled import PARM, PRODUCT, Budget


def draw(budget: Budget, folder: Path, name: str) -> None:
    """Writes `<name>.png`, mean rewards, and `<name>_kl.png` into a folder."""
    shown = [BASE, UNTRAINED, PARM, *budget.compared()]
    draw_fronts(means(budget, shown), budget.objectives, folder, name=name)
    figure = _against_kl(budget)
    figure.savefig(folder / f"{name}_kl.png", dpi=150, bbox_inches="tight", pad_inches=0.08)


def means(budget: Budget, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Mean rewards of some methods at each preference, as [`trl_parm.evaluation.summarize`] gives them, with intervals
    over prompts and training seeds."""
    found = []
    for front in (budget.fronts[name] for name in methods):
        grid = [None] * len(front.labels) if front.preferences is None else front.preferences.tolist()
        for point, (preference, label) in enumerate(zip(grid, front.labels)):
            cell = {"method": front.method, "preference": preference, "label": label}
            for i, name in enumerate(budget.objectives):
                value, low, high = seed_bootstrap(
                    lambda means: means[:, 0], front.runs[:, :, point, [i]], budget.resamples, vectorized=True
                )
                error = mean_and_error(front.rewards[:, point, i].tolist())[1]
                cell |= {name: value, f"{name}_error": error, f"{name}_low": low, f"{name}_high": high}
            found.append(cell)
    return found


def _against_kl(budget: Budget) -> Figure:
    """Mean inner product of standardised rewards over KL to the base; open marks are of another β, near PARM's KL,
    whose range over seeds is grey."""
    rows = {row["method"]: row for row in budget.measures if row["measure"] == PRODUCT}
    matched = budget.matched()
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*budget.kl_range(PARM), color="0.94", lw=0, zorder=0)
    axes.axvline(budget.kl(PARM), color="0.8", lw=1, zorder=0)
    styles = zip([PARM, *budget.compared()], COLOURS * 2, MARKERS, strict=False)
    for name, colour, marker in styles:
        names = [name, *([matched[name]] if name in matched else [])]
        xs = [budget.kl(one) for one in names]
        ys, low, high = np.array([[rows[one][key] for key in ("value", "low", "high")] for one in names]).T
        axes.errorbar(xs, ys, [ys - low, high - ys], fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.6)
        axes.plot(xs, ys, color=colour, lw=0.8, ls=":")
        for x, y, filled in zip(xs, ys, (True, False)):
            face = colour if filled else "white"
            label = name if filled else None
            axes.plot(x, y, marker, mfc=face, mec=colour, ms=8, ls="none", label=label)
    for name, marker in ((BASE, "*"), (UNTRAINED, "P")):
        at = budget.kl(name), rows[name]["value"]
        axes.plot(*at, marker, color="black", mfc="white", ms=10, ls="none", label=name)
    axes.set(xlabel="KL to the base (nats a token)", ylabel="mean inner product of standardised rewards")
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
