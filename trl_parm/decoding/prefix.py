# SPDX-License-Identifier: Apache-2.0
"""A key-value cache that is addressed by the tokens it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


WINDOW = 32
"""How many positions of a single text are remembered."""


def window_of(rows: int) -> int:
    """How many answers to remember for a batch of so many texts."""
    return WINDOW if rows == 1 else 1


class Prefix:
    """The tokens that a cache holds, and the log-probabilities of the token after some of their prefixes, by length.

    Assisted decoding asks for the positions of a drafted window twice, once while it drafts and once while it
    verifies, and takes back what it rejects. It has one text, so remembering a window of positions costs little.

    Args:
        cache (`Cache`): A fresh cache.

    Attributes:
        window (`int`): How many answers are remembered. With 1, the cache holds no more than was last asked for.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.window = cache, 1
        self.tokens = torch.empty(0, 0, dtype=torch.long)
        self.mask = self.tokens
        self.groups: torch.Tensor | None = None
        self.log_probs: dict[int, torch.Tensor] = {}

    def align(self, tokens: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor | None) -> int | None:
        """Makes the cache hold a prefix of `tokens`, its rows in their order, and returns the prefix's length.

        Args:
            tokens, mask (`torch.Tensor` of shape `(rows, length)`): What the model is to have read.
            groups (`torch.Tensor` of shape `(rows,)`, *optional*): Rows of one number share what else a cache depends
                on, such as a preference.

        Returns:
            `int` or `None`: The full length only where `log_probs` has the answer already, and then the cache may hold
            more; else at least one token is left to feed. `None` if nothing of this cache can be used.
        """
        length = min(tokens.shape[1], self.tokens.shape[1])
        old = torch.where(self.mask[:, :length].bool(), self.tokens[:, :length], -1)
        new = torch.where(mask[:, :length].bool(), tokens[:, :length], -1)
        if not torch.equal(old, new):
            length = self._follow(old, new, groups)
        if length == tokens.shape[1] and length in self.log_probs:
            return length
        kept = min(length, tokens.shape[1] - 1)
        if kept < self.tokens.shape[1]:
            if kept == 0 or not all(type(layer) is DynamicLayer for layer in self.cache.layers):
                return None
            self.cache.crop(kept - self.tokens.shape[1])
        return kept

    def extend(
        self, tokens: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor | None, log_probs: torch.Tensor
    ) -> None:
        """Notes that the cache now holds all of `tokens`, and what follows them."""
        kept = {n: answer for n, answer in self.log_probs.items() if n < tokens.shape[1]}
        recent = sorted(kept)[1 - self.window :] if self.window > 1 else []
        self.log_probs = {n: kept[n] for n in recent} | {tokens.shape[1]: log_probs}
        self.tokens, self.mask, self.groups = tokens.clone(), mask, groups

    def _follow(self, old: torch.Tensor, new: torch.Tensor, groups: torch.Tensor | None) -> int:
        """Reorders the cache where every new row continues some cached row; else finds the prefix that all share."""
        matches = (new[:, None] == old[None]).all(-1)
        if groups is not None and self.groups is not None:
            matches &= (groups[:, None] == self.groups[None]).to(matches.device)
        if not matches.any(1).all():
            return int((old == new).all(0).cumprod(0).sum()) if len(old) == len(new) else 0
        rows = matches.int().argmax(1)
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.tokens, self.mask, self.groups = self.tokens[rows], self.mask[rows], groups
        self.log_probs = {length: answer[rows] for length, answer in self.log_probs.items()}
        return new.shape[1]


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache], torch.Tensor]
"""Feeds `(new tokens, mask of all tokens, positions of the new ones, cache)` and returns one answer for each row."""


def read(
    prefix: Prefix | None,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    forward: Forward,
    new_cache: Callable[[], Cache],
    groups: torch.Tensor | None = None,
    window: int = 1,
) -> Prefix:
    """Makes a model have read `tokens`, feeding those alone that its cache does not hold.

    Args:
        prefix ([`Prefix`], *optional*): What it has read before; it is used up.
        tokens, mask (`torch.Tensor` of shape `(rows, length)`): What it shall have read, padding left out.
        forward (`Callable`): See [`Forward`].
        new_cache (`Callable`): Makes a fresh cache.
        groups (`torch.Tensor` of shape `(rows,)`, *optional*): See [`Prefix.align`].
        window (`int`, *optional*, defaults to 1): See [`Prefix`].

    Returns:
        [`Prefix`], with the answer after `tokens` under their length in `log_probs`.
    """
    kept = prefix.align(tokens, mask, groups) if prefix else None
    if prefix is None or kept is None:
        prefix, kept = Prefix(new_cache()), 0
    prefix.window = window
    if kept < tokens.shape[1]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, kept:]
        prefix.extend(tokens, mask, groups, forward(tokens[:, kept:], mask, positions, prefix.cache))
    return prefix
