# SPDX-License-Identifier: Apache-2.0
"""Texts of a batch that grow, and are taken back, at their own pace; and how models read them.

A cache is a rectangle, so what one row takes back and another keeps stays in it as a hole that the attention mask
hides. Keys carry their positions in the text, which the column in the cache does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache

from ..incoming import New
from ..prefix import can_take_back, rewindable_cache
from ..reading import Part, parts_of
from ..terms import LM


MOST_HOLES = 64
"""Holes that every row may have before the cache is packed."""


class Texts:
    """Prompts, padded as `generate` pads them, and what has been written after each.

    Args:
        prompt, mask (`torch.Tensor` of shape `(rows, columns)`): Token ids, and 1, or 0 for padding, of each.
        new, lengths (`torch.Tensor` of shape `(rows, n)` and `(rows,)`, *optional*):
            What has been written: the first so many of these ids.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        mask: torch.Tensor,
        new: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> None:
        self.prompt, self.mask = prompt, mask.long()
        self.new = prompt[:, :0] if new is None else new
        self.lengths = prompt.new_zeros(len(prompt)) if lengths is None else lengths

    def extended(self, tokens: torch.Tensor, counts: torch.Tensor | None = None) -> Texts:
        """These texts with more at their ends: the first `counts`, `(rows,)`, of `tokens`, `(rows, n)`, or all."""
        lengths = self.lengths + (tokens.shape[1] if counts is None else counts)
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        new = torch.cat([self.new, torch.zeros_like(tokens)], 1).scatter(1, places, tokens)
        return Texts(self.prompt, self.mask, new[:, : int(lengths.max())], lengths)

    def padded(self, token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of shape `(rows, columns + longest)`: short rows end in `token`."""
        written = torch.arange(self.new.shape[1], device=self.new.device) < self.lengths[:, None]
        ids = torch.cat([self.prompt, torch.where(written, self.new, token)], 1)
        return ids, torch.cat([self.mask, written.long()], 1)


class Reader:
    """Language models that read texts, after prompts of their `own`, ids and mask, if these are given."""

    def __init__(self, terms: Sequence[LM], own: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        parts = parts_of(None, list(dict.fromkeys(terms)), False, lambda term, copies: rewindable_cache(term.backbone))
        self._held = [_Held(part, own) for part in parts]

    def read(self, texts: Texts, last: int) -> dict[LM, torch.Tensor]:
        """The logits after each of the last tokens of every text, `(rows, last, vocab)`."""
        found = {term: logits for held in self._held for term, logits in held.read(texts, last).items()}
        return {term: logits.to(texts.prompt.device) for term, logits in found.items()}

    def room(self, texts: Texts) -> int | None:
        """How many tokens may be read together with these texts until a model has to read all of them anew, see
        [`turning_length`]; `None` for any number."""
        return min((room for held in self._held if (room := held.room(texts)) is not None), default=None)


class _Held:
    """What one set of weights has read, kept as far as the next texts begin with it.

    The tokens of a row are those columns of the cache that are `held`, in their order.
    """

    def __init__(self, part: Part, own: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.part, self.own = part, own
        if own is not None:
            part.terms[0].check_ids(own[0])
        self._forget()

    def _forget(self) -> None:
        nothing = torch.zeros(1, 0, dtype=torch.long, device=self.part.model.device)  # of any number of rows
        self.tokens, self.lengths, self.held = nothing, nothing.sum(1), nothing.bool()

    def room(self, texts: Texts) -> int | None:
        most = self.part.turning_length
        longest = 0 if most is None else int(self._left_aligned(texts, 1)[1].max())
        return None if most is None or longest > most else most - longest

    def read(self, texts: Texts, last: int) -> dict[LM, torch.Tensor]:
        self._check(len(texts.prompt))
        tokens, lengths = self._left_aligned(texts, last)
        most = self.part.turning_length
        if most is not None and self.part.turned != (int(lengths.max()) > most):
            self._forget()
        kept = self._keep(tokens, lengths, last)
        width = int((lengths - kept).max())
        positions = lengths[:, None] - width + torch.arange(width, device=tokens.device)
        self.held = torch.cat([self.held, positions >= kept[:, None]], 1)
        self.tokens, self.lengths = tokens, lengths
        positions = positions.clamp(min=0)
        return self.part.forward(New(tokens.gather(1, positions), self.held.long(), positions), {}, last)[0]

    def _check(self, rows: int) -> None:
        """Holes in a cache shift the windows of sliding attention, which are counted in columns, and a recurrent state
        has none."""
        if rows > 1 and not can_take_back(DynamicCache(config=self.part.model.config.get_text_config())):
            raise ValueError(
                f"{self.part.terms[0]!r} has sliding-window or linear attention, with which the rows of a batch can't "
                f"grow at their own pace. Decode the {rows} rows one at a time, or leave `custom_generate` out."
            )
        self.part.check_goes_on()

    def _left_aligned(self, texts: Texts, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own tokens, those that are masked moved to the right, and how many are not.

        It reads no tokens that it does not know, but something in their place among those that answers are wanted
        before: no answer may move. A prompt of its own is in its own vocabulary.
        """
        device, start, term = self.part.model.device, texts.prompt.shape[1], self.part.terms[0]
        tokens, mask = (x.to(device) for x in texts.padded())
        if term.vocabulary is not None:
            tokens, known = term.vocabulary.to_guide(tokens, term.embeddings)
            ends = start + texts.lengths.to(device)[:, None]
            columns = torch.arange(mask.shape[1], device=device)
            mask = mask * torch.where((columns > ends - last) & (columns < ends), 1, known)
        if self.own is not None:
            repeats = len(texts.prompt) // len(self.own[0])  # `generate` may have repeated the rows
            ids, seen = (part.to(device).repeat_interleave(repeats, 0) for part in self.own)
            tokens, mask = torch.cat([ids, tokens[:, start:]], 1), torch.cat([seen, mask[:, start:]], 1)
        lengths = (mask != 0).sum(1)
        if term.vocabulary is not None and bool((lengths < last).any()):
            raise ValueError(
                "A guide knows no token of a text, so that it has nothing to answer. Give its tokenizer and "
                "embeddings the base model's tokens."
            )
        order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
        return tokens.gather(1, order), lengths

    def _keep(self, tokens: torch.Tensor, lengths: torch.Tensor, last: int) -> torch.Tensor:
        """Takes back what the texts don't begin with, and returns how many tokens of each are left, `(rows,)`."""
        shared = min(self.tokens.shape[1], tokens.shape[1])
        places = torch.arange(shared, device=tokens.device)
        same = self.tokens[:, :shared] == tokens[:, :shared]
        same = same & (places < torch.minimum(self.lengths, lengths)[:, None])
        kept = torch.minimum(same.cumprod(1).sum(1), lengths - last)
        self.held = self.held & (self.held.cumsum(1) <= kept[:, None])
        used = self.held.any(0).nonzero()
        columns = int(used.max()) + 1 if len(used) else 0
        surplus = self.held.shape[1] - columns
        if columns == 0 or (surplus and not can_take_back(cast(Any, self.part.cache))):
            self.part.cache, columns = rewindable_cache(self.part.model), 0
        elif surplus:
            cast(Any, self.part.cache).crop(-surplus)
        self.held = self.held[:, :columns]
        if columns and int((~self.held).sum(1).min()) > MOST_HOLES:
            self._pack()
        return self.held.sum(1)

    def _pack(self) -> None:
        """Moves the holes of every row to its front, and drops the columns that are holes in all rows."""
        order = self.held.to(torch.uint8).argsort(dim=1, stable=True)[:, int((~self.held).sum(1).min()) :]
        of_all = order.repeat(len(self.part.terms), 1)
        for layer in cast(Any, self.part.cache).layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = of_all.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))
        self.held = self.held.gather(1, order)
