# SPDX-License-Identifier: Apache-2.0
"""Training autoregressive reward models."""

from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, PreferenceCollator
from .trainer import PreferenceARMTrainer


__all__ = ["JointPreferenceDataset", "PreferenceARMConfig", "PreferenceARMTrainer", "PreferenceCollator"]
