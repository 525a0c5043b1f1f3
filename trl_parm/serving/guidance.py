# SPDX-License-Identifier: Apache-2.0
"""What guides a sample, and the coupled requests of one family that write its text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .engine import Capacity, Need
from .families import Family, Member


_numbers = itertools.count()


@dataclass(frozen=True)
class Guidance:
    """The guides of one sample: exported LoRAs (`peft_pblora.save_as_lora`), their weights and β.

        log π = log π_base + Σ_i weight_i/β · log π_i − log Z

    One LoRA of weight 1 is PARM at the preference that the LoRA was exported at; several are GenARM with α as weights.
    A guide of weight 0 costs nothing.

    Args:
        loras (`LoRARequest` or a sequence of them): vLLM's; the number of a LoRA must be its own.
        beta (`float`, *optional*, defaults to 1.0): β > 0.
        weights (`Sequence[float]`, *optional*): α_i ≥ 0 of each LoRA, not all 0; 1 for each if not given.

    Raises:
        ValueError: no LoRA, β not positive and finite, or weights that do not fit.
    """

    loras: Any
    beta: float = 1.0
    weights: Sequence[float] | None = None

    base_strength: ClassVar[float] = 1.0
    scored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.loras, list | tuple):
            object.__setattr__(self, "loras", (self.loras,))
        weights = [1.0] * len(self.loras) if self.weights is None else [float(weight) for weight in self.weights]
        if not (isinstance(self.beta, int | float) and math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"`beta` is {self.beta!r}, but it must be positive and finite. The strength is 1/beta.")
        if len(weights) != len(self.loras):
            raise ValueError(f"There are {len(self.loras)} LoRAs, but {len(weights)} weights. Give one for each.")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"`weights` is {weights}, but weights must be finite, not negative, and not all 0.")
        object.__setattr__(self, "weights", weights)

    def terms(self) -> list[tuple[Any, float]]:
        """The LoRAs that count, each with its strength weight/β."""
        return [(lora, weight / self.beta) for lora, weight in zip(self.loras, self.weights or ()) if weight]


@dataclass(frozen=True)
class Mixture:
    """Any weighted sum of log-probabilities over one set of weights, of which [`Guidance`] is one kind.

        log π = w_base · log π_base + Σ_i w_i · log π_i − log Z

    Args:
        guides (`Sequence[tuple[LoRARequest or None, float]]`, *optional*): LoRAs with their w_i ≠ 0; `None` is the
            base model.
        base_strength (`float`, *optional*, defaults to 1.0): w_base. With 0 the base model's request is only read.
        scored (`bool`, *optional*, defaults to `False`): Whether samples tell log π and log π_base of their tokens,
            for which the engine needs `logprobs_mode="processed_logits"`; see `guided_samples`.
    """

    guides: Sequence[tuple[Any, float]] = ()
    base_strength: float = 1.0
    scored: bool = False

    def terms(self) -> list[tuple[Any, float]]:
        """The guides, each with its strength."""
        return list(self.guides)


@dataclass(frozen=True)
class CoupledRequest:
    """One request to submit. `lora` is None for the base model's."""

    name: str
    params: Any
    lora: Any


def coupled_requests(name: str, params: Any, guidance: Guidance | Mixture) -> list[CoupledRequest]:
    """The requests of one family, the base model's first, for a user's `SamplingParams`, which are not changed.

    What samples the token (temperature, top_k, top_p, min_p, seed) goes to the logits processor, and the engine
    decodes greedily. A sample without a seed gets one of torch's global generator. What masks tokens or biases logits
    acts on the base model. Raises `ValueError` for a setting that coupled requests do not have.
    """
    terms = guidance.terms()
    strengths = tuple(strength for _, strength in terms)
    seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
    seed = seed if params.temperature else 0
    family = Family(
        name, strengths, params.temperature, max(params.top_k, 0), params.top_p, seed, params.min_p,
        guidance.base_strength, guidance.scored,
    )  # fmt: skip
    requests = []
    for role, lora in enumerate([None, *(lora for lora, _ in terms)]):
        own = params.clone()
        own.temperature, own.top_k, own.top_p, own.min_p, own.seed = 0.0, 0, 1.0, 0.0, None
        own.extra_args = {**(params.extra_args or {}), **Member(family, role).extra_args()}
        own.output_kind = type(params.output_kind).FINAL_ONLY if role else type(params.output_kind).CUMULATIVE
        if role:
            own.logprobs = own.prompt_logprobs = own.logit_bias = None
            own.detokenize = bool(params.stop)
        if family.scored:
            own.logprobs = 0  # of the chosen token alone
        Member.of(own)
        requests.append(CoupledRequest(f"{name}-{role}", own, lora))
    return requests


@dataclass
class Sample:
    """The requests of a family, the base model's first, and their outputs so far by the names of the requests."""

    name: str
    prompt: list[int]
    requests: list[CoupledRequest]
    need: Need
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the requests."""
        return [request.name for request in self.requests]

    @property
    def finished(self) -> bool:
        return len(self.outputs) == len(self.requests) and all(o.finished for o in self.outputs.values())

    def result(self) -> Any:
        """The base model's output. Raises `RuntimeError` unless all requests wrote the same text."""
        outputs = [self.outputs[name] for name in self.names]
        texts = [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason) for output in outputs]
        if any(text != texts[0] for text in texts):
            written = "; ".join(f"{len(tokens)} tokens, finished by {reason}" for tokens, reason in texts)
            raise RuntimeError(
                f"The coupled requests of {self.name} wrote different texts ({written}), so the text is not guided "
                "throughout. See docs/serving.md for what takes requests apart."
            )
        return outputs[0]

    def log_probs(self) -> tuple[float, float]:
        """Σ log π and Σ log π_base of the text's tokens, of a sample that is scored."""
        texts = [self.outputs[name].outputs[0] for name in (self.names[0], self.names[-1])]
        of_method, of_base = (
            sum(step[token].logprob for step, token in zip(text.logprobs, text.token_ids, strict=True))
            for text in texts
        )
        return of_method, of_base


def make_sample(capacity: Capacity, tokenizer: Any, prompt: Any, params: Any, guidance: Guidance | Mixture) -> Sample:
    """The requests of one sample, its prompt a text or token ids; `tokenizer` gives the engine's.

    Raises `ValueError` for what this engine or coupled requests can't have.
    """
    tokens = tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
    name = f"guided-{next(_numbers)}"
    requests = coupled_requests(name, params, guidance)
    loras = [request.lora and request.lora.lora_int_id for request in requests[1:]]
    need = capacity.need(len(tokens), params.max_tokens, loras)
    return Sample(name, tokens, requests, need)
