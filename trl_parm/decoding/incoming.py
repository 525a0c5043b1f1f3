# SPDX-License-Identifier: Apache-2.0
"""What is handed over to be read next: the model's own text, or what a guide reads in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from peft_pblora.adapter import check_rows

from .terms import LM


@dataclass(frozen=True)
class New:
    """What `generate` hands over to be read next, for each of its rows.

    Attributes:
        ids (`torch.Tensor` of shape `(rows, new)`): Tokens that were not read yet.
        mask (`torch.Tensor` of shape `(rows, columns)` or `None`): 0 for padding, of all tokens; `None` if none is.
        positions (`torch.Tensor` of shape `(rows or 1, new)` or `None`): In the text; of the mask if not given.
        own (`tuple` or `None`): A guide's own prompt in the place of the text's first `prompt` columns: ids and mask.
        prompt (`int`): Columns of the text that are the prompt.
        start (`int`): Columns of the text that were read before.
        unknown (`torch.Tensor` of shape `(rows, new)` or `None`): True for tokens of the text that a guide of another
            vocabulary does not know; they are masked.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    own: tuple[torch.Tensor, torch.Tensor] | None = None
    prompt: int = 0
    start: int = 0
    unknown: torch.Tensor | None = None

    def split(self, columns: int) -> tuple[New, New]:
        """The first columns, and the others, to be read one after the other; of a text that is the model's own."""

        def part(x: torch.Tensor | None, which: slice) -> torch.Tensor | None:
            return None if x is None else x[:, which]

        first, others = slice(columns), slice(columns, None)
        return (
            New(self.ids[:, first], part(self.mask, first), part(self.positions, first), start=self.start),
            New(self.ids[:, others], self.mask, part(self.positions, others), start=self.start + columns),
        )

    def for_guide(self, term: LM, former: torch.Tensor | None) -> New:
        """What a guide reads, with the mask of all that it has read then.

        Args:
            term ([`LM`]): The guide.
            former (`torch.Tensor` of shape `(rows, columns)` or `None`): The mask of what it has read before, where it
                is not the text's own.
        """
        device = term.backbone.device
        if self.own is None and term.vocabulary is None:
            if self.ids.shape[1] > 1:  # what is decoded is in its vocabulary, which is compared with the base's
                term.check_ids(self.ids)
            mask, positions = (None if x is None else x.to(device) for x in (self.mask, self.positions))
            return New(self.ids.to(device), mask, positions, start=self.start)
        ids = self.ids.to(device)
        if self.own is not None:
            ids = ids[:, max(0, self.prompt - self.start) :]
        seen = torch.ones_like(ids)
        if self.own is None and self.mask is not None:
            seen = self.mask[:, -ids.shape[1] :].to(seen)
        unknown = None
        if term.vocabulary is not None:
            ids, known = term.vocabulary.to_guide(ids, term.embeddings)
            unknown, seen = (seen != 0) & (known == 0), seen * known
        if self.own is not None and former is None:
            check_rows(len(self.own[0]), len(ids))
            repeats = len(ids) // len(self.own[0])
            prompt, prompt_mask = (part.to(device).repeat_interleave(repeats, 0) for part in self.own)
            term.check_ids(prompt)
            ids, seen = torch.cat([prompt, ids], 1), torch.cat([prompt_mask.to(seen), seen], 1)
            if unknown is not None:
                unknown = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), unknown], 1)
        mask = seen if former is None else torch.cat([former, seen], 1)
        return New(ids, mask, unknown=unknown)

    def answered(self, last: int) -> torch.Tensor | None:
        """The columns at which a guide answers for the `last` ones, `(rows, last)`: for a token that it does not know,
        at the one before that it does. `None` if it knows all of them.

        Raises:
            ValueError: a text of which it knows no token so far, or none of what was added.
        """
        if self.unknown is None or not bool(self.unknown[:, -last:].any()):
            return None
        columns = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        read = cast(torch.Tensor, self.mask)[:, -self.ids.shape[1] :] != 0
        before = torch.where(read, columns, -1).cummax(1).values
        found = torch.where(self.unknown, before, columns)[:, -last:]
        if bool((found < 0).any()):
            raise ValueError(
                "A guide knows no token of a text, or none of those with which it goes on, so that it has nothing to "
                "answer. Give its tokenizer and embeddings the base model's tokens."
            )
        return found
