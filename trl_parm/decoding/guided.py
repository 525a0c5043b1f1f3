# SPDX-License-Identifier: Apache-2.0
"""A formula of scorers as a logits processor."""

from __future__ import annotations

import logging

import torch
from transformers import LogitsProcessor

from .running import asks_what_is_forbidden, processors_of_batch, running_generate
from .scorers import Scorer


class GuidedLogitsProcessor(LogitsProcessor):
    """Makes `generate` decode from a formula: `model.generate(..., logits_processor=[GuidedLogitsProcessor(f)])`.

    Tokens that the base model excludes (a score of −inf) stay excluded. Temperature, top-k and top-p act on the
    guided distribution, since `generate` applies them after custom processors; a repetition penalty acts on the base
    model alone. In continuous batching, `generate_batch` and `cache_implementation="paged"`, transformers drops custom
    processors; that is an error here.

    Args:
        formula ([`Scorer`]): For example `BASE + 0.5 * LM(arm)`.

    Raises:
        TypeError: something else than a scorer.
        NotImplementedError: when called, in continuous batching, with the last token of every row alone.
    """

    def __init__(self, formula: Scorer) -> None:
        if not isinstance(formula, Scorer):
            raise TypeError(
                f"`formula` is a {type(formula).__name__}, but it must be a scorer such as BASE + LM(arm)."
            )
        self.formula = formula

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if asks_what_is_forbidden():
            # The draft is checked against the guided distribution afterwards: an answer here would cost a forward.
            return scores
        if input_ids.ndim != 2:
            raise NotImplementedError(
                f"Guidance needs all tokens of every row, of shape (rows, length), but got {tuple(input_ids.shape)}: "
                "continuous batching passes the last ones alone. Use `generate`."
            )
        guided = self.formula(input_ids, scores)
        return guided.masked_fill(scores == -torch.inf, -torch.inf)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.formula!r})"


class _RefuseContinuousBatching(logging.Filter):
    """transformers goes over to continuous batching, which drops custom processors, with no other sign than its log.

    So a logger passes all records here, at a level that nobody else sets, and this filter does what the level of the
    logger above it would have done.
    """

    def __init__(self, name: str, level: int, above: str | None) -> None:
        super().__init__()
        self.logger, self.level, self.above = logging.getLogger(name), level, above
        self.logger.setLevel(level)
        self.logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        dropped, call = processors_of_batch(), running_generate()
        if call is not None and "cache_implementation=paged" in str(record.msg):
            dropped += call.processors
        if any(isinstance(processor, GuidedLogitsProcessor) for processor in dropped):
            raise NotImplementedError(
                'Continuous batching (`generate_batch`, `cache_implementation="paged"`) drops logits processors, so '
                "the text would not be guided. Use `generate` with the default cache or a static one."
            )
        chosen = self.logger.level != self.level
        return chosen or record.levelno >= logging.getLogger(self.above).getEffectiveLevel()


_RefuseContinuousBatching("transformers.generation.utils", logging.DEBUG - 1, above="transformers")
# Above DEBUG, at which `generate_batch` shows no progress.
_RefuseContinuousBatching("ContinuousBatchingLogger", logging.INFO - 1, above=None)
