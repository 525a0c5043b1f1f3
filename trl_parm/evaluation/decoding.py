# SPDX-License-Identifier: Apache-2.0
"""One batch of prompts, decoded by one method at one preference, and scored: rows of the table.

A method is a model for each preference. All of them generate greedily from what they return, and where texts are
sampled, that is the noise of the prompt: not of the batch, the method, or what was decoded before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import BatchEncoding, GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import as_preference, name_preference
from peft_pblora.preference import Preference
from trl_parm.decoding import BASE, Guided
from trl_parm.noise import Sampling, row_seed
from trl_parm.rewards import Reward, score
from trl_parm.texts import PromptText, as_messages, fill


COLUMNS = (
    "method", "preference", "label", "prompt", "response", "tokens", "seconds", "seed", "extra_parameters",
    "extra_bytes",
)  # fmt: skip
"""Columns of the table beside the rewards."""
# A model may bring settings of sampling along, whose noise would not be the prompt's own.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
SETTINGS = {setting.name: setting.default for setting in fields(Sampling)}
"""Settings of sampling, each with the value that has no effect."""
REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "typical_p", "epsilon_cutoff", "eta_cutoff")
WITHOUT_EFFECT = (*GREEDY, *SETTINGS, *REFUSED, "max_length", "use_cache", "transformers_version")
"""What a model's generation config says of something else than the distribution of a token."""


@dataclass(frozen=True)
class Batch:
    """What a method decodes in one call of `generate`.

    Attributes:
        preference (`torch.Tensor` of shape `(k,)` or `None`): α, or `None` for a control.
        prompts (`list`): The prompts as given.
        inputs (`BatchEncoding`): What the base model reads: `input_ids` and `attention_mask`, padded on the left.
        weights (`dict[str, float]`): α by objective; empty for a control.
    """

    preference: torch.Tensor | None
    prompts: list[PromptText]
    inputs: BatchEncoding
    weights: dict[str, float]


ModelAt = Callable[[Batch], Any]
"""A method: the model that decodes a [`Batch`] at its preference, such as `PARM(base, arm, batch.preference)`; or that
and further arguments of its `generate` as a pair."""


@dataclass(frozen=True)
class Run:
    """One cell of a sweep: a method at one preference, or at none for a control such as the unguided base.

    Args:
        method (`str`): Its name in the table.
        preference (`Preference`, *optional*): α on the simplex of the rewards.
        model (`Callable`, *optional*):
            Gives the model that decodes a [`Batch`], such as `lambda batch: PARM(base, arm, batch.preference)`, or a
            pair of it and of further arguments of its `generate`; the base model if not given.
        extra_parameters, extra_bytes (`int`, *optional*): What the method keeps in memory beside the base model.
    """

    method: str
    preference: Preference | None = None
    model: ModelAt | None = None
    extra_parameters: int = 0
    extra_bytes: int = 0

    def weights(self, objectives: Sequence[str]) -> tuple[float, ...] | None:
        """The preference in numbers that a file can hold. Raises `ValueError` if it is off the simplex."""
        if self.preference is None:
            return None
        return tuple(round(weight, 6) for weight in as_preference(self.preference, objectives).tolist())


