# SPDX-License-Identifier: Apache-2.0
"""The engine: the same prompts with every method at every preference, scored, in one table that resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import check_columns
from trl_parm.records import Records
from trl_parm.rewards import Reward
from trl_parm.texts import PromptText

from .decoding import COLUMNS, BatchDecoder, Run
from .fronts import OF_OBJECTIVE, SUMMARY


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptText],
    runs: Sequence[Run],
    rewards: Mapping[str, Reward],
    batch_size: int = 16,
    seed: int = 0,
    path: str | Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    template: str | None = None,
    max_prompt_length: int | None = None,
    on_batch: Callable[[Run], Any] = lambda run: None,
    **generation: Any,
) -> Dataset:
    """Decodes every prompt in every run and scores the responses.

    Sampled texts depend on the seed, the prompt and the run, and on nothing else: not on the batch, the order, or what
    was decoded before (see [`RowSampling`]), as far as a model's arithmetic is the same for a row in other batches.

    Args:
        model (`PreTrainedModel`): The frozen base model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence`): The prompts, texts or conversations, each once, the same for all runs.
        runs (`Sequence[Run]`): Methods and preferences.
        rewards (`Mapping[str, Reward]`): Objective name → reward, higher is better.
        batch_size (`int`, *optional*, defaults to 16): Prompts decoded at once.
        seed (`int`, *optional*, defaults to 0): Of the noise of all prompts.
        path (`str` or `Path`, *optional*):
            A JSONL file for the rows, from which a run that was killed goes on. Runs, preferences and prompts may be
            added to it later.
        configuration (`Mapping`, *optional*):
            What else the rows depend on, such as the names of the models. A file of another configuration is refused.
            Entries of its key `methods`, by method, may be added.
        template (`str`, *optional*): How the base model reads a prompt; see [`encode_prompts`].
        max_prompt_length (`int`, *optional*): Most tokens of a prompt, whose end is kept.
        on_batch (`Callable`, *optional*): Called after each batch, for progress bars.
        **generation: For `generate`, such as `max_new_tokens`. Decoding is greedy, or with `do_sample=True` sampled
            with `temperature`, `top_k`, `top_p` and `min_p`, which have no effect if not given.

    Returns:
        `datasets.Dataset` with one row for each run and prompt, in their order: `method`, `preference` (weights or
        `None`), `label`, `prompt`, `response`, the reward of each objective, `tokens`, `seconds` (the batch's time
        divided evenly), `seed` (of the prompt), `extra_parameters` and `extra_bytes`.

    Raises:
        ValueError: no prompts, or one twice; a run twice; a preference off the simplex; a reward that is not finite or
            of the wrong number; a file of another configuration.
    """
    check_sweep(prompts, runs, list(rewards))
    decode = BatchDecoder(tokenizer, rewards, seed, template, max_prompt_length, generation)
    with open_records(path, {**decode.configuration(), **(configuration or {})}) as records:
        decode_missing(decode, model, prompts, runs, records, batch_size, on_batch)
        return as_table(records.rows, prompts, runs, list(rewards))


def decode_missing(
    decode: BatchDecoder,
    model: PreTrainedModel,
    prompts: Sequence[PromptText],
    runs: Sequence[Run],
    records: Records | RowsInMemory,
    batch_size: int,
    on_batch: Callable[[Run], Any] = lambda run: None,
) -> None:
    """Decodes what the records lack. Batches are cut as if nothing was there, so that they are those of one run."""
    for run in runs:
        lacking, generator = set(missing(records.rows, prompts, [run], decode.objectives)), None
        for batch in _batches(prompts, batch_size):
            todo = [prompt for prompt in batch if prompt_key(prompt) in lacking]
            if todo:
                # Made once for each run, and only if anything is left to do.
                generator = generator or run.model_at(model, decode.objectives)
                records.append(decode(run, generator, todo))
            on_batch(run)


def missing(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[PromptText], runs: Sequence[Run], objectives: Sequence[str]
) -> list[str]:
    """The keys of the prompts that some run has no row for, once for each such run."""
    there = {_key(row) for row in rows}
    cells = [(run.method, run.weights(objectives)) for run in runs]
    return [key for cell in cells for key in map(prompt_key, prompts) if (*cell, key) not in there]


def as_table(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[PromptText], runs: Sequence[Run], objectives: Sequence[str]
) -> Dataset:
    """The rows of these runs and prompts, in their order."""
    by_key = {_key(row): row for row in rows}
    cells = [(run.method, run.weights(objectives)) for run in runs]
    return Dataset.from_list([dict(by_key[*cell, key]) for cell in cells for key in map(prompt_key, prompts)])


def check_sweep(prompts: Sequence[PromptText], runs: Sequence[Run], objectives: Sequence[str]) -> None:
    """Raises `ValueError` as [`sweep`] does, before anything is decoded."""
    keys = [prompt_key(prompt) for prompt in prompts]
    if not keys:
        raise ValueError("`prompts` is empty. Give at least one prompt.")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"The prompt {twice[:80]!r} is given twice. Give each prompt once.")
    check_columns(objectives, COLUMNS)
    check_columns(objectives, SUMMARY, OF_OBJECTIVE)  # what the table is summed up to
    cells = [(run.method, run.weights(objectives)) for run in runs]
    if len(set(cells)) < len(cells):
        method, weights = next(cell for cell in cells if cells.count(cell) > 1)
        raise ValueError(f"The method {method!r} is given twice at the preference {weights}. Give each run once.")


class RowsInMemory:
    """What [`Records`] are, without a file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows


def open_records(path: str | Path | None, configuration: Mapping[str, Any]) -> Any:
    """Rows in a file, to whose methods others may be added, or in memory; a context manager."""
    return nullcontext(RowsInMemory()) if path is None else Records(path, configuration, growing=["methods"])


def prompt_key(prompt: PromptText) -> str:
    """A prompt as a text that tells it from all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _key(row: Mapping[str, Any]) -> tuple:
    weights = row["preference"]
    return row["method"], None if weights is None else tuple(weights), prompt_key(row["prompt"])


def _batches(items: Sequence[PromptText], size: int) -> Iterator[list[PromptText]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
