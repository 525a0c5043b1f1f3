# SPDX-License-Identifier: Apache-2.0
"""Training autoregressive reward models."""

from .config import PreferenceARMConfig
from .data import PreferenceCollator
from .trainer import PreferenceARMTrainer


__all__ = ["PreferenceARMConfig", "PreferenceARMTrainer", "PreferenceCollator"]
