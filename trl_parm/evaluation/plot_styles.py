# SPDX-License-Identifier: Apache-2.0
"""How methods look in the pictures of Pareto fronts, and the legend that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#7F7F7F")
"""Told apart by colour-blind readers (Okabe and Ito 2008, a brown and a grey). Controls are black."""
MARKERS = "os^Dvph<>d"
"""Shapes of methods, which tell them apart without any colour."""
OPEN_MARKERS = "*P8"
"""Shapes of controls."""
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), (0, (8, 2)), (0, (2, 2)))
SHADES = "viridis"
"""Colours of α, from 0 to 1; they differ in lightness too."""
Summary = Sequence[Mapping[str, Any]]


def as_text(name: str) -> str:
    """A name as matplotlib shows it: no `$` in it begins a formula."""
    return name.replace("$", r"\$")


def by_method(summary: Summary) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, in the order in which methods first come."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary:
        found.setdefault(row["method"], []).append(row)
    return found


def styles(summary: Summary) -> list[tuple[str, str, Any]]:
    """Colour, marker and line of each method; no two of eight share a colour, of ten a marker. Controls are black."""
    found, controls, methods = [], 0, 0
    for rows in by_method(summary).values():
        if rows[0]["preference"] is None:
            found.append(("black", OPEN_MARKERS[controls % len(OPEN_MARKERS)], "none"))
            controls += 1
        else:
            style = (COLOURS, MARKERS, LINES)
            found.append(tuple(choices[methods % len(choices)] for choices in style))
            methods += 1
    return found


def legend(figure: Figure, summary: Summary, references: int, connect: bool = False, crosses: bool = True) -> None:
    """Below the panels, so that it hides no point."""
    handles = []
    for (name, rows), (colour, marker, line) in zip(by_method(summary).items(), styles(summary)):
        control = rows[0]["preference"] is None
        handles.append(
            Line2D(
                [], [], color=colour, marker=marker, ls=line if connect and not control else "none", lw=1.3,
                label=as_text(name), markersize=9 if control else 7, markerfacecolor="white" if control else colour,
            )
        )  # fmt: skip
    if crosses:
        handles.append(Line2D([], [], color="0.5", marker="+", ls="none", label="95 % interval", markersize=11))
    if references:
        label = "reference point" if references == 1 else "reference points"
        handles.append(Line2D([], [], color="black", marker="x", ls="none", label=label, markersize=7))
    columns = min(len(handles), 3 if figure.get_figwidth() < 8 else 6)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
