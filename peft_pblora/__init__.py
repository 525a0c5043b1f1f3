# SPDX-License-Identifier: Apache-2.0
"""Preference-conditioned adapters as PEFT methods. Importing this package registers them with PEFT."""

from .config import PBLoraConfig, PreferenceConfig
from .control import get_objectives, get_preference, set_preference, use_preference
from .model import PBLoraModel
from .preference import as_preference, name_preference, preference_grid, sample_preferences
from .registration import PeftType, register


register(PeftType.PBLORA, PBLoraConfig, PBLoraModel)

__all__ = [
    "PBLoraConfig",
    "PBLoraModel",
    "PreferenceConfig",
    "as_preference",
    "get_objectives",
    "get_preference",
    "name_preference",
    "preference_grid",
    "sample_preferences",
    "set_preference",
    "use_preference",
]
