# SPDX-License-Identifier: Apache-2.0
"""Reading texts that grow, and are taken back, at their own pace.

A cache is a rectangle, so what one row takes back and another keeps stays in it as a hole that the attention mask
hides. Keys carry their positions in the text, which the column in the cache does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..prefix import can_take_back, rewindable_cache
from ..reading import New, Part, parts_of
from ..terms import LM
from .texts import Texts, left_aligned


MOST_HOLES = 64
"""Holes that every row may have before the cache is packed."""


class Reader:
    """Language models that read texts; those that share their weights in one forward.

    Args:
        terms (`Sequence[LM]`): The models.
        own (`tuple` of two `torch.Tensor`, *optional*): Ids and mask of the prompts that they read in the place of the
            texts'.
    """

    def __init__(self, terms: Sequence[LM], own: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        parts = parts_of(None, list(dict.fromkeys(terms)), False, lambda term, copies: rewindable_cache(term.backbone))
        self.texts = [_Text(part, own) for part in parts]

    def read(self, texts: Texts, last: int) -> dict[LM, torch.Tensor]:
        """The logits after each of the last tokens of every text, shape `(rows, last, vocab)`.

        Raises:
            ValueError: several rows, and a model with sliding-window or linear attention.
        """
        return {term: logits for text in self.texts for term, logits in text.read(texts, last).items()}


class _Text:
    """What one set of weights has read of each row, kept as far as the next texts agree with it."""

    def __init__(self, part: Part, own: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.part, self.own = part, own
        self._forget()

    def _forget(self) -> None:
        self.part.cache = rewindable_cache(self.part.model)
        self.tokens = torch.empty(0, 0, dtype=torch.long)
        self.held = torch.empty(0, 0, dtype=torch.bool)

    def read(self, texts: Texts, last: int) -> dict[LM, torch.Tensor]:
        self._check(len(texts))
        device = self.part.model.device
        own = texts if self.own is None else texts.after(*self.own)
        tokens, mask = own.padded().to(device), own.padded_mask().to(device)
        if (vocabulary := self.part.terms[0].vocabulary) is not None:
            tokens, known = vocabulary.to_guide(tokens)
            mask = mask * known
        tokens, lengths = left_aligned(tokens, mask)
        kept = self._keep(tokens, lengths, last)
        width = int((lengths - kept).max())
        positions = lengths[:, None] - width + torch.arange(width, device=device)
        new = positions >= kept[:, None]
        positions = positions.clamp(min=0)
        ids = tokens.gather(1, positions)
        held = torch.cat([self.held, new], 1)
        answers, _ = self.part.forward(New(ids, held.to(torch.long), positions), {}, last)
        self.tokens, self.held = torch.cat([self.tokens, ids], 1), held
        return answers

    def _check(self, rows: int) -> None:
        """Holes in a cache shift the windows of sliding attention, which are counted in columns, and a recurrent state
        has none."""
        layers = DynamicCache(config=self.part.model.config.get_text_config()).layers
        if rows > 1 and any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError(
                f"{self.part.terms[0]!r} has sliding-window or linear attention, with which the rows of a batch can't "
                f"grow at their own pace. Decode the {rows} rows one at a time, or leave `custom_generate` out."
            )
        self.part.check_goes_on()

    def _keep(self, texts: torch.Tensor, lengths: torch.Tensor, last: int) -> torch.Tensor:
        """Takes back what the texts don't begin with, and returns how many tokens of each are left, `(rows,)`."""
        if len(self.tokens) != len(texts):
            self._forget()
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
        cache = cast(Any, self.part.cache)
        if columns == 0 or not can_take_back(cache):
            self.part.cache = rewindable_cache(self.part.model)
            columns = 0
        else:
            cache.crop(-surplus)
        self.tokens, self.held = self.tokens[:, :columns], self.held[:, :columns]

    def _pack(self) -> None:
        """Moves the holes of every row to its front, and drops the columns that are holes in all rows."""
        cache = cast(Any, self.part.cache)
        if not can_take_back(cache):
            return
        order = self.held.to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, int((~self.held).sum(1).min()) :]
        of_all = order.repeat(len(self.part.terms), 1)
        for layer in cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = of_all.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))
        self.tokens, self.held = self.tokens.gather(1, order), self.held.gather(1, order)
