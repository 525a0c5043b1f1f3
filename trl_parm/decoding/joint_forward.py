# SPDX-License-Identifier: Apache-2.0
"""One forward for the base model and its guides: what goes in, which adapter acts where, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StaticCache

from peft_pblora import set_preference
from peft_pblora.adapter import expand_rows
from peft_pblora.condition import Condition
from peft_pblora.kv_cache import cache_in

from .joint import JointCache, JointRows
from .joint_static import JointStaticCache


if TYPE_CHECKING:
    from .language_model import LM


PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class JointForward:
    """A forward of rows [base | guide 1 | guide 2 | ...] in the place of the base model's own.

    A prompt that stands in several rows, as for beams, several sequences or a sweep over preferences, is read once by
    the base model, and once by a guide for each of its preferences.

    Args:
        cache ([`JointRows`]): The cache, with the guides' groups of rows.
        kwargs (`dict`): The arguments of the base model's forward.
        prompt (`torch.Tensor` of shape `(rows, ...)`, *optional*):
            All that tells the rows of a prompt apart, where the forward reads all of it and nothing else.

    Attributes:
        kwargs (`dict`): The arguments of the joint one.
        plan (`list[tuple[str, slice]]`): Which adapter acts on which rows, or groups of rows.
        rows (`int`): Rows of the joint one.
        groups (`int` or `None`): How many groups of rows there are, if they are of one size and `plan` counts them.
    """

    def __init__(self, cache: JointRows, kwargs: dict[str, Any], prompt: torch.Tensor | None = None) -> None:
        self.cache, self.ids = cache, kwargs["input_ids"]
        guides = {group: guide for guide, group in cast(dict[Any, int], cache.groups).items() if group}
        # Of each group, the rows that are read, and for each row the one among them that it equals.
        read, self._places = [], None
        keys = [] if prompt is None else [_numbers(prompt)]
        keys += [keys[0] * len(self.ids) + guides[g].preference_rows(len(self.ids)) for g in sorted(guides) if keys]
        if any(len(key.unique()) < len(key) for key in keys):
            read, self._places = _distinct(keys)
            self.plan, self.groups = adapter_rows(guides, read), None
        else:
            read = [torch.arange(len(self.ids))] * cache.copies
            self.plan, self.groups = adapter_rows(guides, [torch.arange(1)] * cache.copies), cache.copies
        set_preferences(guides, read, len(self.ids))
        rows = torch.cat(read).to(self.ids.device)
        self.rows = len(rows)
        self.kwargs = {
            name: _select(value, rows, len(self.ids)) if name in PER_ROW else value for name, value in kwargs.items()
        }

    @classmethod
    def first(cls, guides: Sequence[LM], kwargs: dict[str, Any], prompt: torch.Tensor | None) -> JointForward:
        """The forward that reads the prompt, for guides of which those of one adapter stand together."""
        groups: dict[Any, int] = {}
        for guide in guides:
            groups[guide] = 1 + max(groups.values(), default=0) if guide.acting_adapters else 0
        cache = cache_in(kwargs)
        if not isinstance(cache, StaticCache):
            return cls(JointCache.adopt(cache, groups), kwargs, prompt)
        joint = JointStaticCache.adopt(cache, groups)
        joint.make_room(joint.copies * len(kwargs["input_ids"]))
        return cls(joint, kwargs, None if joint.is_allocated else prompt)

    def activations(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """For each entry of the plan an empty tensor like what its adapter will get, shape `(rows, new, 1)`."""
        size, new = 1 if self.groups is None else len(self.ids), self.ids.shape[1]
        shapes = [(size * (part.stop - part.start), new, 1) for _, part in self.plan]
        return [torch.empty(shape, dtype=dtype, device=self.ids.device) for shape in shapes]

    def split(self, output: Any) -> Any:
        """Keeps the guides' answers and gives the base model's rows of the output back."""
        rows, logits = len(self.ids), output.logits
        base = slice(rows)
        if self._places is not None:
            places = self._places.to(logits.device)
            self.cache.expand(places)
            logits, base = logits[places], places[:rows]
        self.cache.note(self.ids, logits)
        output.logits = logits[:rows]
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = tuple(None if t is None else t[base] for t in output[name])
        return output


def set_preferences(guides: dict[int, LM], read: list[torch.Tensor], rows: int) -> None:
    """Gives every conditioned adapter the preferences of the rows on which it acts.

    Args:
        guides (`dict[int, LM]`): The guide of each group of rows.
        read (`list[torch.Tensor]`): Of each group, which of the batch's rows are read.
        rows (`int`): Rows of the batch.
    """
    of_adapter: dict[str, list[int]] = {}
    for group in sorted(guides):
        if guides[group].preference is not None:
            of_adapter.setdefault(guides[group].acting_adapters[0], []).append(group)
    for name, groups in of_adapter.items():
        if len(groups) == 1 and cast(torch.Tensor, guides[groups[0]].preference).ndim == 1:
            wanted = cast(torch.Tensor, guides[groups[0]].preference)
        else:
            every = [expand_rows(torch.atleast_2d(cast(Any, guides[g].preference)), rows) for g in groups]
            wanted = torch.cat([one[read[group]] for one, group in zip(every, groups)])
        guide = guides[groups[0]]
        current = cast(Condition, guide.condition).preference
        if current.shape != wanted.shape or not torch.equal(current, wanted.to(current)):
            set_preference(guide.model, wanted, name)


def adapter_rows(guides: dict[int, LM], read: list[torch.Tensor]) -> list[tuple[str, slice]]:
    """The adapters with their rows, those of one adapter joined; arguments as in [`set_preferences`]."""
    plan: list[tuple[str, slice]] = []
    start = len(read[0])
    for group in sorted(guides):
        stop, name = start + len(read[group]), guides[group].acting_adapters[0]
        if plan and plan[-1][0] == name:
            plan[-1] = name, slice(plan[-1][1].start, stop)
        else:
            plan.append((name, slice(start, stop)))
        start = stop
    return plan


def _select(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """Rows of what a forward gets for each of the batch's rows: a tensor, or a mask for each kind of layer."""
    if isinstance(value, dict):
        return {name: _select(mask, rows, batch) for name, mask in value.items()}
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value


def _numbers(rows: torch.Tensor) -> torch.Tensor:
    """A number for each row, the same for rows that are the same."""
    return torch.unique(rows, dim=0, return_inverse=True)[1].cpu()


def _distinct(keys: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each group the rows to read, and the place of every row of every group among all that are read."""
    read, places, offset = [], [], 0
    for key in keys:
        found, inverse = torch.unique(key, return_inverse=True)
        first = torch.full((len(found),), len(key)).scatter_reduce(0, inverse, torch.arange(len(key)), "amin")
        read.append(first)
        places.append(offset + inverse)
        offset += len(first)
    return read, torch.cat(places)
