# SPDX-License-Identifier: Apache-2.0
"""Guidance: formulas of scorers as logits processors for `generate`."""

from .guided import GuidedLogitsProcessor
from .language_model import LM
from .processors import (
    GenARMLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
)
from .prompts import Prompt
from .scorers import BASE, LinearCombination, PowerMean, Scorer
from .vocabulary import Vocabulary


__all__ = [
    "BASE",
    "LM",
    "GenARMLogitsProcessor",
    "GuidedLogitsProcessor",
    "LinearCombination",
    "MODLogitsProcessor",
    "MODWeakToStrongLogitsProcessor",
    "PARMLogitsProcessor",
    "PowerMean",
    "Prompt",
    "Scorer",
    "Vocabulary",
]
