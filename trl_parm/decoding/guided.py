# SPDX-License-Identifier: Apache-2.0
"""A formula of scorers as a logits processor."""

from __future__ import annotations

import logging

import torch
from transformers import LogitsProcessor

from .running import asks_what_is_forbidden, running_generate
from .scorers import Scorer


class GuidedLogitsProcessor(LogitsProcessor):
    """Makes `generate` decode from a formula: `model.generate(..., logits_processor=[GuidedLogitsProcessor(f)])`.

    Tokens that the base model excludes (a score of −inf) stay excluded. Temperature, top-k and top-p act on the
    guided distribution, since `generate` applies them after custom processors; a repetition penalty acts on the base
    model alone. With `cache_implementation="paged"` transformers drops custom processors; that is an error here.

    Args:
        formula ([`Scorer`]): For example `BASE + 0.5 * LM(arm)`.

    Raises:
        TypeError: something else than a scorer.
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
        guided = self.formula(input_ids, scores)
        return guided.masked_fill(scores == -torch.inf, -torch.inf)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.formula!r})"


class _RefuseContinuousBatching(logging.Filter):
    """transformers announces in its log that it goes over to continuous batching, which drops custom processors.

    There is no other sign of it before the first token. The logger has to pass every record here, whatever the
    verbosity, so this filter also does what the level of the loggers above would have done.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if "cache_implementation=paged" in str(record.msg):
            call = running_generate()
            if call and any(isinstance(processor, GuidedLogitsProcessor) for processor in call.processors):
                raise NotImplementedError(
                    '`cache_implementation="paged"` drops logits processors, so the text would not be guided. Use the '
                    "default cache."
                )
        return record.levelno >= logging.getLogger("transformers").getEffectiveLevel()


_generate_log = logging.getLogger("transformers.generation.utils")
_generate_log.setLevel(logging.DEBUG)
_generate_log.addFilter(_RefuseContinuousBatching())
