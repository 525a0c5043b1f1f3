# SPDX-License-Identifier: Apache-2.0
"""Training autoregressive reward models."""

from .collator import PreferenceCollator
from .config import PreferenceARMConfig
from .trainer import PreferenceARMTrainer


__all__ = ["PreferenceARMConfig", "PreferenceARMTrainer", "PreferenceCollator"]
