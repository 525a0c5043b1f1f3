# SPDX-License-Identifier: Apache-2.0
"""Search with reward models of whole texts: ARGS and Transfer-Q."""

from .candidates import Rollout, TopKReward
from .methods import ARGS, ARGSLogitsProcessor, TransferQ, TransferQLogitsProcessor, args, transfer_q
from .rewards import ClassifierReward, SequenceReward, TextReward, TrajectoryReward


__all__ = [
    "ARGS",
    "ARGSLogitsProcessor",
    "ClassifierReward",
    "Rollout",
    "SequenceReward",
    "TextReward",
    "TopKReward",
    "TrajectoryReward",
    "TransferQ",
    "TransferQLogitsProcessor",
    "args",
    "transfer_q",
]
