# SPDX-License-Identifier: Apache-2.0
"""One key-value cache for the rows of the base model and those of its guides."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any, ClassVar, Self, cast

import torch
from transformers import Cache, DynamicCache

from .prefix import WINDOW


class JointRows(Cache):
    """A cache of R rows, to `generate`, that holds R more for each guide: [base | guide 1 | guide 2 | ...].

    Whatever `generate` does with its rows (beams, taking back a rejected draft) happens to those of the guides too. It
    also knows the tokens that it holds, so that an answer is only given for the very prefix that was asked for.

    Attributes:
        groups (`dict`): Guide → number of its group of rows; 0 for one that equals the base model.
        tokens (`torch.Tensor` of shape `(rows, length)`): What every group has read.
    """

    ordinary: ClassVar[type[Cache]]
    """The class that it is to `generate`."""
    groups: dict[Hashable, int]
    tokens: torch.Tensor
    _answers: dict[int, torch.Tensor]
    _asked: torch.Tensor | None

    @classmethod
    def adopt(cls, cache: Cache, groups: dict[Hashable, int]) -> Self:
        """Makes an empty cache of `generate` a joint one: the same object, which `generate` goes on to use."""
        cast(Any, cache).__class__ = cls
        joint = cast(Self, cache)
        joint.groups = groups
        joint._forget()
        return joint

    def _forget(self) -> None:
        self.tokens, self._answers, self._asked = torch.empty(0, 0, dtype=torch.long), {}, None

    def release(self, rows: int) -> None:
        """Makes it an ordinary cache again, with the rows of the base model alone, of which there are so many."""
        self._keep_first(rows)
        for name in ("groups", "tokens", "_answers", "_asked"):
            delattr(self, name)
        cast(Any, self).__class__ = self.ordinary

    def _keep_first(self, rows: int) -> None:
        """Keeps the base model's rows."""
        raise NotImplementedError

    def expand(self, rows: torch.Tensor) -> None:
        """Copies rows, of all groups together, into their places."""
        raise NotImplementedError

    @property
    def copies(self) -> int:
        """Groups of rows, the base model's included."""
        return 1 + max(self.groups.values())

    def note(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Remembers what was fed, of shape `(rows, new)`, and what came out, `(copies · rows, kept, vocab)`.

        Of a single row the answers of a window are kept: they are asked for again when a draft is verified.
        """
        self.tokens = torch.cat([self.tokens, ids], 1) if self.tokens.numel() else ids.clone()
        held, kept = self.tokens.shape[1], logits.shape[1]
        former = sorted(self._answers)[-WINDOW:] if len(ids) == 1 else []
        self._answers = {length: self._answers[length] for length in former}
        self._answers |= {held - kept + 1 + i: logits[:, i] for i in range(kept)}
        self._asked = None

    def logits_of(self, guide: Hashable, input_ids: torch.Tensor) -> torch.Tensor | None:
        """What a guide said after exactly these tokens, shape `(rows, vocab)`, or `None` if it was not asked that."""
        answer = self._answers.get(input_ids.shape[1])
        if answer is None or guide not in self.groups or len(input_ids) != len(self.tokens):
            return None
        if self._asked is not input_ids:
            if not torch.equal(self.tokens[:, : input_ids.shape[1]], input_ids.to(self.tokens.device)):
                return None
            self._asked = input_ids
        first = self.groups[guide] * len(self.tokens)
        return answer[first : first + len(self.tokens)]

    def _everywhere(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the base model, and the same ones of every guide."""
        offsets = len(self.tokens) * torch.arange(self.copies, device=rows.device)
        return (offsets[:, None] + rows).flatten()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, self._everywhere(beam_idx)))
        self._keep(beam_idx)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _keep(self, rows: torch.Tensor) -> None:
        self.tokens = self.tokens[rows.to(self.tokens.device)]
        self._answers = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies keys and values, but not the guides, which hold models."""
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update({k: v if k == "groups" else copy.deepcopy(v, memo) for k, v in vars(self).items()})
        return new


class JointCache(JointRows, DynamicCache):
    """One that grows with the text, `generate`'s default."""

    ordinary = DynamicCache

    def _keep_first(self, rows: int) -> None:
        super().batch_select_indices(torch.arange(rows, device=self.tokens.device))

    def expand(self, rows: torch.Tensor) -> None:
        super().batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(self._everywhere(indices))
        self._keep(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.tokens = self.tokens[:, : self.tokens.shape[1] - abs(tokens_to_remove)]
        held = self.tokens.shape[1]
        self._answers = {length: answer for length, answer in self._answers.items() if length <= held}
