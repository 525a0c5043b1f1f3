# SPDX-License-Identifier: Apache-2.0
"""What drafts tokens for speculative decoding: a stand-in for the base model, or the text itself."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from trl_parm.algebra import Scorer, Step

from ..terms import LM
from .next_token import Answers, NextToken
from .reader import Reader
from .sampling import acceptance
from .texts import Texts


SCALES = (1.0, 0.8, 1.25)
"""Factors of a stand-in's scale that are compared."""


class Draft(Protocol):
    """Proposes tokens.

    Attributes:
        answers (`list[Answers]`): What the guides said before each proposed token, as far as they were asked.
    """

    answers: list[Answers]

    def propose(self, texts: Texts, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` tokens for each text, `(rows, count)`, and their distributions q, `(rows, count, vocab)`."""
        ...

    def ask(self, texts: Texts) -> Answers:
        """What the guides that it asks say next."""
        ...

    def learn(self, texts: Texts, target: torch.Tensor) -> None:
        """Learns from the target distribution of the first proposed token, `(rows, vocab)`."""
        ...


class StandIn:
    """Drafts from the guided distribution in which another scorer stands for the base model.

    With the ARM's own backbone as the stand-in, the ratio of target and draft is that of base and backbone, up to
    normalisation, so that strong guidance lowers no acceptance. With the ARM itself, PARM's draft is the sharpened
    π_ARM^(scale + 1/β). The scale of the stand-in follows what would have been accepted.

    Args:
        scorer ([`Scorer`]): Stands for the base model.
        reader ([`Reader`]): All language models that the draft's distribution depends on.
        next_token ([`NextToken`]): The guided distribution.
    """

    def __init__(self, scorer: Scorer, reader: Reader, next_token: NextToken) -> None:
        self.scorer, self.reader, self.next_token = scorer, reader, next_token
        self.scale = 1.0
        self._gains = dict.fromkeys(SCALES, 0.0)
        self.answers: list[Answers] = []

    def propose(self, texts: Texts, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.answers, tokens, distributions = [], [], []
        for _ in range(count):
            answers = self.ask(texts)
            self.answers.append(answers)
            q = self._of(texts, answers, self.scale, vocab)
            token = self.next_token.choose(q)
            texts = texts.extended(token)
            tokens.append(token)
            distributions.append(q)
        return torch.cat(tokens, 1), torch.stack(distributions, 1)

    def ask(self, texts: Texts) -> Answers:
        return {term: logits[:, -1] for term, logits in self.reader.read(texts, 1).items()}

    def learn(self, texts: Texts, target: torch.Tensor) -> None:
        if not self.next_token.do_sample:
            return
        for factor in SCALES:
            q = self._of(texts, self.answers[0], self.scale * factor, target.shape[-1])
            self._gains[factor] = 0.9 * self._gains[factor] + float(acceptance(target, q).mean())
        best = max(SCALES, key=lambda factor: self._gains[factor])
        if best != 1.0 and self._gains[best] > 1.02 * self._gains[1.0]:
            self.scale = min(max(self.scale * best, 0.1), 10.0)
            self._gains = dict.fromkeys(SCALES, 0.0)

    def _of(self, texts: Texts, answers: Answers, scale: float, vocab: int) -> torch.Tensor:
        scores = torch.zeros(len(texts), vocab, device=texts.prompt.device)
        found = {term: term.log_probs(logits, vocab).to(scores.device) for term, logits in answers.items()}
        return self.next_token.distribution(texts, scale * self.scorer(Step(scores, found)), answers)


class FromText:
    """Drafts what followed the last words where they stood before in the same text (prompt lookup decoding).

    Args:
        ngram (`int`, *optional*, defaults to 2): How many last tokens have to be found again, at most.
    """

    def __init__(self, ngram: int = 2) -> None:
        self.ngram = ngram
        self.answers: list[Answers] = []

    def propose(self, texts: Texts, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(texts), count, dtype=torch.long, device=texts.prompt.device)
        found = torch.zeros(len(texts), dtype=torch.long, device=texts.prompt.device)
        for row in range(len(texts)):
            ids = texts.row(row, int(texts.lengths[row]))[:, int((texts.mask[row] == 0).sum()) :]
            lookup = PromptLookupCandidateGenerator(
                num_output_tokens=count, max_matching_ngram_size=self.ngram, max_length=ids.shape[1] + count + 1
            )
            new = lookup.get_candidates(cast(torch.LongTensor, ids))[0][0, ids.shape[1] :]
            tokens[row, : len(new)], found[row] = new, len(new)
        drafted = torch.arange(count, device=tokens.device) < found[:, None]
        q = torch.zeros(*tokens.shape, vocab, device=tokens.device)
        return tokens, q.scatter(2, tokens[..., None], drafted[..., None].to(q))

    def ask(self, texts: Texts) -> Answers:
        return {}

    def learn(self, texts: Texts, target: torch.Tensor) -> None:
        pass


def language_models(scorer: Scorer) -> list[LM]:
    """The language models of a scorer that is made of nothing else; of a draft, [`BASE`] is no part."""
    return [one for one in scorer.scorers() if isinstance(one, LM)]
