# SPDX-License-Identifier: Apache-2.0
"""What caches hold, and how the tokens that are asked for next go on from those that were read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer


def follow(old: torch.Tensor, new: torch.Tensor, alike: torch.Tensor | None = None) -> tuple[torch.Tensor | None, int]:
    """Of which old row each new one is a continuation, and how many columns they share.

    Args:
        old, new (`torch.Tensor` of shape `(rows, columns)`): Tokens, of different widths.
        alike (`torch.Tensor` of shape `(new rows, old rows)`, *optional*): Which rows may go on from which.

    Returns:
        `tuple` of the old rows to take, or `None` to take them as they are, and the number of columns.
    """
    shared = min(old.shape[1], new.shape[1])
    old, new = old[:, :shared], new[:, :shared]
    if old.shape == new.shape and torch.equal(old, new):
        return None, shared
    same = (new[:, None] == old[None]).all(-1)
    if alike is not None:
        same &= alike.to(same.device)
    if bool(same.any(1).all()):
        return same.int().argmax(1), shared
    return None, int((old == new).all(0).cumprod(0).sum()) if len(old) == len(new) else 0


def can_take_back(cache: Cache) -> bool:
    """Whether any number of tokens can be taken back from a cache."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def turning_length(model: Any) -> int | None:
    """The longest text whose keys a model turns by the factors of short ones, where it has others for longer texts
    (LongRoPE, arXiv 2402.13753): what it has read of a text that outgrows it must be read anew. `None` for others."""
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [given, *(kind for kind in given.values() if isinstance(kind, Mapping))]  # of all layers, or of each type
    own = getattr(config, "original_max_position_embeddings", None)
    found = [
        kind.get("original_max_position_embeddings", own) for kind in kinds if kind.get("rope_type") == "longrope"
    ]
    return min((length for length in found if length is not None), default=None)


def check_reorders(cache: Cache) -> None:
    """Raises `ValueError` for a cache whose rows can't change places, as beams do: a release of transformers in which
    quantised layers move only what they haven't quantised yet."""
    for layer in layers_of(cache):
        if isinstance(layer, QuantizedLayer) and type(layer).reorder_cache is DynamicLayer.reorder_cache:
            raise ValueError(
                "Beam search with a quantised cache needs a newer transformers (5.24): in this one, what is "
                "quantised stays where other beams are now. Use another cache, or `num_beams=1`."
            )


def rewindable_cache(model) -> DynamicCache:
    """A cache that can be taken back at any length, where the model's layers allow it.

    Layers with a window of attention keep all that they have read: the mask says what they see.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def holds(cache: Any) -> bool:
    """Whether a cache has read anything."""
    return any(
        getattr(layer, "is_initialized", False) or any(getattr(layer, "has_previous_state", {}).values())
        for layer in layers_of(cache)
    )


def empty(cache: Cache) -> None:
    """Makes a cache forget what it has read. Layers that grow are dropped, not filled with zeros, which releases of
    transformers took for tokens."""
    cache.reset()
    for layer in layers_of(cache):
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache, of an encoder-decoder model's too."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return cache.layers
