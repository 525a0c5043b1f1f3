# SPDX-License-Identifier: Apache-2.0
"""One batch of prompts, decoded by one method at one preference, and scored: rows of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import BatchEncoding, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import as_preference, name_preference
from peft_pblora.preference import Preference
from trl_parm.rewards import Reward, score
from trl_parm.texts import PromptText

from .prompts import encode_prompts
from .sampling import RowSampling, row_seed, split_settings


COLUMNS = (
    "method", "preference", "label", "prompt", "response", "tokens", "seconds", "seed", "extra_parameters",
    "extra_bytes",
)  # fmt: skip
"""Columns of the table beside the rewards."""
# A model may bring settings of sampling along, whose noise would not be the prompt's own.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class Batch:
    """What a method decodes in one call of `generate`.

    Attributes:
        preference (`torch.Tensor` of shape `(k,)` or `None`): α, or `None` for a control.
        prompts (`list`): The prompts as given.
        inputs (`BatchEncoding`): What the base model reads: `input_ids` and `attention_mask`, padded on the left.
        weights (`dict[str, float]` or `None`): α by objective.
    """

    preference: torch.Tensor | None
    prompts: list[PromptText]
    inputs: BatchEncoding
    weights: dict[str, float] | None = None


@dataclass(frozen=True)
class Run:
    """One cell of a sweep: a method at one preference, or at none for a control such as the unguided base.

    Args:
        method (`str`): Its name in the table.
        preference (`Preference`, *optional*): α on the simplex of the rewards.
        decoder (`Callable`, *optional*):
            Makes the processor that guides the decoding of a [`Batch`]; nothing guides if not given.
        generator (`Callable`, *optional*):
            Makes the model that generates, for α by objective, such as a soup; the base model if not given.
        extra_parameters, extra_bytes (`int`, *optional*): What the method keeps in memory beside the base model.
    """

    method: str
    preference: Preference | None = None
    decoder: Callable[[Batch], LogitsProcessor] | None = None
    generator: Callable[[dict[str, float]], PreTrainedModel] | None = None
    extra_parameters: int = 0
    extra_bytes: int = 0

    def weights(self, objectives: Sequence[str]) -> tuple[float, ...] | None:
        """The preference in numbers that a file can hold. Raises `ValueError` if it is off the simplex."""
        if self.preference is None:
            return None
        return tuple(round(weight, 6) for weight in as_preference(self.preference, objectives).tolist())

    def model_at(self, base: PreTrainedModel, objectives: Sequence[str]) -> PreTrainedModel:
        """The model that generates."""
        if self.generator is None:
            return base
        weights = as_preference(cast(Preference, self.preference), objectives).tolist()
        return self.generator(dict(zip(objectives, weights, strict=True)))


class BatchDecoder:
    """Decodes and scores batches of prompts.

    Args:
        tokenizer, rewards, seed, template, max_prompt_length, generation: As in [`sweep`].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Mapping[str, Reward | None],
        seed: int,
        template: str | None,
        max_prompt_length: int | None,
        generation: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.rewards, self.seed = tokenizer, rewards, seed
        self.objectives = list(rewards)
        self.template, self.max_prompt_length = template, max_prompt_length
        self.sampling, self.generation = split_settings(generation)

    def configuration(self) -> dict[str, Any]:
        """What the rows depend on beside the models, as JSON."""
        return {
            "objectives": self.objectives,
            "seed": self.seed,
            "sampling": self.sampling,
            "generation": self.generation,
            "template": self.template,
            "max_prompt_length": self.max_prompt_length,
        }

    def __call__(self, run: Run, model: PreTrainedModel, prompts: list[PromptText]) -> list[dict[str, Any]]:
        """The rows of a run for some prompts, decoded by `model` together."""
        objectives = self.objectives
        preference = None if run.preference is None else as_preference(run.preference, objectives)
        encoded = encode_prompts(self.tokenizer, prompts, self.template, self.max_prompt_length)
        inputs = encoded.to(model.device)
        seeds = [row_seed(self.seed, prompt) for prompt in prompts]
        named = None if preference is None else dict(zip(objectives, preference.tolist(), strict=True))
        processors = [] if run.decoder is None else [run.decoder(Batch(preference, prompts, inputs, named))]
        if self.sampling is not None:
            processors.append(RowSampling(seeds, inputs["input_ids"].shape[1], **self.sampling))
        tokens, seconds = self._generate(model, inputs, processors)
        responses = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        judges = {name: reward for name, reward in self.rewards.items() if reward is not None}
        scores = {name: score(name, reward, prompts, responses) for name, reward in judges.items()}
        weights = run.weights(objectives)
        return [
            {
                "method": run.method,
                "preference": None if weights is None else list(weights),
                "label": "-" if preference is None else name_preference(preference, objectives),
                "prompt": prompt,
                "response": response,
                **{name: values[i] for name, values in scores.items()},
                "tokens": _length(tokens[i], model),
                "seconds": seconds / len(prompts),
                "seed": seeds[i],
                "extra_parameters": run.extra_parameters,
                "extra_bytes": run.extra_bytes,
            }
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    def _generate(
        self, model: PreTrainedModel, inputs: BatchEncoding, processors: list[LogitsProcessor]
    ) -> tuple[torch.Tensor, float]:
        """The new tokens, of shape `(rows, new)`, and the seconds that they took."""
        start = _now(model.device)
        output = cast(Any, model).generate(
            **inputs,
            logits_processor=processors,
            pad_token_id=self.tokenizer.pad_token_id,
            **GREEDY,
            **self.generation,
        )
        return output[:, inputs["input_ids"].shape[1] :], _now(model.device) - start


def _length(tokens: torch.Tensor, model: Any) -> int:
    """How many tokens a row has, its first end token included."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return len(tokens)
    found = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).nonzero()
    return int(found[0]) + 1 if len(found) else len(tokens)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
