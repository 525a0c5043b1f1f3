# SPDX-License-Identifier: Apache-2.0
"""A key-value cache of rows that grow, and are taken back, at their own pace.

A cache is a rectangle, so what one row takes back and another keeps stays in it as a hole that the attention mask
hides. Keys carry their positions in the text, which the column in the cache does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


ReadTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache, int], torch.Tensor]
"""Feeds `(new tokens, mask of all columns, their positions, cache, last)` and returns logits of the last tokens."""

MOST_HOLES = 64
"""Holes that every row may have before the cache is packed."""


class TextCache:
    """What a model has read of each row, kept as far as the next texts agree with it.

    Args:
        new_cache (`Callable[[], Cache]`): Makes an empty cache.
    """

    def __init__(self, new_cache: Callable[[], Cache]) -> None:
        self._new_cache = new_cache
        self.reset()

    def reset(self) -> None:
        """Forgets all texts."""
        self.cache = self._new_cache()
        self.tokens = torch.empty(0, 0, dtype=torch.long)
        self.held = torch.empty(0, 0, dtype=torch.bool)

    def read(self, tokens: torch.Tensor, mask: torch.Tensor, last: int, forward: ReadTokens) -> torch.Tensor:
        """Makes the model have read the texts, feeding what the cache does not hold.

        Args:
            tokens, mask (`torch.Tensor` of shape `(rows, columns)`): The texts; masked tokens are no part of them.
            last (`int`): Of how many tokens at the end of every text the answers are wanted, not above its length.
            forward (`Callable`): See [`ReadTokens`].

        Returns:
            `torch.Tensor` of shape `(rows, last, vocab)`: the logits after each of the last tokens.
        """
        texts, lengths = left_aligned(tokens, mask)
        kept = self._keep(texts, lengths, last)
        width = int((lengths - kept).max())
        positions = lengths[:, None] - width + torch.arange(width, device=texts.device)
        new = positions >= kept[:, None]
        positions = positions.clamp(min=0)
        ids = texts.gather(1, positions)
        held = torch.cat([self.held, new], 1)
        logits = forward(ids, held.to(torch.long), positions, self.cache, last)
        self.tokens, self.held = torch.cat([self.tokens, ids], 1), held
        return logits[:, -last:]

    def _keep(self, texts: torch.Tensor, lengths: torch.Tensor, last: int) -> torch.Tensor:
        """Takes back what the texts don't begin with, and returns how many tokens of each are left, `(rows,)`."""
        if len(self.tokens) != len(texts):
            self.reset()
            self.tokens, self.held = texts[:, :0], texts[:, :0].bool()
        old, old_lengths = left_aligned(self.tokens, self.held)
        shared = min(old.shape[1], texts.shape[1])
        places = torch.arange(shared, device=texts.device)
        same = (old[:, :shared] == texts[:, :shared]) & (places < torch.minimum(old_lengths, lengths)[:, None])
        kept = torch.minimum(same.cumprod(1).sum(1), lengths - last)
        self.held = self.held & (self.held.cumsum(1) <= kept[:, None])
        self._crop(int(self.held.any(0).sum()) and int(self.held.any(0).nonzero().max()) + 1)
        if self.held.numel() and int((~self.held).sum(1).min()) > MOST_HOLES:
            self._pack()
        return self.held.sum(1)

    def _crop(self, columns: int) -> None:
        surplus = self.tokens.shape[1] - columns
        if surplus == 0:
            return
        if columns == 0 or not self._takes_back:
            self.cache = self._new_cache()
            columns = 0
        else:
            self.cache.crop(-surplus)
        self.tokens, self.held = self.tokens[:, :columns], self.held[:, :columns]

    @property
    def _takes_back(self) -> bool:
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def _pack(self) -> None:
        """Moves the holes of every row to its front, and drops the columns that are holes in all rows."""
        if not self._takes_back:
            return
        order = self.held.to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, int((~self.held).sum(1).min()) :]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = order.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))
        self.tokens, self.held = self.tokens.gather(1, order), self.held.gather(1, order)


def left_aligned(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves what is not masked to the left, in its order, and counts it: `(rows, columns)` and `(rows,)`."""
    order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return tokens.gather(1, order), (mask != 0).sum(1)
