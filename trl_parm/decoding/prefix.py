# SPDX-License-Identifier: Apache-2.0
"""A key-value cache that is addressed by the tokens it holds."""

from __future__ import annotations

from typing import cast

import torch
from transformers import Cache


WINDOW = 32
"""How many positions of a single row are remembered."""


class Prefix:
    """The tokens that a cache holds, and the log-probabilities of the token after some of their prefixes, by length.

    Assisted decoding asks for the positions of a drafted window twice, once while it drafts and once while it
    verifies, and takes back what it rejects. It has one row, so remembering a window of positions costs little.

    Args:
        cache (`Cache`): A fresh cache.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
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
            if kept == 0 or not self.cache.is_croppable:
                return None
            self.cache.crop(kept - self.tokens.shape[1])
        return kept

    def extend(
        self, tokens: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor | None, log_probs: torch.Tensor
    ) -> None:
        """Notes that the cache now holds all of `tokens`, and what follows them."""
        kept = {n: answer for n, answer in self.log_probs.items() if n < tokens.shape[1]}
        recent = sorted(kept)[1 - WINDOW :] if len(tokens) == 1 else []
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
