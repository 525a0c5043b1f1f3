# SPDX-License-Identifier: Apache-2.0
"""The Pareto picture of a session, as SVG: it needs no script, follows the page's colours and tells more on hovering.

An open point is an answer of the base model, a filled one is guided, coloured by a weight; a line joins the two to one
question. One objective is drawn over the number of the question, more in planes.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from trl_parm.evaluation import pareto_front
from trl_parm.evaluation.plots import SHADES

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

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool) -> None:
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or max(0.5 if whole else 0.0, 0.1 * abs(high), 0.1)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        ticks = MaxNLocator(5, integer=whole).tick_values(self.low, self.high)
        self.ticks = [tick for tick in ticks if self.low <= tick <= self.high]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def picture(entries: Sequence[Entry], objectives: Sequence[str]) -> str:
    """HTML with the session's answers in planes of two objectives; a note if there are none."""
    if not any(entry.base or entry.guided for entry in entries):
        return '<div class="parm-empty">Every answer becomes a point here.</div>'
    k = len(objectives)
    if k == 1:
        pairs = [(None, 0)]
    else:
        pairs = itertools.combinations(range(k), 2) if k <= MOST_PAIRED else itertools.pairwise(range(k))
    planes = "".join(_plane(entries, objectives, x, y) for x, y in pairs)
    return f'<div class="parm-planes">{planes}</div>{_legend(k)}'


def _plane(entries: Sequence[Entry], objectives: Sequence[str], x: int | None, y: int) -> str:
    """The answers by two of their measures, or by one over the number of the question."""
    questions = [_points(number, entry, objectives, x, y) for number, entry in enumerate(entries, 1)]
    points = [point for question in questions for point in question]
    xs = _Scale([point.x for point in points], LEFT, RIGHT, whole=x is None)
    ys = _Scale([point.y for point in points], BOTTOM, TOP, whole=False)
    x_name, y_name = html.escape("question" if x is None else objectives[x]), html.escape(objectives[y])
    parts = [_axes(xs, ys, x_name, y_name)]
    if x is not None:  # a line through the answers that no other one beats in both objectives
        kept = pareto_front([[point.x, point.y] for point in points])
        best = sorted((point.x, point.y) for point, is_kept in zip(points, kept, strict=True) if is_kept)
        path = " ".join(f"{xs(x):.1f},{ys(y):.1f}" for x, y in best)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for question in questions:
        newest = " newest" if question is questions[-1] else ""
        spots = [(f"{xs(point.x):.1f}", f"{ys(point.y):.1f}", point) for point in question]
        if len(spots) == 2:
            (x1, y1, _), (x2, y2, _) = spots
            parts.append(f'<line class="pair{newest}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        for cx, cy, point in spots:
            kind, fill = ("guided", f' fill="{point.fill}"') if point.fill else ("base", "")
            parts.append(
                f'<circle class="{kind}{newest}" cx="{cx}" cy="{cy}" r="{6.5 if newest else 5}"{fill}>'
                f"<title>{html.escape(point.title)}</title></circle>"
            )
    label = f"{y_name} over {x_name} of {len(points)} answers"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _points(number: int, entry: Entry, objectives: Sequence[str], x: int | None, y: int) -> list[_Point]:
    """The answers to one question, as far as they are not empty."""

    def listed(values: Sequence[float]) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in zip(objectives, values, strict=True))

    points = []
    guided_title = f"guided at α = ({listed(entry.weights)}), β = {entry.beta:g}"
    guided_fill = _shade(1.0 if x is None else entry.weights[x])
    for measured, title, fill in ((entry.base, "base", None), (entry.guided, guided_title, guided_fill)):
        if measured is not None:
            across = number if x is None else measured[x]
            title = f"{title}: {listed(measured)}\n{_shortened(entry.prompt)}"
            points.append(_Point(across, measured[y], title, fill))
    return points


def _axes(xs: _Scale, ys: _Scale, x_name: str, y_name: str) -> str:
    parts = []
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 15}" text-anchor="middle">{_number(tick)}</text>')
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    centre, middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{x_name} →</text>'
        f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{y_name} →</text>'
    )
    return "".join(parts)


def _legend(k: int) -> str:
    colours = ", ".join(_shade(i / 4) for i in range(5))
    bar = f'<span class="parm-bar" style="background: linear-gradient(90deg, {colours})"></span>'
    weight = f"<span>weight of the x axis' objective: 0 {bar} 1</span>" if k > 1 else ""
    front = '<span><i class="parm-line"></i> no answer beats these in both</span>' if k > 1 else ""
    return (
        '<div class="parm-legend"><span><i class="parm-dot"></i> base</span>'
        f'<span><i class="parm-dot" style="background: {_shade(0.5 if k > 1 else 1.0)}"></i> guided</span>'
        f"{weight}{front}</div>"
    )


def _shade(weight: float) -> str:
    """The colour of a weight from 0 to 1."""
    return to_hex(matplotlib.colormaps[SHADES](weight))


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _shortened(text: str, most: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
