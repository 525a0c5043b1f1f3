# SPDX-License-Identifier: Apache-2.0
"""What methods have in common: the batches that they decode, the settings of `generate`, and noise of each prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import BatchEncoding, GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from peft_pblora import as_preference
from peft_pblora.preference import Preference
from trl_parm.noise import Sampling
from trl_parm.shapes import read_text
from trl_parm.templates import tokenize_chat, without_end
from trl_parm.texts import PromptText, as_messages, fill

from .control_tokens import escaped_ids


# A model may bring settings of sampling along, whose noise would not be the prompt's own.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
SETTINGS = {setting.name: setting.default for setting in fields(Sampling)}
"""Settings of sampling, each with the value that has no effect."""
REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "typical_p", "epsilon_cutoff", "eta_cutoff")
WITHOUT_EFFECT = (
    *GREEDY, *SETTINGS, *REFUSED, "max_length", "use_cache", "transformers_version", "bos_token_id", "eos_token_id",
    "pad_token_id", "decoder_start_token_id",
)  # fmt: skip
"""What a model's generation config says of something else than the distribution of a token, or where a text ends."""


@dataclass(frozen=True)
class Batch:
    """What a method decodes in one call of `generate`.

    Attributes:
        preference (`torch.Tensor` of shape `(k,)` or `(rows, k)`, or `None`): α, or that of each row where runs are
            decoded [together](trl_parm.evaluation.decoding.Run), or `None` for a control.
        prompts (`list`): The prompts as given.
        inputs (`BatchEncoding`): What the base model reads: `input_ids` and `attention_mask`, padded on the left.
        weights (`dict[str, float]`, or a `list` of one for each row): α by objective; empty for a control.
        escape_control_tokens (`bool`): As in [`encode_prompts`], for guides with a template of their own.
        allow_off_simplex (`bool`): Whether α may extrapolate, as in [`Run`].
        beta (`float` or `torch.Tensor` of shape `(rows,)`, *optional*): β in the place of a method's own, of all rows
            or one for each.
        max_prompt_length (`int`, *optional*): As in [`encode_prompts`], of guides with a template of their own too.
    """

    preference: torch.Tensor | None
    prompts: list[PromptText]
    inputs: BatchEncoding
    weights: dict[str, float] | list[dict[str, float]]
    escape_control_tokens: bool = False
    allow_off_simplex: bool = False
    beta: float | torch.Tensor | None = None
    max_prompt_length: int | None = None

    def beta_or(self, own: float) -> float | torch.Tensor:
        """β of the batch, or a method's own."""
        return own if self.beta is None else self.beta


ANY, SAME_OBJECTIVES = "any", "same objectives"
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
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            As in [`as_preference`]; the model gets it in its batches.
        together (`str`, *optional*): Whether runs of this method share batches, in which every row has a preference of
            its own: `ANY` do, or those that weigh the [`SAME_OBJECTIVES`]; none if not given. A prompt is then read
            once for several preferences, where the base model reads the same.
    """

    method: str
    preference: Preference | None = None
    model: ModelAt | None = None
    extra_parameters: int = 0
    extra_bytes: int = 0
    together: str | None = None
    allow_off_simplex: bool = False

    def weights(self, objectives: Sequence[str]) -> tuple[float, ...] | None:
        """The preference in numbers that a file can hold. Raises `ValueError` if it is off the simplex."""
        α = self.vector(objectives)
        return None if α is None else tuple(round(weight, 6) for weight in α.tolist())

    def vector(self, objectives: Sequence[str]) -> torch.Tensor | None:
        """α of shape `(k,)`, or `None` for a control. Raises `ValueError` as [`weights`]."""
        if self.preference is None:
            return None
        return as_preference(self.preference, objectives, allow_off_simplex=self.allow_off_simplex)


class RowSampling(LogitsProcessor):
    """Samples from the scores that it gets, with noise for each row (see [`trl_parm.noise`]): the last processor of a
    *greedy* `generate`. Methods that are compared on a prompt see the same noise, so that they differ less by chance.

    Args:
        seeds (`Sequence[int]`): A seed for each row, from [`row_seed`].
        prompt_length (`int`): Columns of `input_ids` that are the prompt.
        **settings: Of [`Sampling`].
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
    escape_control_tokens: bool = False,
) -> BatchEncoding:
    """Tokenizes a batch of prompts, padded on the left.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompts (`Sequence[PromptText]`): Texts or conversations.
        template (`str`, *optional*): A text with `{prompt}` in it, such as `"USER: {prompt} ASSISTANT:"`; if not
            given, the tokenizer's chat template, and without one the prompt as it is.
        max_length (`int`, *optional*): Most tokens; of a longer prompt the end is kept.
        escape_control_tokens (`bool`, *optional*, defaults to `False`):
            Read the text of a control token in a prompt as text; see [`escaped_ids`].

    Raises:
        ValueError: a template without `{prompt}`; a prompt that is neither text nor messages, has no tokens, or that
            the chat template refuses; a conversation of several messages without chat template.
    """
    ids = prompt_ids(tokenizer, prompts, template, max_length, escape_control_tokens)
    return tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")


