# SPDX-License-Identifier: Apache-2.0
"""The same prompts with every method at every preference, scored, in one table that resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import Preference
from trl_parm.identity import describe_model
from trl_parm.processes import ALONE, Processes
from trl_parm.rewards import Reward
from trl_parm.texts import PromptText

from .answering import Answering
from .decoding import Run
from .engines import Transformers
from .methods import Entry, with_fingerprints
from .models import Models, positions_of
from .table import Table


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
    escape_control_tokens: bool = False,
    on_batch: Callable[[Run], Any] = lambda run: None,
    restart: bool = False,
    processes: Processes = ALONE,
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
        batch_size (`int`, *optional*, defaults to 16): Texts decoded at once: of as many prompts, or of fewer at
            several preferences each, see [`Run`].
        seed (`int`, *optional*, defaults to 0): Of the noise of all prompts.
        path (`str` or `Path`, *optional*): A JSONL file for the rows, from which a run that was killed goes on, and
            which asks again where a judge failed. Runs, preferences and prompts may be added to it later.
        configuration (`Mapping`, *optional*): What the rows depend on beside these arguments, such as the methods'
            settings. A file of another configuration is refused; only entries of its key `methods`, by method, may be
            added.
        template (`str`, *optional*): How the base model reads a prompt; see [`encode_prompts`].
        max_prompt_length (`int`, *optional*): Most tokens of a prompt, whose end is kept.
        escape_control_tokens (`bool`, *optional*, defaults to `False`): As in [`encode_prompts`].
        on_batch (`Callable`, *optional*): Called after each batch, for progress bars.
        restart (`bool`, *optional*, defaults to `False`): Remove rows of another configuration from the file, instead
            of refusing it: those of the methods that differ, or all.
        processes ([`Processes`], *optional*): Those that share the batches, each of which calls this with the same
            arguments, and a `path` that is the same file. All get the whole table.
        **generation: For `generate`, such as `max_new_tokens`. Decoding is greedy, or with `do_sample=True` sampled
            with the settings of [`Sampling`]. What the base model's generation config says beside that, such as a
            repetition penalty or an end token, acts on every method in the place of its own model's.

    Returns:
        `datasets.Dataset` with one row for each run and prompt, in their order: `method`, `preference` (weights or
        `None`), `label`, `prompt`, `response`, the reward of each objective, `tokens`, `seconds` (the batch's time
        divided evenly), `seed` (of the prompt), `extra_parameters` and `extra_bytes`, `capped` (whether it ended at
        the cap of tokens), and over its tokens Σ log π_base as `log_prob_base` and Σ (log π − log π_base) as
        `log_ratio`.

    Raises:
        ValueError: no prompts, one twice, one that is neither text nor messages or is too long for the base model; a
            run twice; a preference off the simplex; a reward that is not finite or of the wrong number; a file of
            another configuration.
    """
    answering = Answering(
        tokenizer, model.generation_config, rewards, seed, template, max_prompt_length, escape_control_tokens,
        **generation,
    )  # fmt: skip
    table = Table(answering, runs, prompts, batch_size, on_batch, positions_of(model.config))
    beside = {"model": describe_model(model), **(configuration or {})}
    with table.open(path, beside, restart, processes) as records:
        table.fill(records, table.runs, lambda: (Transformers(model), table.runs))
        return table.data(records)


def evaluate(
    models: Models,
    methods: Sequence[Mapping[str, Any] | str],
    preferences: Sequence[Preference],
    prompts: Sequence[PromptText],
    rewards: Mapping[str, Reward | None],
    path: str | Path | None,
    configuration: Mapping[str, Any] | None = None,
    on_start: Callable[[str], Any] = lambda name: None,
    restart: bool = False,
    processes: Processes = ALONE,
    batch_size: int = 16,
    on_batch: Callable[[Run], Any] = lambda run: None,
    allow_off_simplex: bool = False,
    **options: Any,
) -> Dataset:
    """As [`sweep`], of methods by name at all preferences of a grid.

    Methods run one after the other, and only the models of one are in memory beside the base model. What stands in the
    file already is not done again, and a method of which nothing is missing is not loaded.

    Args:
        models ([`Models`]): The base model, and how to load others; on vLLM [`OnVLLM`].
        methods (`Sequence`): Names of [`METHODS`], or mappings with `method`, `name` and the method's settings.
        preferences (`Sequence[Preference]`): The grid, points of the simplex of the rewards.
        prompts, path: As in [`sweep`].
        rewards (`Mapping[str, Reward]`): Objective name → reward, or `None` where nothing is to be scored.
        configuration (`Mapping`, *optional*): What the rows depend on beside what is given here.
        on_start (`Callable`, *optional*): Called with a method's name before it is loaded.
        restart, processes, batch_size, on_batch: As in [`sweep`].
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].
        **options: `seed`, `template`, `max_prompt_length`, `escape_control_tokens` and arguments of `generate`, as in
            [`sweep`].

    Returns:
        `datasets.Dataset` as that of [`sweep`], by method, preference and prompt.

    Raises:
        ValueError: as [`sweep`]; a method that is unknown, given twice, or has other settings, models that can't be
            read, or are for other objectives; a preference twice, or off the simplex for a method that can't
            extrapolate; what the engine can't do.
    """
    entries = list(map(Entry.of, methods))
    for entry in entries:
        entry.check_engine(models.engine_name)
    for entry in entries if allow_off_simplex else ():
        entry.check_extrapolates(preferences, list(rewards))
    runs = {entry.name: entry.runs(preferences, allow_off_simplex) for entry in entries}
    if len(runs) < len(entries):
        raise ValueError("Two methods have the same name. Give each a `name` of its own.")
    every = [run for of_method in runs.values() for run in of_method]
    answering = Answering(models.tokenizer, models.generation_config, rewards, **options)
    table = Table(answering, every, prompts, batch_size, on_batch, models.positions)
    beside = {
        "base": with_fingerprints(models.name),
        "loading": models.loading,
        **(configuration or {}),
        "methods": {entry.name: entry.configuration(models.name) for entry in entries},
    }
    plan = [(entry.make, runs[entry.name]) for entry in entries]

    def check() -> None:
        for entry in entries:
            entry.check_models(list(rewards), models.name)
        models.check(answering.how, plan, dict(zip(table.lengths, table.prompts)), processes)

    processes.first(check)
    if not processes.is_first:  # once the first one has said what is wrong
        check()
    with table.open(path, beside, restart, processes) as records:
        for entry in entries:
            on_start(entry.name)
            with models.borrowed():
                table.fill(
                    records, runs[entry.name], partial(models.load, answering.how, entry.make, runs[entry.name])
                )
        return table.data(records)
