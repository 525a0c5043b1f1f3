# SPDX-License-Identifier: Apache-2.0
"""Which call of `generate` is at work, as far as a logits processor needs to know it.

`generate` hands a processor the tokens and the scores, but not the model that generates, the prompt's attention mask
or its length. They are read, never changed, from the call's own arguments on the stack.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_GENERATE_BATCH = inspect.unwrap(GenerationMixin.generate_batch).__code__
_DRAFT_FROM_PROMPT = PromptLookupCandidateGenerator.get_candidates.__code__


class GenerateCall:
    """A running call of `generate`.

    Attributes:
        model (`PreTrainedModel`): The model that generates.
        processors (`list[LogitsProcessor]`): The user's logits processors.
        attention_mask (`torch.Tensor` of shape `(batch, prompt)` or `None`): As the user gave it.
        assistant_model (`PreTrainedModel` or `None`): What drafts, in assisted decoding.
        prompt_length (`int` or `None`): Columns of `input_ids` that are the prompt; `None` before they are known.
    """

    def __init__(self, frame: FrameType) -> None:
        arguments = frame.f_locals
        self.model: PreTrainedModel = arguments["self"]
        self.processors: list[LogitsProcessor] = list(arguments["logits_processor"] or ())
        self.assistant_model: PreTrainedModel | None = arguments["assistant_model"]
        mask = arguments["kwargs"].get("attention_mask")
        self.attention_mask: torch.Tensor | None = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.prompt_length: int | None = arguments.get("input_ids_length")


def running_generate() -> GenerateCall | None:
    """The innermost running call of `generate`, or `None`: with a draft at work it is the assistant's."""
    return next((GenerateCall(frame) for frame in _frames()), None)


def guided_generate(processor_class: type) -> GenerateCall | None:
    """The call of `generate` that the user made: the outermost of those that decode with a processor of this class."""
    found = None
    for frame in _frames():
        call = GenerateCall(frame)
        if not any(isinstance(processor, processor_class) for processor in call.processors):
            break
        found = call
    return found


def asks_what_is_forbidden() -> bool:
    """Whether prompt lookup asks the calling processor, with scores made up, which tokens of a draft it forbids."""
    frame = sys._getframe(3)
    return frame is not None and frame.f_code is _DRAFT_FROM_PROMPT


def processors_of_batch() -> list[LogitsProcessor]:
    """The logits processors that a running `generate_batch` was given, which takes any argument and ignores it."""
    calls = (frame.f_locals["kwargs"] for frame in _frames(_GENERATE_BATCH))
    return list(next(calls, {}).get("logits_processor") or ())


def _frames(code: CodeType = _GENERATE) -> Iterator[Any]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is code:
            yield frame
        frame = frame.f_back
