# SPDX-License-Identifier: Apache-2.0
"""The joint cache of fixed size: what compiled forwards and CUDA graphs need is that its memory stays where it is.

Keys and values of all rows, the base model's and those of its guides, are allocated before the first compiled
forward and written in place from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .joint import JointRows


class JointStaticCache(JointRows, StaticCache):
    """`generate`'s `cache_implementation="static"`, or the user's own [`StaticCache`]. It can't be taken back.

    `reset` empties it and keeps its memory, for the next call with as many rows and guides.
    """

    ordinary = StaticCache

    def make_room(self, rows: int) -> None:
        """Allocates anew what was allocated for another number of rows, all groups counted, and holds nothing yet."""
        for layer in self._allocated():
            if len(layer.keys) != rows:
                shapes = [(rows, layer.num_heads, 0, size) for size in (layer.k_head_dim, layer.v_head_dim)]
                layer.lazy_initialization(*(layer.keys.new_empty(shape) for shape in shapes))

    @property
    def is_allocated(self) -> bool:
        return any(True for _ in self._allocated())

    def expand(self, rows: torch.Tensor) -> None:
        self._select(rows)

    def note(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        # The next replay of a CUDA graph writes its logits to the same place.
        super().note(ids, logits.clone())

    def _keep_first(self, rows: int) -> None:
        if self.tokens.numel():
            self._select(torch.arange(rows))
        else:
            self.make_room(rows)

    def _select(self, rows: torch.Tensor) -> None:
        for layer in self._allocated():
            for name in ("keys", "values"):
                held = getattr(layer, name)
                selected = held.index_select(0, rows.to(held.device))
                torch._dynamo.mark_static_address(selected)
                setattr(layer, name, selected)
            layer.batch_size = len(rows)

    def _allocated(self) -> Iterator[Any]:
        return (layer for layer in self.layers if layer.is_initialized and isinstance(layer, StaticLayer))


def holds_plain_attention(cache: Cache) -> bool:
    """Whether a static cache has nothing but keys and values, on the device of the model."""
    static, plain = (StaticCache, JointStaticCache), (StaticLayer, StaticSlidingWindowLayer)
    return type(cache) in static and not cache.offloading and all(type(one) in plain for one in cache.layers)