def with_common_start(inputs: BatchEncoding) -> BatchEncoding:
    """The same prompts, `(rows, columns)` as before, but what all of them begin with stands in the first columns, and
    padding after it in the place of before it: a guided model then reads that once."""
    ids, mask = cast(torch.Tensor, inputs["input_ids"]), cast(torch.Tensor, inputs["attention_mask"])
    pads = ids.shape[1] - mask.sum(1, keepdim=True)
    columns = torch.arange(ids.shape[1], device=ids.device)
    begin = ids.gather(1, (pads + columns[: int(mask.sum(1).min()) - 1]).clamp(max=ids.shape[1] - 1))
    common = int((begin == begin[:1]).all(0).int().cumprod(0).sum())
    padding = (columns >= common) & (columns < common + pads)
    moved = ids.gather(1, torch.where(columns < common, pads + columns, columns).expand_as(ids))
    moved = moved.masked_fill(padding, int(ids[mask == 0].amax()) if bool(padding.any()) else 0)
    return BatchEncoding({"input_ids": moved, "attention_mask": (~padding).to(mask)})


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptText],
    template: str | None = None,
    max_length: int | None = None,
    escape_control_tokens: bool = False,
) -> list[list[int]]:
    """The ids of each prompt; arguments and errors as of [`encode_prompts`]."""
    if escape_control_tokens:
        prompts = [read_text(prompt, f"row {number} of `prompts`") for number, prompt in enumerate(prompts)]
        return escaped_ids(tokenizer, prompts, template, max_length)
    chat = template is None and tokenizer.chat_template is not None
    fit: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    found, side = [], tokenizer.truncation_side
    try:
        tokenizer.truncation_side = "left"
        for number, prompt in enumerate(prompts):
            where = f"row {number} of `prompts`"
            prompt = read_text(prompt, where)
            if chat:
                ids = tokenize_chat(tokenizer, as_messages(prompt, "user"), where, add_generation_prompt=True, **fit)
            else:
                text = fill(template or "{prompt}", prompt=prompt)
                ids = without_end(tokenizer, text, cast(list[int], tokenizer(text, **fit)["input_ids"]))
            if not ids:
                raise ValueError(f"{where} has no tokens, so that there is nothing to go on from. Leave it out.")
            found.append(ids)
    finally:
        tokenizer.truncation_side = side
    return found


def split_settings(generation: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Takes apart the arguments of `generate`: the settings of sampling, or `None` if it is greedy, and the others.

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
    settings = {name: generation[name] for name in SETTINGS if generation.get(name) not in (None, SETTINGS[name])}
    others = {name: value for name, value in generation.items() if name not in (*SETTINGS, "do_sample")}
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
        if value not in (None, False) and name not in WITHOUT_EFFECT and not name.startswith(("_", "output_"))
    }
    return found or None


def text_length(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> int:
    """How many of a row's new tokens are its text, the first end token included."""
    if ends is None:
        return len(tokens)
    found = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).nonzero()
    return int(found[0]) + 1 if len(found) else len(tokens)


def ends_within(tokens: Sequence[int], ends: int | Sequence[int] | None) -> bool:
    """Whether an end token is among a text's tokens, so that it was not cut off."""
    return not set(end_ids(ends)).isdisjoint(tokens)


def end_ids(ends: int | Sequence[int] | None) -> list[int]:
    """The end tokens, of which there may be one, several or none."""
    return [ends] if isinstance(ends, int) else list(ends or ())
