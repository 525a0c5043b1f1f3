# SPDX-License-Identifier: Apache-2.0
"""The distribution of the next token as logits processors leave it, for texts that have different lengths."""

from __future__ import annotations

from typing import cast

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as known

from .guided import GuidedLogitsProcessor
from .language_model import LM, given
from .texts import Texts


Answers = dict[LM, torch.Tensor]
"""Logits of language models, of shape `(rows, vocab)`."""

ANY_COLUMNS = (
    GuidedLogitsProcessor,
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
    """What `generate` makes of the base model's scores.

    Args:
        processors (`LogitsProcessorList`): As `generate` prepared them, those of sampling included.
        do_sample (`bool`): Whether tokens are sampled; else the most likely one is taken.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors, self.do_sample = processors, do_sample
        self._any_columns = all(isinstance(processor, ANY_COLUMNS) for processor in processors)

    def distribution(self, texts: Texts, scores: torch.Tensor, answers: Answers) -> torch.Tensor:
        """The distribution after each text.

        Args:
            texts ([`Texts`]): What has been written.
            scores (`torch.Tensor` of shape `(rows, vocab)`): The base model's logits or log-probabilities.
            answers (`dict`): The logits of all language models that guide.

        Returns:
            `torch.Tensor` of shape `(rows, vocab)`, float32; all on one token in greedy decoding.
        """
        with given(answers):
            processed = self._process(texts, scores.float())
        if self.do_sample:
            return torch.softmax(processed, -1)
        return torch.zeros_like(processed).scatter(-1, processed.argmax(-1, keepdim=True), 1.0)

    def choose(self, distribution: torch.Tensor) -> torch.Tensor:
        """A token of each distribution, `(rows, 1)`."""
        return torch.multinomial(distribution, 1) if self.do_sample else distribution.argmax(-1, keepdim=True)

    def _process(self, texts: Texts, scores: torch.Tensor) -> torch.Tensor:
        longest = int(texts.lengths.max())
        if self._any_columns or len(texts) == 1:
            return self._processed(texts, longest, scores)
        processed = torch.empty_like(scores)
        for length in texts.lengths.unique().tolist():
            rows = texts.lengths == length
            processed[rows] = self._processed(texts, length, scores.clone())[rows]
        return processed

    def _processed(self, texts: Texts, length: int, scores: torch.Tensor) -> torch.Tensor:
        return self.processors(cast(torch.LongTensor, texts.ending_together(length)), cast(torch.FloatTensor, scores))
