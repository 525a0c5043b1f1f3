# SPDX-License-Identifier: Apache-2.0
"""Evaluation: sweeps over preferences, measures and plots. Needs the extra `eval` for measures and figures.

Names load on first use: measures of a front (`metrics`) come without PyTorch, and tables without matplotlib.
"""

from typing import TYPE_CHECKING

from trl_parm.lazy import lazy_names


if TYPE_CHECKING:
    from .answers import describe_answers, repetition
    from .comparison import Pairing, compare, judge_pairs, pair_up
    from .decoding import Batch, Run
    from .evaluate import sweep
    from .formats import alpaca_eval_files, dataset_folder
    from .fronts import Front, arrange, pool_seeds, standardized, summarize
    from .measures import correlations, costs, differences, markdown, measure
    from .metrics import (
        Interval,
        bootstrap,
        hypervolume,
        mean_and_error,
        mean_inner_product,
        pareto_front,
        rank_correlations,
        seed_bootstrap,
        spread,
    )
    from .plots import draw_fronts, plot_front
    from .rescoring import rescore

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "answers": ("describe_answers", "repetition"),
        "comparison": ("Pairing", "compare", "judge_pairs", "pair_up"),
        "decoding": ("Batch", "Run"),
        "evaluate": ("sweep",),
        "formats": ("alpaca_eval_files", "dataset_folder"),
        "fronts": ("Front", "arrange", "pool_seeds", "standardized", "summarize"),
        "measures": ("correlations", "costs", "differences", "markdown", "measure"),
        "metrics": (
            "Interval", "bootstrap", "hypervolume", "mean_and_error", "mean_inner_product", "pareto_front",
            "rank_correlations", "seed_bootstrap", "spread",
        ),
        "plots": ("draw_fronts", "plot_front"),
        "rescoring": ("rescore",),
    },
)  # fmt: skip
