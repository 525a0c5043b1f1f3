# SPDX-License-Identifier: Apache-2.0
"""Guidance: formulas of scorers as logits processors for `generate`."""

from .candidates import Rollout, TopKReward
from .guided import GuidedLogitsProcessor
from .language_model import LM
from .processors import (
    GenARMLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
)
from .prompts import Prompt
from .reward_processors import ARGSLogitsProcessor, TransferQLogitsProcessor
from .scorers import BASE, LinearCombination, PowerMean, Scorer
from .soup import rewarded_soup
from .speculative import SpeculativeDecoding
from .token_rewards import TokenReward, TokenRewards, token_rewards
from .trajectories import ClassifierReward, SequenceReward, TextReward, TrajectoryReward
from .vocabulary import Vocabulary


__all__ = [
    "ARGSLogitsProcessor",
    "BASE",
    "ClassifierReward",
    "GenARMLogitsProcessor",
    "GuidedLogitsProcessor",
    "LM",
    "LinearCombination",
    "MODLogitsProcessor",
    "MODWeakToStrongLogitsProcessor",
    "PARMLogitsProcessor",
    "PowerMean",
    "Prompt",
    "Rollout",
    "Scorer",
    "SpeculativeDecoding",
    "SequenceReward",
    "TextReward",
    "TokenReward",
    "TokenRewards",
    "TopKReward",
    "TrajectoryReward",
    "TransferQLogitsProcessor",
    "Vocabulary",
    "rewarded_soup",
    "token_rewards",
]
