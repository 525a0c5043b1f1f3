# SPDX-License-Identifier: Apache-2.0
"""Base model and guides judge drafted tokens."""

from __future__ import annotations

import torch

from trl_parm.algebra import BASE

from ..model import Guided
from ..terms import LM
from .drafts import Draft
from .next_token import Answers, NextToken
from .reader import Reader
from .sampling import verify
from .texts import Texts


class Judges:
    """The base model and its guides, which give the target distribution.

    Args:
        guided ([`Guided`]): The model that is decoded, with all guides.
        next_token ([`NextToken`]): What `generate` makes of its scores.
        own (`tuple`, *optional*): The guides' own prompts, see [`Reader`].

    Attributes:
        guides (`list[LM]`): All guides.
        apart (`list[LM]`): Those that are not read with the base model, in one forward.
        vocab (`int`): Size of the base model's vocabulary, known after the first round.
    """

    def __init__(self, guided: Guided, next_token: NextToken, own: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        scorers = dict.fromkeys(scorer for formula in next_token.formulas for scorer in formula.scorers())
        others = [scorer for scorer in scorers if scorer != BASE and not isinstance(scorer, LM)]
        if others:
            raise ValueError(
                f"SpeculativeDecoding takes guides that are language models, but got {others[0]!r}, which would have "
                "to be asked for every drafted token. Leave `custom_generate` out."
            )
        self.guides = [scorer for scorer in scorers if isinstance(scorer, LM)]
        self.base, self.next_token, self.vocab = guided.own_term(), next_token, 0
        beside = [term for term in self.guides if own is None and term.backbone is guided.backbone]
        self.apart = [term for term in self.guides if term not in beside]
        self._with_base = Reader([self.base, *beside])
        self._others = Reader(self.apart, own)

    def judge(
        self, texts: Texts, tokens: torch.Tensor, q: torch.Tensor | None, draft: Draft
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafted tokens each row keeps, `(rows,)`, and the token after them, `(rows, 1)`."""
        count = tokens.shape[1]
        longer = texts.extended(tokens)
        read = self._with_base.read(longer, count + 1)
        self.vocab = read[self.base].shape[-1]
        known = draft.answers if q is not None else []
        asked = bool(known) and all(guide in known[0] for guide in self.apart)
        if count and not asked:
            known = _by_position(self._others.read(longer, count + 1), count + 1)
        target = [self._target(texts, tokens, i, read, known[i] if self.apart else {}) for i in range(count)]
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
                answers = known[count] if known else _by_position(self._others.read(longer, 1), 1)[0]
            final = self._target(texts, tokens, count, read, answers)
            left = final if left is None else torch.where((counts == count)[:, None], final, left)
        return counts, self.next_token.choose(left)

    def _target(
        self, texts: Texts, tokens: torch.Tensor, i: int, read: dict[LM, torch.Tensor], others: Answers
    ) -> torch.Tensor:
        """The target distribution after the first `i` drafted tokens."""
        answers = {guide: logits[:, i] for guide, logits in read.items()} | others
        return self.next_token.distribution(texts.extended(tokens[:, :i]), read[self.base][:, i], answers)


def _by_position(answers: dict[LM, torch.Tensor], count: int) -> list[Answers]:
    """Logits of shape `(rows, count, vocab)`, one position after the other."""
    return [{lm: logits[:, i] for lm, logits in answers.items()} for i in range(count)]
