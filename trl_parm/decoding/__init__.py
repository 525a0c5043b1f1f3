# SPDX-License-Identifier: Apache-2.0
"""Guidance: a formula of language models as a model that generates, or as a logits processor."""

from trl_parm.algebra import BASE, Intersection, LinearCombination, PowerMean, Scorer, Step, Union

from .games import CAGE, CAGELogitsProcessor, cage
from .methods import MOD, PARM, GenARM, MODWeakToStrong, genarm, mod, mod_w2s, parm
from .model import Guided
from .processor import (
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
)
from .prompt import Prompt
from .search import ARGS, ARGSLogitsProcessor, TopKReward, TransferQ, TransferQLogitsProcessor, args, transfer_q
from .soup import rewarded_soup
from .speculative import SpeculativeDecoding
from .terms import LM
from .token_rewards import TokenReward, TokenRewards, token_rewards
from .trajectories import ClassifierReward, Rollout, SequenceReward, TextReward, TrajectoryReward
from .vocabulary import Vocabulary


__all__ = [
    "ARGS",
    "ARGSLogitsProcessor",
    "BASE",
    "CAGE",
    "CAGELogitsProcessor",
    "ClassifierReward",
    "GenARM",
    "GenARMLogitsProcessor",
    "Guided",
    "GuidedLogitsProcessor",
    "Intersection",
    "LM",
    "LinearCombination",
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
    "Union",
    "Vocabulary",
    "args",
    "cage",
    "genarm",
    "mod",
    "mod_w2s",
    "parm",
    "rewarded_soup",
    "token_rewards",
    "transfer_q",
]
