# SPDX-License-Identifier: Apache-2.0
"""What a model needs so that it can guide, and a cache of it that can be taken back."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peft_pblora.kv_cache import takes_cache


def check_guide(model: Any, backbone: PreTrainedModel) -> None:
    """Raises `ValueError` unless a model, whose transformer is `backbone`, is a causal LM with a key-value cache."""
    if backbone.config.is_encoder_decoder:
        raise ValueError("The guiding model is an encoder-decoder model. Only causal language models can guide.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("The guiding model is tuned by prompt learning. Only adapters on its layers can guide.")
    if backbone.get_output_embeddings() is None:
        raise ValueError(f"The guiding model is a {type(backbone).__name__}, but it must be a causal language model.")
    layers = DynamicCache(config=backbone.config.get_text_config()).layers
    recurrent = layers and not any(isinstance(layer, DynamicLayer) for layer in layers)
    if recurrent or not takes_cache(backbone):
        raise ValueError(
            f"The guiding model is a {type(backbone).__name__}, which has no key-value cache. Use a transformer "
            "as the guide."
        )


def rewindable_cache(model: Any) -> DynamicCache:
    """A cache that can be taken back at any length, where the model's layers allow it.

    Layers with a window of attention keep all that they have read: the mask says what they see.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def has_sliding_window(model: Any) -> bool:
    """Whether some layer of a model sees a window of columns only."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return any(type(layer) is DynamicSlidingWindowLayer for layer in layers)
