# SPDX-License-Identifier: Apache-2.0
"""What drafts tokens for speculative decoding: a stand-in for the base model, or the text itself."""

from __future__ import annotations

from typing import cast

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from trl_parm.algebra import Scorer, Step

from ..terms import LM
from .sampling import acceptance
from .target import Answers, Target
from .texts import Reader, Texts


SCALES = (1.0, 0.8, 1.25)
"""Factors of a stand-in's scale that are compared."""
NGRAM = 2
"""How many last tokens a prompt lookup has to find again, at most."""


class StandIn:
    """Drafts from the guided distribution in which another scorer stands for the base model.

    With the ARM's own backbone as the stand-in, the ratio of target and draft is that of base and backbone, up to
    normalisation, so that strong guidance lowers no acceptance. With the ARM itself, PARM's draft is the sharpened
    π_ARM^(scale + 1/β). The scale of the stand-in follows what would have been accepted.

    Args:
        scorer ([`Scorer`]): Stands for the base model.
        target ([`Target`]): The guided distribution.

    Attributes:
        asks_guides (`bool`): Whether it asks all guides before each token.
        answers (`list[Answers]`): What was said before each token that was proposed last.
    """

    def __init__(self, scorer: Scorer, target: Target) -> None:
        self.scorer, self.target, self.scale = scorer, target, 1.0
        # Guides that have the base model's weights are too dear to draft with, so drafts are made without any.
        self.asks_guides = len(target.apart) == len(target.guides)
        models = [one for one in scorer.scorers() if isinstance(one, LM)]
        self._reader = Reader([*models, *(target.guides if self.asks_guides else [])], target.own)
        self._gains = dict.fromkeys(SCALES, 0.0)
        self.answers: list[Answers] = []

    def propose(self, texts: Texts, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` tokens for each text, `(rows, count)`, and their distributions q, `(rows, count, vocab)`."""
        self.answers, tokens, distributions = [], [], []
        for _ in range(count):
            self.answers.append(self.ask(texts))
            distributions.append(self._distribution(texts, self.answers[-1], self.scale))
            tokens.append(self.target.choose(distributions[-1]))
            texts = texts.extended(tokens[-1])
        return torch.cat(tokens, 1), torch.stack(distributions, 1)

    def ask(self, texts: Texts) -> Answers:
        """What the models that it reads say next, `(rows, vocab)`."""
        return self.target.log_probs({term: logits[:, -1] for term, logits in self._reader.read(texts, 1).items()})

    def learn(self, texts: Texts, p: torch.Tensor) -> None:
        """Learns from the target distribution of the first proposed token, `(rows, vocab)`."""
        if not self.target.do_sample:
            return
        for factor in SCALES:
            q = self._distribution(texts, self.answers[0], self.scale * factor)
            self._gains[factor] = 0.9 * self._gains[factor] + float(acceptance(p, q).mean())
        best = max(SCALES, key=lambda factor: self._gains[factor])
        if best != 1.0 and self._gains[best] > 1.02 * self._gains[1.0]:
            self.scale = min(max(self.scale * best, 0.1), 10.0)
            self._gains = dict.fromkeys(SCALES, 0.0)

    def _distribution(self, texts: Texts, answers: Answers, scale: float) -> torch.Tensor:
        nothing = torch.zeros(len(texts.prompt), self.target.vocab, device=texts.prompt.device)
        scores = scale * self.scorer(Step(nothing, answers))
        return self.target.distribution(texts, scores, answers if self.asks_guides else None)


def looked_up(texts: Texts, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What followed the last words where they stood before in the same text (prompt lookup decoding), as
    [`StandIn.propose`]: q is 0 where nothing was found."""
    tokens = texts.prompt.new_zeros(len(texts.prompt), count)
    q = torch.zeros(*tokens.shape, vocab, device=tokens.device)
    for row, (ids, mask) in enumerate(zip(*texts.padded())):
        ids = cast(torch.LongTensor, ids[mask.bool()][None])
        lookup = PromptLookupCandidateGenerator(
            num_output_tokens=count, max_matching_ngram_size=NGRAM, max_length=ids.shape[1] + count + 1
        )
        new = lookup.get_candidates(ids)[0][0, ids.shape[1] :]
        tokens[row, : len(new)] = new
        q[row, torch.arange(len(new)), new] = 1
    return tokens, q
