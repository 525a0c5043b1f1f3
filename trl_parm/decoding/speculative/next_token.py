# SPDX-License-Identifier: Apache-2.0
"""The distribution of the next token as `generate` would leave it, for texts that have different lengths."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as known

from trl_parm.algebra import Scorer, Step, guided_logits

from ..processor import GuidedLogitsProcessor
from ..terms import LM
from .texts import Texts


Answers = dict[LM, torch.Tensor]
"""Logits of language models, of shape `(rows, vocab)`."""

ANY_COLUMNS = (
    known.TemperatureLogitsWarper,
    known.TopKLogitsWarper,
    known.TopPLogitsWarper,
    known.MinPLogitsWarper,
    known.TypicalLogitsWarper,
    known.EpsilonLogitsWarper,
    known.EtaLogitsWarper,
    known.InfNanRemoveLogitsProcessor,
    known.LogitNormalization,
    known.SuppressTokensLogitsProcessor,
)
"""Processors that don't look at the columns in which tokens stand."""


class NextToken:
    """What `generate` makes of the base model's scores: formulas and processors, one after the other.

    Args:
        processors (`Sequence`): A guided model's formula, and what `generate` prepared, sampling included. Those that
            guide are asked by their formulas.
        do_sample (`bool`): Whether tokens are sampled; else the most likely one is taken.
    """

    def __init__(self, processors: Any, do_sample: bool) -> None:
        self.steps = [p.formula if isinstance(p, GuidedLogitsProcessor) else p for p in processors]
        self.do_sample = do_sample

    @property
    def formulas(self) -> list[Scorer]:
        return [step for step in self.steps if isinstance(step, Scorer)]

    def without_guides(self) -> NextToken:
        return NextToken([step for step in self.steps if not isinstance(step, Scorer)], self.do_sample)

    def distribution(self, texts: Texts, scores: torch.Tensor, answers: Answers) -> torch.Tensor:
        """The distribution after each text.

        Args:
            texts ([`Texts`]): What has been written.
            scores (`torch.Tensor` of shape `(rows, vocab)`): The base model's logits or log-probabilities.
            answers (`dict`): The logits of all language models that guide.

        Returns:
            `torch.Tensor` of shape `(rows, vocab)`, float32; all on one token in greedy decoding.
        """
        scores = scores.float()
        for step in self.steps:
            if isinstance(step, Scorer):
                found = {term: term.log_probs(v, scores.shape[-1]).to(scores.device) for term, v in answers.items()}
                scores = guided_logits(step, Step(scores, found))
            else:
                scores = self._processed(texts, scores, step)
        if self.do_sample:
            return torch.softmax(scores, -1)
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)

    def choose(self, distribution: torch.Tensor) -> torch.Tensor:
        """A token of each distribution, `(rows, 1)`."""
        return torch.multinomial(distribution, 1) if self.do_sample else distribution.argmax(-1, keepdim=True)

    def _processed(self, texts: Texts, scores: torch.Tensor, processor: Any) -> torch.Tensor:
        lengths = texts.lengths.unique().tolist()
        if isinstance(processor, ANY_COLUMNS) or len(lengths) == 1:
            return self._at(texts, max(lengths), scores, processor)
        processed = torch.empty_like(scores)
        for length in lengths:
            rows = texts.lengths == length
            processed[rows] = self._at(texts, length, scores.clone(), processor)[rows]
        return processed

    def _at(self, texts: Texts, length: int, scores: torch.Tensor, processor: Any) -> torch.Tensor:
        together = cast(torch.LongTensor, texts.ending_together(length))
        return LogitsProcessorList([processor])(together, cast(torch.FloatTensor, scores))
