# SPDX-License-Identifier: Apache-2.0
"""Guidance: formulas of scorers as logits processors for `generate`."""

from .language_model import LM
from .processors import PARMLogitsProcessor
from .scorers import BASE, GuidedLogitsProcessor, LinearCombination, Scorer


__all__ = ["BASE", "LM", "GuidedLogitsProcessor", "LinearCombination", "PARMLogitsProcessor", "Scorer"]
