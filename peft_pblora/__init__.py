# SPDX-License-Identifier: Apache-2.0
"""Preference-conditioned adapters as PEFT methods. Importing this package registers them with PEFT."""

from .card import add_results, push_to_hub, write_card
from .combine import from_loras
from .config import MoSLoraConfig, PBLoraConfig, PreferenceConfig, SVDLoraConfig
from .control import get_objectives, get_preference, set_preference, use_preference
from .descriptions import embed_objectives
from .export import save_as_lora
from .loading import check_adapter, load_adapter
from .model import register
from .preference import as_preference, name_preference, preference_grid, sample_preferences


PBLoraModel = register("PBLORA", PBLoraConfig)
SVDLoraModel = register("SVDLORA", SVDLoraConfig)
MoSLoraModel = register("MOSLORA", MoSLoraConfig)

__all__ = [
    "MoSLoraConfig", "MoSLoraModel", "PBLoraConfig", "PBLoraModel", "PreferenceConfig", "SVDLoraConfig",
    "SVDLoraModel", "add_results", "as_preference", "check_adapter", "embed_objectives", "from_loras",
    "get_objectives", "get_preference", "load_adapter", "name_preference", "preference_grid", "push_to_hub",
    "register", "sample_preferences", "save_as_lora", "set_preference", "use_preference", "write_card",
]  # fmt: skip
