# SPDX-License-Identifier: Apache-2.0
"""The cache of a guided model, which is all the state that guidance has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache

from .prefix import empty, layers_of
from .prompt import OwnPrompt
from .reading import Part
from .terms import LM


class GuidedCache(Cache):
    """The cache of a guided model: one part for each set of weights, each of R · k rows, where `generate` has R.

    Whatever `generate` does with its rows (beams, taking back a rejected draft) happens to those of all terms.

    Args:
        parts (`Sequence[Part]`): The parts, the base model's first.
        own_prompt (`bool`, *optional*, defaults to `False`): Whether guides read prompts of their own.

    Attributes:
        own (`tuple` or `None`): These prompts, ids and mask with a row for each of R, once any text was read.
        replaced (`int`): Columns of the prompt that the text began with, in whose place guides have read their own.
        length (`int`): Columns of the text that were read.
        rows (`int`): R.
        text (`torch.Tensor` of shape `(rows, length)` or `None`): The tokens that were read, if anybody wants them.
        memory (`dict`): See [`Step`].
        staying (`torch.Tensor` or `None`): The rows that are still read, if some have left.
    """

    def __init__(self, parts: Sequence[Part], own_prompt: bool = False) -> None:
        self.parts, self.length, self.rows, self.offloading = list(parts), 0, 0, False
        self.own_prompt = own_prompt
        self.own: OwnPrompt | None = None
        self.replaced = 0
        self.text: torch.Tensor | None = None
        self.memory: dict[Any, Any] = {}
        self.staying: torch.Tensor | None = None

    def is_of(self, base: Any, terms: Sequence[LM]) -> bool:
        """Whether it was made for this base model and these terms, and their adapters are as they were."""
        guides = {term for part in self.parts for term in part.guides}
        own = all(part.model is base for part in self.parts if part.is_base)
        return own and guides == set(terms) and all(part.is_current for part in self.parts)

    def check_own(self, own: OwnPrompt | None) -> None:
        """Raises `ValueError` unless these are the prompts of the guides' own that were read, or will be."""
        same = self.own_prompt == (own is not None)
        if same and own is not None and self.own is not None:
            same = all(map(torch.equal, self.own, (x.to(self.own[0].device) for x in _of_rows(own, self.rows))))
        if not same:
            raise ValueError(
                "This GuidedCache was made with other `guide_input_ids` and `guide_attention_mask`, or with none. "
                "Pass the same with the cache at every call, or leave the cache out."
            )

    def check_whole(self) -> None:
        """Raises `ValueError` if rows have left."""
        if self.staying is not None:
            raise ValueError(
                f"{self.rows - len(self.staying)} of the {self.rows} rows of this GuidedCache have left after one of "
                "the `end_tokens`. Leave them out where rows change places, or where the cache goes on afterwards."
            )

    def turns(self, length: int) -> bool:
        """Whether text of so many columns has to be read anew by one of the models, see [`turning_length`]."""
        return self.length > 0 and any(part.turns(length - self.length) for part in self.parts)

    def note(self, columns: int, rows: int, own: OwnPrompt | None = None, replaced: int = 0) -> None:
        """Notes that so many columns more were read, of so many rows, after prompts of the guides' own in the place of
        the first columns, those that are `replaced`."""
        self.length, self.rows = self.length + columns, rows
        if self.own is None and own is not None:
            self.own, self.replaced = _of_rows(own, rows), replaced

    def write(self, ids: torch.Tensor) -> torch.Tensor:
        """Keeps what is read, `(rows, new)`, and returns all of it, `(rows, length)`."""
        self.text = ids if self.text is None else torch.cat([self.text, ids], 1)
        return self.text

    def leave(self, ended: torch.Tensor) -> None:
        """Rows whose texts have ended, `(rows,)`, are not read any further. What models say of them means nothing from
        now on, and rows can't change places any more. None leaves where the longest text turns the keys of all."""
        held = torch.arange(self.rows, device=ended.device) if self.staying is None else self.staying
        stays = ~ended[held]
        free = all(type(part.cache) is DynamicCache and part.turning_length is None for part in self.parts)
        if free and bool(stays.any()) and not bool(stays.all()):
            self.staying = held[stays]
            for part in self.parts:
                part.leave(stays, self.staying)

    @property
    def layers(self) -> list[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [layer for part in self.parts for layer in layers_of(part.cache)]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("This cache belongs to a guided model. Call that model, or give this one a cache of its own.")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_compileable(self) -> bool:
        """Never to `generate`, which would make masks for it; see [`Part`]."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        return cast(Cache, self.parts[0].cache).is_linear

    @property
    def is_croppable(self) -> bool:
        return all(cast(Cache, part.cache).is_croppable for part in self.parts)

    def activate_past_recording(self) -> None:
        for part in self.parts:
            cast(Cache, part.cache).activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.check_whole()
        for part in self.parts:
            part.reorder(beam_idx, self.rows)
        if self.text is not None:
            self.text = self.text[beam_idx.to(self.text.device)]
        if self.own is not None:
            self.own = self.own[0][beam_idx.to(self.own[0].device)], self.own[1][beam_idx.to(self.own[1].device)]
        self.rows = len(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        for part in self.parts:
            tokens = abs(tokens_to_remove)
            if self.own is not None and part.mask is not None:  # a prompt of its own stands for the whole prompt
                tokens = min(tokens, part.mask.shape[1] - self.own[0].shape[1])
            part.crop(tokens)
        self.length -= abs(tokens_to_remove)
        if self.text is not None:
            self.text = self.text[:, : self.length]

    def reset(self) -> None:
        for part in self.parts:
            empty(cast(Cache, part.cache))
            part.mask = part.staying = None
        self.staying = self.own = None
        self.length, self.text = 0, None
        self.memory.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuidedCache:
        """Copies keys and values, but not the models."""
        parts = []
        for part in self.parts:
            new = copy.copy(part)
            new.cache, new.mask = copy.deepcopy(part.cache, memo), copy.deepcopy(part.mask, memo)
            parts.append(new)
        other = GuidedCache(parts, self.own_prompt)
        other.length, other.rows, other.text = self.length, self.rows, self.text
        other.staying, other.own, other.replaced = self.staying, self.own, self.replaced
        return other


def _of_rows(own: OwnPrompt, rows: int) -> OwnPrompt:
    """Prompts for so many rows, repeated as `generate` repeats rows."""
    ids, mask = (x if len(x) == rows else x.repeat_interleave(rows // len(x), 0) for x in own)
    return ids, mask
