# SPDX-License-Identifier: Apache-2.0
"""Where marks of a figure go: coinciding points are all seen, and far reference points don't press them together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke


FAR = 2.0
"""How many times the extent of the points a reference point may lie outside of them and still be drawn to scale."""
SAME = 0.025
"""Points that are nearer than this share of the plane have one label."""
Summary = Sequence[Mapping[str, Any]]


def by_method(summary: Summary) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, in the order in which methods first come."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        found.setdefault(row["method"], []).append(row)
    return found


def sizes(summary: Summary) -> list[float]:
    """Areas of the markers of each method, smaller and smaller, so that points in one place can all be seen."""
    numbers = {True: itertools.count(), False: itertools.count()}
    controls = [rows[0]["preference"] is None for rows in by_method(summary).values()]
    return [(130 if control else 80) * max(0.7 ** next(numbers[control]), 0.2) for control in controls]


def extent(summary: Summary, name: str) -> tuple[float, float, float]:
    """Between which values of an objective all points and intervals lie, and how far it is from one to the other."""
    middle, (down, up) = column(summary, name), reach(summary, name)
    low, high = float((middle - down).min()), float((middle + up).max())
    return low, high, (high - low) or abs(high) or 1.0


def is_near(point: Sequence[float], extents: Sequence[tuple[float, float, float]]) -> bool:
    return all(low - FAR * wide <= v <= high + FAR * wide for v, (low, high, wide) in zip(point, extents))


def mark(axes: Axes, extents: Sequence[tuple[float, float, float]], references: Sequence[tuple[float, float]]) -> None:
    """Limits that fit the points, and reference points, of which those far off are arrows at the edge with numbers."""
    near = [point for point in references if is_near(point, extents)]
    limits = []
    for i, (low, high, wide) in enumerate(extents):
        values = [low, high, *(point[i] for point in near)]
        limits.append((min(values) - 0.09 * wide, max(values) + 0.09 * wide))
    axes.set(xlim=limits[0], ylim=limits[1])
    for x, y in near:
        axes.scatter(x, y, marker="x", s=55, color="black", linewidth=1.6, zorder=5)
    for number, point in enumerate(point for point in references if point not in near):
        edge = float(np.clip(point[0], *limits[0])), float(np.clip(point[1], *limits[1]))
        inwards = [np.sign(at - value) for at, value in zip(edge, point)]
        axes.annotate(
            f"× {point[0]:g}, {point[1]:g}", edge, fontsize=8, textcoords="offset points", zorder=7,
            xytext=(34 * inwards[0] + (8 if not inwards[0] else 0), 26 * inwards[1] + 12 * number * (inwards[1] or 1)),
            ha="right" if inwards[0] < 0 else "left", va="center", arrowprops={"arrowstyle": "-|>", "color": "black"},
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def label(axes: Axes, points: Sequence[tuple[tuple[float, float], float]]) -> None:
    """Writes weights beside points; those of points in one place into one label."""
    wide = np.abs(np.diff([axes.get_xlim(), axes.get_ylim()])).ravel()
    groups: list[tuple[np.ndarray, list[float]]] = []
    for place, weight in sorted(points, key=lambda point: point[1]):
        at = np.array(place) / wide
        own = next((weights for there, weights in groups if np.abs(there - at).max() < SAME), None)
        if own is None:
            groups.append((at, own := []))
        own.append(weight)
    for at, weights in groups:
        axes.annotate(
            ", ".join(f"{weight:g}" for weight in weights), tuple(at * wide), xytext=(7, 6), fontsize=8, zorder=6,
            textcoords="offset points", path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def reach(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """How far intervals reach below and above their points, of shape `(2, points)`; nowhere for a single prompt."""
    middle = column(rows, name)
    reach = np.stack([middle - column(rows, f"{name}_low"), column(rows, f"{name}_high") - middle])
    return np.nan_to_num(reach).clip(min=0)
