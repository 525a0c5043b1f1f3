# SPDX-License-Identifier: Apache-2.0
"""Evaluation: sweeps over preferences, measures and plots. Needs the extra `eval`."""

from .metrics import hypervolume, mean_and_error, mean_inner_product, pareto_front
from .plots import plot_front
from .sweep import Run, summarize, sweep


__all__ = [
    "Run",
    "hypervolume",
    "mean_and_error",
    "mean_inner_product",
    "pareto_front",
    "plot_front",
    "summarize",
    "sweep",
]