class BatchDecoder:
    """Decodes and scores batches of prompts.

    Args:
        tokenizer, rewards, seed, template, max_prompt_length, generation: As in [`sweep`].
        base_config (`GenerationConfig`): The base model's, whose settings act on every method.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: Mapping[str, Reward | None],
        seed: int,
        template: str | None,
        max_prompt_length: int | None,
        generation: Mapping[str, Any],
        base_config: GenerationConfig,
    ) -> None:
        self.tokenizer, self.rewards, self.seed = tokenizer, rewards, seed
        self.objectives = list(rewards)
        self.template, self.max_prompt_length = template, max_prompt_length
        self.sampling, self.generation = split_settings(generation)
        self.base_config = base_config

    def configuration(self) -> dict[str, Any]:
        """What the rows depend on beside the models, as JSON."""
        return {
            "objectives": self.objectives,
            "seed": self.seed,
            "sampling": self.sampling,
            "generation": self.generation,
            "generation_config": acting_settings(self.base_config),
            "template": self.template,
            "max_prompt_length": self.max_prompt_length,
        }

    def __call__(self, run: Run, base: PreTrainedModel, prompts: list[PromptText]) -> list[dict[str, Any]]:
        """The rows of a run for some prompts, decoded together."""
        objectives = self.objectives
        α = None if run.preference is None else as_preference(run.preference, objectives)
        inputs = encode_prompts(self.tokenizer, prompts, self.template, self.max_prompt_length).to(base.device)
        seeds = [row_seed(self.seed, prompt) for prompt in prompts]
        named = {} if α is None else dict(zip(objectives, α.tolist(), strict=True))
        found = run.model(Batch(α, prompts, inputs, named)) if run.model is not None else base
        model, arguments = found if isinstance(found, tuple) else (found, {})
        tokens, seconds = self._generate(model, arguments, inputs, seeds)
        responses = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        judges = {name: reward for name, reward in self.rewards.items() if reward is not None}
        scores = {name: score(name, reward, prompts, responses) for name, reward in judges.items()}
        weights = run.weights(objectives)
        return [
            {
                "method": run.method,
                "preference": None if weights is None else list(weights),
                "label": "-" if α is None else name_preference(α, objectives),
                "prompt": prompt,
                "response": response,
                **{name: values[i] for name, values in scores.items()},
                "tokens": text_length(tokens[i], self.base_config),
                "seconds": seconds / len(prompts),
                "seed": seeds[i],
                "extra_parameters": run.extra_parameters,
                "extra_bytes": run.extra_bytes,
            }
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    def _generate(
        self, model: Any, arguments: Mapping[str, Any], inputs: BatchEncoding, seeds: list[int]
    ) -> tuple[torch.Tensor, float]:
        """The new tokens, of shape `(rows, new)`, and the seconds that they took."""
        # log π of every method, so that a repetition penalty and its like act on all of them alike.
        model = model if isinstance(model, Guided) else Guided(model, BASE)
        length = cast(torch.Tensor, inputs["input_ids"]).shape[1]
        noise = [] if self.sampling is None else [RowSampling(seeds, length, **self.sampling)]
        start = _now(model.device)
        output = cast(Any, model).generate(
            **inputs,
            **arguments,
            logits_processor=noise,
            pad_token_id=self.tokenizer.pad_token_id,
            **GREEDY,
            **self.generation,
        )
        return output[:, length:], _now(model.device) - start


class RowSampling(LogitsProcessor):
    """Samples from the scores that it gets, with noise for each row (see [`trl_parm.noise`]): the last processor of a
    *greedy* `generate`. Methods that are compared on a prompt see the same noise, so that they differ less by chance.

    Args:
        seeds (`Sequence[int]`): A seed for each row, from [`row_seed`].
        prompt_length (`int`): Columns of `input_ids` that are the prompt.
        **settings: `temperature`, `top_k`, `top_p` and `min_p`, each without effect if not given.

    Raises:
        ValueError: a setting out of its range; at a call, a batch of another size.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, **settings: Any) -> None:
        self.seeds, self.prompt_length, self.sampling = list(seeds), prompt_length, Sampling(**settings)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(scores) != len(self.seeds):
            raise ValueError(f"There are {len(self.seeds)} seeds, but the batch has {len(scores)} rows.")
        return self.sampling.noisy(scores, self.seeds, [input_ids.shape[1] - self.prompt_length] * len(scores))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptText],
    template: str | None = None,
    max_length: int | None = None,
) -> BatchEncoding:
    """Tokenizes a batch of prompts, padded on the left.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompts (`Sequence[PromptText]`): Texts or conversations.
        template (`str`, *optional*):
            A text with `{prompt}` in it, such as `"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"`. If not
            given, the tokenizer's chat template, and without one the prompt as it is.
        max_length (`int`, *optional*): Most tokens; of a longer prompt the end is kept.

    Raises:
        ValueError: a template without `{prompt}`, or a conversation of several messages without chat template.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    fit: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    if template is not None or tokenizer.chat_template is None:
        texts = [fill(template or "{prompt}", prompt=prompt) for prompt in prompts]
        return tokenizer(texts, return_tensors="pt", padding=True, **fit)
    chats = [as_messages(prompt, "user") for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True, **fit
    )
    return cast(BatchEncoding, encoded)


def split_settings(generation: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Takes the settings of sampling out of the arguments of `generate`.

    Returns:
        `tuple` of the settings, or `None` without `do_sample=True`, and the other arguments.

    Raises:
        ValueError: settings without `do_sample=True` or out of their range, or a mode of `generate` in which a row has
            no noise of its own.
    """
    refused = [name for name in REFUSED if generation.get(name) not in (None, 1, 1.0)]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} can't be used here, where every prompt has one response and noise of its own. "
            f"Sampling knows {', '.join(SETTINGS)}."
        )
    others = {name: value for name, value in generation.items() if name not in (*SETTINGS, "do_sample")}
    settings = {name: generation[name] for name in SETTINGS if generation.get(name) not in (None, SETTINGS[name])}
    if generation.get("do_sample"):
        Sampling(**settings)
        return settings, others
    if settings:
        raise ValueError(f"{', '.join(settings)} act on sampling only. Pass `do_sample=True` too.")
    return None, others


def acting_settings(config: GenerationConfig) -> dict[str, Any] | None:
    """What a model's generation config does to the distribution of a token, such as a `repetition_penalty`."""
    found = {
        name: value
        for name, value in config.to_diff_dict().items()
        if value not in (None, False) and not name.startswith(("_", "output_")) and not name.endswith("_token_id")
    }
    return {name: value for name, value in found.items() if name not in WITHOUT_EFFECT} or None


def text_length(tokens: torch.Tensor, config: Any) -> int:
    """How many of a row's new tokens are its text, the first end token of a generation config included."""
    if config.eos_token_id is None:
        return len(tokens)
    ends = torch.isin(tokens, torch.as_tensor(config.eos_token_id, device=tokens.device)).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(tokens)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
