# SPDX-License-Identifier: Apache-2.0
"""Texts that are decoded in one batch, and prompts that are read before their texts join it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_parm.decoding.cache import GuidedCache
from trl_parm.decoding.joining import Held, joined, open_cache, read

from .served import OwnPrompt, Served
from .texts import Text


@dataclass(frozen=True)
class Guidance:
    """By what a text is written: the model, α and β, and what guides read in the place of its prompt, if they do."""

    served: Served
    weights: dict[str, float]
    beta: float | None
    own: OwnPrompt | None = None

    @property
    def lane(self) -> tuple:
        """Texts of one lane can be decoded in one batch."""
        return self.served.lane(self.weights, self.beta, self.own is not None)


class Reading:
    """A prompt that is being read, in parts; several texts may begin with it.

    Args:
        texts (`list[Text]`): The texts, which are all alike so far.
        guidance ([`Guidance`]): By what they are written.
    """

    def __init__(self, texts: list[Text], guidance: Guidance) -> None:
        self.texts, self.guidance, self.ids = texts, guidance, texts[0].ids
        self._guided = guidance.served.guided([guidance.weights], [guidance.beta])
        self.cache = open_cache(self._guided, guidance.own is not None)

    def advance(self, most: int) -> torch.Tensor | None:
        """Reads at most so many tokens more; after the last one log π of the next, `(1, vocab)`."""
        start, device, own = self.cache.length, self._guided.device, self.guidance.own
        whole = own is not None or not self.guidance.served.in_parts
        stop = len(self.ids) if whole else min(start + most, len(self.ids))
        part = torch.tensor([self.ids[start:stop]], device=device)
        if own is not None:
            own = own[0].to(device), own[1].to(device)
        log_probs = read(self._guided, self.cache, part, [0], own, len(self.texts[0].prompt))
        return log_probs if stop == len(self.ids) else None


class Lane:
    """Texts that are decoded together: each step writes one token of each.

    Args:
        served ([`Served`]): The model.
        own_prompt (`bool`): Whether guides have read prompts of their own.

    Attributes:
        texts (`list[Text]`): The texts, by the rows of the cache.
        leaving (`set[Text]`): Those of them that do not go on.
    """

    def __init__(self, served: Served, own_prompt: bool) -> None:
        self.served = served
        self.texts: list[Text] = []
        self.leaving: set[Text] = set()
        self._own = (torch.ones(1, 1, dtype=torch.long),) * 2 if own_prompt else None
        self._guidance: list[Guidance] = []
        self._cache: GuidedCache | None = None

    @property
    def staying(self) -> list[Text]:
        """The texts that go on."""
        return [text for text in self.texts if text not in self.leaving]

    def regroup(self, joining: Sequence[tuple[Reading, list[Text]]]) -> None:
        """Lets texts leave, and others join after what was read of them. Where that fails, nothing has changed."""
        kept = [row for row, text in enumerate(self.texts) if text not in self.leaving]
        held = [Held(self._cache, kept, [self.texts[row].read for row in kept])] if self._cache and kept else []
        held += [Held(one.cache, [0] * len(texts), [one.cache.length] * len(texts)) for one, texts in joining]
        guidance = [self._guidance[row] for row in kept]
        guidance += [one.guidance for one, texts in joining for _ in texts]
        cache: GuidedCache | None = None
        if held:
            guided = self.served.guided([g.weights for g in guidance], [g.beta for g in guidance])
            alone = len(held) == 1 and held[0].rows == list(range(held[0].cache.rows))
            cache = held[0].cache if alone else joined(guided, held, self._own is not None)
            self._guided = guided
        self.texts = [*self.staying, *(text for _, texts in joining for text in texts)]
        self._guidance, self._cache = guidance, cache
        self.leaving.clear()

    def step(self) -> torch.Tensor:
        """Reads the last token of every text, and returns log π of the next ones, `(rows, vocab)`."""
        assert self._cache is not None
        device = self._guided.device
        ids = torch.tensor([[text.written[-1]] for text in self.texts], device=device)
        pads = [self._cache.length - text.read for text in self.texts]
        own = None if self._own is None else (self._own[0].to(device), self._own[1].to(device))
        return read(self._guided, self._cache, ids, pads, own)
