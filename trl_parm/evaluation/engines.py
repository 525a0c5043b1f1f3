# SPDX-License-Identifier: Apache-2.0
"""An engine: what turns prompts, each with a run, into tokens. A method is what decodes at α; an engine decodes it.

This is transformers' `generate` in this process; vLLM's engine is in [`trl_parm.evaluation.on_vllm`].
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from trl_parm.decoding import BASE, Guided
from trl_parm.decoding.adapters import Adapters
from trl_parm.decoding.probes import sees_over_padding
from trl_parm.decoding.search import TopKReward
from trl_parm.templates import response_text
from trl_parm.texts import PromptText

from .decoding import (
    GREEDY,
    Batch,
    RowSampling,
    Run,
    acting_settings,
    encode_prompts,
    prompt_ids,
    text_length,
    with_common_start,
)
from .likelihood import ChosenLogProbs, base_log_probs, own_adapters


TRANSFORMERS, VLLM = "transformers", "vllm"
"""The engines by their names."""
BLIND = {"max_new_tokens", "min_new_tokens", "eos_token_id", "suppress_tokens"}
"""Settings of `generate` by which nothing reads the tokens of a text, as a repetition penalty reads padding too."""


@dataclass(frozen=True)
class Decoding:
    """What is the same for all texts, whatever decodes them.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): The base model's.
        objectives (`list[str]`): What preferences weigh.
        template, max_prompt_length, escape_control_tokens: How prompts are read, as of [`encode_prompts`].
        sampling (`dict` or `None`): Settings of [`Sampling`] other than their defaults; `None` is greedy.
        generation (`dict`): Other arguments of `generate`.
        acting (`dict`): What the base model's generation config does to a token's distribution.
        ends (`int`, `list[int]` or `None`): End tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    objectives: list[str]
    template: str | None
    max_prompt_length: int | None
    escape_control_tokens: bool
    sampling: dict[str, Any] | None
    generation: dict[str, Any]
    acting: dict[str, Any]
    ends: int | list[int] | None

    def ids(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """The tokens of each prompt, see [`prompt_ids`]."""
        return prompt_ids(self.tokenizer, prompts, *self._reading)

    def responses(self, prompts: Sequence[PromptText], answers: Sequence[Answer]) -> list[str]:
        """The texts of answers. One that goes on with a text keeps the space before it; a chat template writes its
        own."""
        if self.template is None and self.tokenizer.chat_template is not None:
            return self.tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
        read = zip(self.ids(prompts), answers, strict=True)
        return [response_text(self.tokenizer, ids, answer.tokens) for ids, answer in read]

    def inputs(self, prompts: Sequence[PromptText]) -> BatchEncoding:
        """The same of a batch, padded, see [`encode_prompts`]."""
        return encode_prompts(self.tokenizer, prompts, *self._reading)

    @property
    def _reading(self) -> tuple[str | None, int | None, bool]:
        return self.template, self.max_prompt_length, self.escape_control_tokens

    def batch(self, runs: Sequence[Run], prompts: Sequence[PromptText], inputs: BatchEncoding) -> Batch:
        """What the method of some runs, which share batches, decodes for the prompts beside them."""
        αs = [run.vector(self.objectives) for run in runs]
        names = [{} if α is None else dict(zip(self.objectives, α.tolist(), strict=True)) for α in αs]
        several = any(run is not runs[0] for run in runs)
        α, named = (torch.stack(cast(Any, αs)), names) if several else (αs[0], names[0])
        return Batch(
            α, list(prompts), inputs, named, self.escape_control_tokens, runs[0].allow_off_simplex,
            max_prompt_length=self.max_prompt_length,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The tokens of a text, its end token included, and over them Σ log π of its method and Σ log π_base."""

    tokens: list[int]
    log_prob: float
    log_prob_base: float


class Engine(Protocol):
    """Decodes runs, whose methods it has loaded."""

    def answers(
        self, how: Decoding, runs: Sequence[Run], prompts: Sequence[PromptText], seeds: Sequence[int]
    ) -> tuple[list[Answer], float]:
        """The answer of each run to the prompt beside it, with the noise of a seed each, decoded together; and the
        seconds that they took."""
        ...


class Transformers:
    """A base model in this process, whose `generate` decodes.

    Args:
        base (`PreTrainedModel`): The frozen base model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._over_padding: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def answers(
        self, how: Decoding, runs: Sequence[Run], prompts: Sequence[PromptText], seeds: Sequence[int]
    ) -> tuple[list[Answer], float]:
        inputs, method = how.inputs(prompts).to(self.base.device), runs[0].model
        found = self.base if method is None else method(how.batch(runs, prompts, inputs))
        model, arguments = found if isinstance(found, tuple) else (found, {})
        chosen = ChosenLogProbs()
        tokens, seconds = self._generate(how, model, arguments, inputs, seeds, chosen)
        lengths = [text_length(row, how.ends) for row in tokens]
        guided = [row[:length].sum().item() for row, length in zip(chosen.of(tokens), lengths, strict=True)]
        read = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        texts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        likely = base_log_probs(self.base, read, texts, own_adapters(model, self.base))
        return [Answer(text.tolist(), *of_one) for text, *of_one in zip(texts, guided, likely, strict=True)], seconds

    def _generate(
        self,
        how: Decoding,
        model: Any,
        arguments: Mapping[str, Any],
        inputs: BatchEncoding,
        seeds: Sequence[int],
        chosen: ChosenLogProbs,
    ) -> tuple[torch.Tensor, float]:
        """The new tokens, of shape `(rows, new)`, and the seconds that they took. All methods generate greedily, and
        where texts are sampled, that is the noise of each prompt."""
        # log π of every method, so that a repetition penalty and its like act on all of them alike.
        model = model if isinstance(model, Guided) else Guided(model, BASE)
        own = dict.fromkeys(acting_settings(cast(Any, model.generation_config)) or {})  # the base's act instead
        length = cast(torch.Tensor, inputs["input_ids"]).shape[1]
        noise = [] if how.sampling is None else [RowSampling(seeds, length, **how.sampling)]
        if self._reads_over_padding(how, model, arguments):
            inputs = with_common_start(inputs)
        start = _now(model.device)
        output = cast(Any, model).generate(
            **inputs,
            **arguments,
            logits_processor=[chosen, *noise],
            pad_token_id=how.tokenizer.pad_token_id,
            end_tokens=[how.ends] if isinstance(how.ends, int) else how.ends,
            **{**own, **how.acting, **GREEDY, "eos_token_id": how.ends, **how.generation},
        )
        return output[:, length:], _now(model.device) - start

    def _reads_over_padding(self, how: Decoding, model: Guided, arguments: Mapping[str, Any]) -> bool:
        """Whether padding may stand within the prompts, so that what they all begin with is read once."""
        own_prompts = {"guide_input_ids", "guide_attention_mask"}
        if {*how.generation, *how.acting} - BLIND or set(arguments) - own_prompts:
            return False
        scorers = set(model.formula.scorers()) - {BASE, *model.terms}
        if not all(isinstance(scorer, TopKReward) and scorer.reads_text_alone for scorer in scorers):
            return False
        for backbone in (model.backbone, *(term.backbone for term in model.terms)):
            if backbone not in self._over_padding:
                self._over_padding[backbone] = sees_over_padding(backbone, Adapters(backbone))
        return all(self._over_padding[term.backbone] for term in model.terms) and self._over_padding[model.backbone]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
