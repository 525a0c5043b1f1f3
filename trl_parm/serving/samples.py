# SPDX-License-Identifier: Apache-2.0
"""One text to write, by the requests of one family."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from .capacity import Capacity, Need
from .guidance import CoupledRequest, Guidance, coupled_requests


_numbers = itertools.count()


@dataclass
class Sample:
    """The requests of a family, the base model's first, and their outputs so far by the names of the requests."""

    name: str
    prompt: list[int]
    requests: list[CoupledRequest]
    need: Need
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return len(self.outputs) == len(self.requests) and all(o.finished for o in self.outputs.values())

    def result(self) -> Any:
        """The base model's output. Raises `RuntimeError` unless all requests wrote the same text."""
        outputs = [self.outputs[request.name] for request in self.requests]
        texts = [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]
        if any(text != texts[0] for text in texts):
            written = "; ".join(f"{len(tokens)} tokens, finished by {reason}" for tokens, reason in texts)
            raise RuntimeError(
                f"The coupled requests of {self.name} wrote different texts ({written}), so the text is not guided "
                "throughout. See docs/serving.md for what takes requests apart."
            )
        return outputs[0]


def make_sample(capacity: Capacity, tokenizer: Any, prompt: Any, params: Any, guidance: Guidance) -> Sample:
    """Makes the requests of one sample.

    Args:
        capacity ([`Capacity`]): Of the engine.
        tokenizer: Of the engine; not used for token ids.
        prompt (`str` or `list[int]`): A text or token ids.
        params (`SamplingParams`): What the user asks for.
        guidance ([`Guidance`]): The guides.

    Raises:
        ValueError: what this engine or coupled requests can't have.
    """
    tokens = tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
    name = f"guided-{next(_numbers)}"
    requests = coupled_requests(name, params, guidance)
    need = capacity.need(len(tokens), params.max_tokens, [request.lora.lora_int_id for request in requests[1:]])
    return Sample(name, tokens, requests, need)
