# SPDX-License-Identifier: Apache-2.0
"""Decodes the same prompts with every method at every preference and scores the responses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import BatchEncoding, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import as_preference, name_preference
from peft_pblora.preference import Preference
from trl_parm.rewards import Reward

from .metrics import mean_and_error


Decoder = Callable[[torch.Tensor | None], LogitsProcessor]
"""Makes the processor that guides one call of `generate`, at a preference of shape `(k,)` or at none."""


@dataclass(frozen=True)
class Run:
    """One cell of a sweep: a method at one preference, or at none for a control such as the unguided base."""

    method: str
    preference: Preference | None = None
    decoder: Decoder | None = None


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    runs: Sequence[Run],
    rewards: Mapping[str, Reward],
    batch_size: int = 16,
    seed: int = 0,
    on_batch: Callable[[Run], Any] = lambda run: None,
    **generation: Any,
) -> Dataset:
    """Decodes every prompt in every run and scores the responses.

    Args:
        model (`PreTrainedModel`): The frozen base model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer; prompts go through its chat template if it has one.
        prompts (`Sequence[str]`): The prompts, the same for all runs.
        runs (`Sequence[Run]`): Methods and preferences.
        rewards (`Mapping[str, Reward]`): Objective name → reward, higher is better.
        batch_size (`int`, *optional*, defaults to 16): Prompts decoded at once.
        seed (`int`, *optional*, defaults to 0): Set before each batch, so that all runs see the same noise.
        on_batch (`Callable`, *optional*): Called after each batch, for progress bars.
        **generation: For `generate`, such as `max_new_tokens`.

    Returns:
        `datasets.Dataset` with one row for each run and prompt: `method`, `preference` (weights or `None`), `label`,
        `prompt`, `response`, the reward of each objective, `tokens` and `seconds` (the batch's time divided evenly).

    Raises:
        ValueError: no prompts, or a reward that is not finite or of the wrong number.
    """
    if not prompts:
        raise ValueError("`prompts` is empty. Give at least one prompt.")
    rows = []
    for run in runs:
        for batch in _batches(prompts, batch_size):
            rows += _decode(model, tokenizer, batch, run, rewards, seed, generation)
            on_batch(run)
    return Dataset.from_list(rows)


def summarize(table: Dataset, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Mean reward and standard error of each run, in the order in which the runs stand in the table.

    Returns:
        `list[dict]` with `method`, `preference`, `label` and, for each objective, `<objective>` and
        `<objective>_error`.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in cast(Iterable[dict[str, Any]], table):
        groups.setdefault((row["method"], row["label"]), []).append(row)
    summary = []
    for (method, label), rows in groups.items():
        cell = {"method": method, "preference": rows[0]["preference"], "label": label}
        for name in objectives:
            cell[name], cell[f"{name}_error"] = mean_and_error([row[name] for row in rows])
        summary.append(cell)
    return summary


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> BatchEncoding:
    """Tokenizes a batch of user prompts, padded on the left, through the chat template if the tokenizer has one."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        return tokenizer(list(prompts), return_tensors="pt", padding=True)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    return cast(BatchEncoding, encoded)


def _decode(model, tokenizer, prompts, run: Run, rewards, seed, generation) -> list[dict]:
    objectives = list(rewards)
    inputs = encode_prompts(tokenizer, prompts).to(model.device)
    preference = None if run.preference is None else as_preference(run.preference, objectives)
    processors = [] if run.decoder is None else [run.decoder(preference)]
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(**inputs, logits_processor=processors, pad_token_id=tokenizer.pad_token_id, **generation)
    seconds = time.perf_counter() - start
    new = output[:, inputs["input_ids"].shape[1] :]
    responses = tokenizer.batch_decode(new, skip_special_tokens=True)
    scores = {name: _score(name, reward, prompts, responses) for name, reward in rewards.items()}
    return [
        {
            "method": run.method,
            "preference": None if preference is None else preference.tolist(),
            "label": "-" if preference is None else name_preference(preference, objectives),
            "prompt": prompt,
            "response": response,
            **{name: values[i] for name, values in scores.items()},
            "tokens": int((new[i] != tokenizer.pad_token_id).sum()),
            "seconds": seconds / len(prompts),
        }
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def _score(name: str, reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    values = [float(value) for value in reward(prompts, responses)]
    if len(values) != len(responses) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"The reward {name!r} returned {values} for {len(responses)} responses: not one number each.")
    return values


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
