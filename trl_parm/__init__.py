# SPDX-License-Identifier: Apache-2.0
"""Preference-conditioned alignment at decoding time: train an autoregressive reward model, guide a frozen model."""

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .version import __version__


if TYPE_CHECKING:
    from .cpu import optimize_for_cpu, undo_optimize_for_cpu
    from .decoding import *
    from .evaluation import hypervolume, mean_inner_product, pareto_front
    from .preference_text import PreferenceText
    from .training import PreferenceARMConfig, PreferenceARMTrainer

_DECODING = (
    "ARGS", "ARGSLogitsProcessor", "BASE", "CAGE", "CAGELogitsProcessor", "ClassifierReward", "GenARM",
    "GenARMLogitsProcessor", "Guided", "GuidedLogitsProcessor", "Intersection", "LM", "LinearCombination", "MOD",
    "MODLogitsProcessor", "MODWeakToStrong", "MODWeakToStrongLogitsProcessor", "PARM", "PARMLogitsProcessor",
    "PowerMean", "Prompt", "Rollout", "Scorer", "SequenceReward", "SpeculativeDecoding", "Step", "TextReward",
    "TokenReward", "TokenRewards", "TopKReward", "TrajectoryReward", "TransferQ", "TransferQLogitsProcessor",
    "Union", "Vocabulary", "args", "cage", "genarm", "mod", "mod_w2s", "parm", "rewarded_soup", "token_rewards",
    "transfer_q",
)  # fmt: skip
__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cpu": ("optimize_for_cpu", "undo_optimize_for_cpu"),
        "decoding": _DECODING,
        "evaluation": ("hypervolume", "mean_inner_product", "pareto_front"),
        "preference_text": ("PreferenceText",),
        "training": ("PreferenceARMConfig", "PreferenceARMTrainer"),
        "version": ("__version__",),
    },
)
