# SPDX-License-Identifier: Apache-2.0
"""Language models that share their weights, read in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from .guide_model import has_sliding_window
from .joint_forward import adapter_rows, set_preferences
from .prefix import Prefix, read, window_of
from .text_cache import TextCache
from .texts import Texts


if TYPE_CHECKING:
    from .language_model import LM


class JointLM:
    """Language models of one backbone, such as a model with its adapter and without: one forward answers for all.

    Where their adapters can't act on rows of one batch they are read one after the other.

    Args:
        members (`Sequence[LM]`): Language models on the same weights.
    """

    def __init__(self, members: Sequence[LM]) -> None:
        self.members = sorted(members, key=lambda member: member.acting_adapters)
        together = len(members) > 1 and _obstacle(self.members) is None
        self.together = together
        self._groups = [self.members] if together else [[member] for member in self.members]
        self._prefix: Prefix | None = None
        self._caches = [TextCache(group[0].empty_cache) for group in self._groups]
        self._windows = [member for member in self.members if has_sliding_window(member.model)]
        self._states: list[tuple] = []

    def read(self, texts: Texts, last: int) -> dict[LM, torch.Tensor]:
        """The logits after each of the last tokens of every text, shape `(rows, last, vocab)`.

        Raises:
            ValueError: several rows, and a model with sliding-window attention.
        """
        self._follow_changes()
        self._check(len(texts))
        answers: dict[LM, torch.Tensor] = {}
        for group, cache in zip(self._groups, self._caches):
            tokens, mask = _stacked([member.reads(texts.padded(), texts.padded_mask()) for member in group])
            with _acting(group, len(texts)):
                logits = cache.read(tokens, mask, last, group[0].feed)
            answers |= dict(zip(group, logits.split(len(texts))))
        return answers

    def log_probs(self, input_ids: torch.Tensor) -> dict[LM, torch.Tensor]:
        """log π of the next token for texts of one length, `(rows, vocab)` each, in any mode of `generate`.

        For members that are read together only.
        """
        self._follow_changes()
        tokens, mask = _stacked([member.reads(input_ids) for member in self.members])
        rows, first = len(input_ids), self.members[0]

        def forward(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
            with _acting(self.members, rows):
                return torch.log_softmax(first.feed(ids, mask, positions, cache)[:, -1].float(), dim=-1)

        kinds = torch.cat([i * rows + member.preference_rows(rows) for i, member in enumerate(self.members)])
        self._prefix = read(self._prefix, tokens, mask, forward, first.empty_cache, kinds, window_of(rows))
        answers = self._prefix.log_probs[tokens.shape[1]]
        return dict(zip(self.members, answers.split(rows)))

    @property
    def is_outdated(self) -> bool:
        """Whether weights or preferences have changed since it was asked last."""
        return [member.state() for member in self.members] != self._states

    def _follow_changes(self) -> None:
        """Forgets what was computed with other weights or preferences."""
        if self.is_outdated:
            for cache in self._caches:
                cache.reset()
            self._prefix, self._states = None, [member.state() for member in self.members]

    def _check(self, rows: int) -> None:
        """Holes in a cache shift the windows of sliding attention, which are counted in columns."""
        if rows > 1 and self._windows:
            raise ValueError(
                f"{self._windows[0]!r} has sliding-window attention, with which the rows of a batch can't grow at "
                f"their own pace. Decode the {rows} rows one at a time, or leave `custom_generate` out."
            )


def families(members: Sequence[LM]) -> list[JointLM]:
    """The language models by the weights that they share."""
    groups: dict[Any, list[LM]] = {}
    for member in dict.fromkeys(members):
        groups.setdefault(id(member.shared or member.model), []).append(member)
    return [JointLM(group) for group in groups.values()]


@contextmanager
def _acting(group: Sequence[LM], rows: int) -> Iterator[None]:
    """For the time of a forward of `len(group) · rows` rows, the adapters of each member act on its rows."""
    if len(group) == 1:
        with group[0].as_asked():
            yield
        return
    adapted = [member for member in group if member.acting_adapters]
    guides = dict(enumerate(adapted, 1))
    read = [torch.arange((len(group) - len(adapted)) * rows)] + [torch.arange(rows)] * len(adapted)
    set_preferences(guides, read, rows)
    shared = group[0].shared
    assert shared is not None
    with shared.rows(adapter_rows(guides, read), len(group) * rows):
        yield


def _obstacle(members: Sequence[LM]) -> str | None:
    """Why the members can't have one forward, or `None` if they can."""
    shared = members[0].shared
    assert shared is not None
    return shared.obstacle(members)


def _stacked(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and masks of all members below each other, `(members · rows, columns)`."""
    columns = max(tokens.shape[1] for tokens, _ in parts)
    padded = [
        [torch.nn.functional.pad(part, (0, columns - part.shape[1])) for part in (tokens, mask)]
        for tokens, mask in parts
    ]
    return torch.cat([tokens for tokens, _ in padded]), torch.cat([mask for _, mask in padded])
