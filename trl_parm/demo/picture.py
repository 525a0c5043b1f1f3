# SPDX-License-Identifier: Apache-2.0
"""The Pareto picture of a session, as SVG: it needs no script, follows the page's colours and tells more on hovering.

An open point is an answer of the base model, a filled one is guided, coloured by a weight; a line joins the two to one
question. One objective is drawn over the number of the question, more in planes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from trl_parm.evaluation import pareto_front
from trl_parm.evaluation.plots import SHADES

from .markup import PARTS
from .questions import Entry


WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 14, 12, HEIGHT - 46
"""The edges of the plane."""
MOST_PAIRED = 4
"""With more objectives a plane for every pair would be too many: then only neighbours share one."""


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    title: str
    fill: str | None
    """`None` for an answer of the base model."""


class _Scale:
    """Data to pixels, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool = False) -> None:
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or max(0.5 if whole else 0.0, 0.1 * abs(high), 0.1)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        ticks = MaxNLocator(5, integer=whole).tick_values(self.low, self.high)
        self.ticks = [tick for tick in ticks if self.low <= tick <= self.high]

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def picture(entries: Sequence[Entry], objectives: Sequence[str]) -> str:
    """HTML with the session's answers in planes of two objectives; a note if there are none."""
    k = len(objectives)
    pairs = itertools.combinations(range(k), 2) if k <= MOST_PAIRED else itertools.pairwise(range(k))
    planes = []
    if any(entry.base or entry.guided for entry in entries):
        planes = [_plane(entries, objectives, x, y) for x, y in (pairs if k > 1 else [(None, 0)])]
    return PARTS.picture(planes, [_shade(i / 4) for i in range(5)])


def _plane(entries: Sequence[Entry], objectives: Sequence[str], x: int | None, y: int) -> dict[str, Any]:
    """The answers by two of their measures, or by one over the number of the question."""
    questions = [_points(number, entry, objectives, x, y) for number, entry in enumerate(entries, 1)]
    points = [point for question in questions for point in question]
    kept = pareto_front([[point.x, point.y] for point in points]) if x is not None else []
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "xs": _Scale([point.x for point in points], LEFT, RIGHT, whole=x is None),
        "ys": _Scale([point.y for point in points], BOTTOM, TOP),
        "x_name": "question" if x is None else objectives[x],
        "y_name": objectives[y],
        "questions": questions,
        "front": sorted((point.x, point.y) for point, is_kept in zip(points, kept) if is_kept),
    }


def _points(number: int, entry: Entry, objectives: Sequence[str], x: int | None, y: int) -> list[_Point]:
    """The answers to one question, as far as they are not empty."""

    def listed(values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in zip(objectives, values, strict=True))

    prompt = " ".join(entry.prompt.split())
    shortened = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
    guided = f"guided at α = ({listed(entry.weights)}), β = {entry.beta:g}"
    shade = _shade(1.0 if x is None else entry.weights[x])
    return [
        _Point(number if x is None else measured[x], measured[y], f"{title}: {listed(measured)}\n{shortened}", fill)
        for measured, title, fill in ((entry.base, "base", None), (entry.guided, guided, shade))
        if measured is not None
    ]


def _shade(weight: float) -> str:
    """The colour of a weight from 0 to 1."""
    return to_hex(matplotlib.colormaps[SHADES](weight))
