# SPDX-License-Identifier: Apache-2.0
"""Preference-conditioned alignment at decoding time: train an autoregressive reward model, guide a frozen model.

Names load on first use, so that guidance works without the libraries of training or evaluation being imported.
"""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .decoding import (
        ARGS,
        BASE,
        LM,
        MOD,
        PARM,
        ARGSLogitsProcessor,
        ClassifierReward,
        GenARM,
        GenARMLogitsProcessor,
        Guided,
        GuidedLogitsProcessor,
        MODLogitsProcessor,
        MODWeakToStrong,
        MODWeakToStrongLogitsProcessor,
        PARMLogitsProcessor,
        PowerMean,
        Prompt,
        Rollout,
        Scorer,
        SequenceReward,
        SpeculativeDecoding,
        Step,
        TextReward,
        TokenReward,
        TokenRewards,
        TopKReward,
        TrajectoryReward,
        TransferQ,
        TransferQLogitsProcessor,
        Vocabulary,
        args,
        genarm,
        mod,
        mod_w2s,
        parm,
        rewarded_soup,
        token_rewards,
        transfer_q,
    )
    from .evaluation import hypervolume, mean_inner_product, pareto_front
    from .training import PreferenceARMConfig, PreferenceARMTrainer

_HOMES = {
    "decoding": (
        "ARGS",
        "ARGSLogitsProcessor",
        "BASE",
        "ClassifierReward",
        "GenARM",
        "GenARMLogitsProcessor",
        "Guided",
        "GuidedLogitsProcessor",
        "LM",
        "MOD",
        "MODLogitsProcessor",
        "MODWeakToStrong",
        "MODWeakToStrongLogitsProcessor",
        "PARM",
        "PARMLogitsProcessor",
        "PowerMean",
        "Prompt",
        "Rollout",
        "Scorer",
        "SequenceReward",
        "SpeculativeDecoding",
        "Step",
        "TextReward",
        "TokenReward",
        "TokenRewards",
        "TopKReward",
        "TrajectoryReward",
        "TransferQ",
        "TransferQLogitsProcessor",
        "Vocabulary",
        "args",
        "genarm",
        "mod",
        "mod_w2s",
        "parm",
        "rewarded_soup",
        "token_rewards",
        "transfer_q",
    ),
    "evaluation": ("hypervolume", "mean_inner_product", "pareto_front"),
    "training": ("PreferenceARMConfig", "PreferenceARMTrainer"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ARGS",
    "ARGSLogitsProcessor",
    "BASE",
    "ClassifierReward",
    "GenARM",
    "GenARMLogitsProcessor",
    "Guided",
    "GuidedLogitsProcessor",
    "LM",
    "MOD",
    "MODLogitsProcessor",
    "MODWeakToStrong",
    "MODWeakToStrongLogitsProcessor",
    "PARM",
    "PARMLogitsProcessor",
    "PowerMean",
    "PreferenceARMConfig",
    "PreferenceARMTrainer",
    "Prompt",
    "Rollout",
    "Scorer",
    "SequenceReward",
    "SpeculativeDecoding",
    "Step",
    "TextReward",
    "TokenReward",
    "TokenRewards",
    "TopKReward",
    "TrajectoryReward",
    "TransferQ",
    "TransferQLogitsProcessor",
    "Vocabulary",
    "__version__",
    "args",
    "genarm",
    "hypervolume",
    "mean_inner_product",
    "mod",
    "mod_w2s",
    "pareto_front",
    "parm",
    "rewarded_soup",
    "token_rewards",
    "transfer_q",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
