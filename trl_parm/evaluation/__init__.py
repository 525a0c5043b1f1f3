# SPDX-License-Identifier: Apache-2.0
"""Evaluation: sweeps over preferences, measures and plots. Needs the extra `eval`.

Names load on first use, so that measures and plots work without PyTorch being imported.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .decoding import Batch, Run
    from .evaluate import sweep
    from .fronts import Front, arrange, summarize
    from .intervals import Interval, bootstrap
    from .measures import correlations, costs, differences, markdown, measure
    from .metrics import hypervolume, mean_and_error, mean_inner_product, pareto_front, rank_correlations
    from .plots import draw_fronts, plot_front

_HOMES = {
    "decoding": ("Batch", "Run"),
    "evaluate": ("sweep",),
    "fronts": ("Front", "arrange", "summarize"),
    "intervals": ("Interval", "bootstrap"),
    "measures": ("correlations", "costs", "differences", "markdown", "measure"),
    "metrics": ("hypervolume", "mean_and_error", "mean_inner_product", "pareto_front", "rank_correlations"),
    "plots": ("draw_fronts", "plot_front"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "Front",
    "Interval",
    "Run",
    "arrange",
    "bootstrap",
    "correlations",
    "costs",
    "differences",
    "draw_fronts",
    "hypervolume",
    "markdown",
    "mean_and_error",
    "mean_inner_product",
    "measure",
    "pareto_front",
    "plot_front",
    "rank_correlations",
    "summarize",
    "sweep",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
