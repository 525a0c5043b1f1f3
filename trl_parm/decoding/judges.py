# SPDX-License-Identifier: Apache-2.0
"""Base model and guides judge drafted tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from .drafts import Draft
from .guided import GuidedLogitsProcessor
from .joint_lm import JointLM, families
from .language_model import LM
from .next_token import Answers, NextToken
from .scorers import BASE
from .speculative_sampling import verify
from .texts import Texts


class Judges:
    """The base model and its guides, which give the target distribution.

    Attributes:
        guides (`list[LM]`): All guides.
        beside_base (`list[LM]`): Those that have the base model's weights: they are read with it.
        vocab (`int`): Size of the base model's vocabulary, known after the first round.
    """

    def __init__(self, model: PreTrainedModel, processors: LogitsProcessorList, next_token: NextToken) -> None:
        self.guides = language_models(processors)
        self.base, self.next_token, self.vocab = LM(model), next_token, 0
        self.beside_base = [guide for guide in self.guides if guide.shared and guide.shared is self.base.shared]
        silent = [s for p in processors if isinstance(p, GuidedLogitsProcessor) for s in p.formula.silent()]
        all_guides = [*self.guides, *(scorer for scorer in silent if isinstance(scorer, LM))]
        guiding = {name for guide in all_guides if guide.shared is self.base.shared for name in guide.adapter_names}
        self.base.acting_adapters = [name for name in self.base.acting_adapters if name not in guiding]
        self._with_base = JointLM([self.base, *self.beside_base])
        self._apart = [guide for guide in self.guides if guide not in self.beside_base]
        self._others = families(self._apart)

    def judge(
        self, texts: Texts, tokens: torch.Tensor, q: torch.Tensor | None, draft: Draft
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafted tokens each row keeps, `(rows,)`, and the token after them, `(rows, 1)`."""
        count = tokens.shape[1]
        longer = texts.extended(tokens)
        read = self._with_base.read(longer, count + 1)
        self.vocab = read[self.base].shape[-1]
        known = draft.answers if q is not None else []
        asked = bool(known) and all(guide in known[0] for guide in self._apart)
        if count and not asked:
            known = _by_position(_read(self._others, longer, count + 1), count + 1)
        target = [self._target(texts, tokens, i, read, known[i] if self._apart else {}) for i in range(count)]
        if q is None:
            counts, left = torch.zeros_like(texts.lengths), None
        else:
            p = torch.stack(target, 1)
            draft.learn(texts, p[:, 0])
            counts, left = verify(p, q, tokens, torch.rand(tokens.shape, device=tokens.device))
        if left is None or bool((counts == count).any()):
            if asked:
                answers = draft.ask(longer)
            else:
                answers = known[count] if known else _by_position(_read(self._others, longer, 1), 1)[0]
            final = self._target(texts, tokens, count, read, answers)
            left = final if left is None else torch.where((counts == count)[:, None], final, left)
        return counts, self.next_token.choose(left)

    def _target(
        self, texts: Texts, tokens: torch.Tensor, i: int, read: dict[LM, torch.Tensor], others: Answers
    ) -> torch.Tensor:
        """The target distribution after the first `i` drafted tokens."""
        answers = {guide: logits[:, i] for guide, logits in read.items()} | others
        return self.next_token.distribution(texts.extended(tokens[:, :i]), answers.pop(self.base), answers)


def _read(models: Sequence[JointLM], texts: Texts, last: int) -> dict[LM, torch.Tensor]:
    return {lm: logits for model in models for lm, logits in model.read(texts, last).items()}


def _by_position(answers: dict[LM, torch.Tensor], count: int) -> list[Answers]:
    """Logits of shape `(rows, count, vocab)`, one position after the other."""
    return [{lm: logits[:, i] for lm, logits in answers.items()} for i in range(count)]


def language_models(processors: LogitsProcessorList) -> list[LM]:
    """The guides of logits processors. Raises `ValueError` for one that is no language model."""
    formulas = [p.formula for p in processors if isinstance(p, GuidedLogitsProcessor)]
    scorers = dict.fromkeys(scorer for formula in formulas for scorer in formula.scorers())
    others = [scorer for scorer in scorers if scorer is not BASE and not isinstance(scorer, LM)]
    if others:
        raise ValueError(
            f"SpeculativeDecoding takes guides that are language models, but got {others[0]!r}, which would have to "
            "be asked for every drafted token. Leave `custom_generate` out."
        )
    return [scorer for scorer in scorers if isinstance(scorer, LM)]
