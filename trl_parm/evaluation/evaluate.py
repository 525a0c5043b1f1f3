# SPDX-License-Identifier: Apache-2.0
"""The same prompts with every method at every preference, scored, in one table that resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import Preference, check_columns
from trl_parm.records import Records, fingerprint, plain
from trl_parm.rewards import Reward
from trl_parm.texts import PromptText, prompt_key

from .decoding import COLUMNS, BatchDecoder, Run
from .fronts import OF_OBJECTIVE, SUMMARY
from .methods import METHODS, Method
from .models import Models


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
            with `temperature`, `top_k`, `top_p` and `min_p`, which have no effect if not given. What the base model's
            generation config says beside that, such as a repetition penalty, acts on the log-probabilities of every
            method, and is in the file.

    Returns:
        `datasets.Dataset` with one row for each run and prompt, in their order: `method`, `preference` (weights or
        `None`), `label`, `prompt`, `response`, the reward of each objective, `tokens`, `seconds` (the batch's time
        divided evenly), `seed` (of the prompt), `extra_parameters` and `extra_bytes`.

    Raises:
        ValueError: no prompts, or one twice; a run twice; a preference off the simplex; a reward that is not finite or
            of the wrong number; a file of another configuration.
    """
    config = cast(Any, model.generation_config)
    decode = BatchDecoder(tokenizer, rewards, seed, template, max_prompt_length, generation, config)
    group = _Group("", list(runs), lambda: nullcontext((model, list(runs))))
    return _table(decode, [group], prompts, path, configuration or {}, batch_size, on_batch=on_batch)


@dataclass(frozen=True)
class Entry:
    """A method of a configuration: `{method: parm, name: PARM, arm: runs/arm, beta: 1.0}`.

    Attributes:
        name (`str`): Its name in the table.
        method ([`Method`]): Its row of [`METHODS`].
        settings (`dict`): Its settings.
    """

    name: str
    method: Method
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any] | str) -> Entry:
        """From what stands in YAML. Raises `ValueError` for an unknown method or unknown settings."""
        settings = {"method": given} if isinstance(given, str) else dict(given)
        key = settings.pop("method", None)
        if key not in METHODS:
            raise ValueError(f"A method is {key!r}, but it must be one of {', '.join(METHODS)}.")
        method = METHODS[key]
        name = settings.pop("name", method.title)
        method.check(name, settings)
        return cls(name, method, settings)

    def configuration(self) -> dict[str, Any]:
        """What its rows depend on, with a fingerprint of every local folder among its settings."""
        return {"make": self.method.make.__name__, **cast(dict, _with_fingerprints(self.settings))}

    def runs(self, preferences: Sequence[Preference]) -> list[Run]:
        """One run for each preference, or one for a control."""
        return [Run(self.name)] if self.method.control else [Run(self.name, p) for p in preferences]


def evaluate(
    models: Models,
    methods: Sequence[Mapping[str, Any] | str],
    preferences: Sequence[Preference],
    prompts: Sequence[PromptText],
    rewards: Mapping[str, Reward | None],
    path: str | Path | None,
    configuration: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    template: str | None = None,
    max_prompt_length: int | None = None,
    on_start: Callable[[str], Any] = lambda name: None,
    on_batch: Callable[[Run], Any] = lambda run: None,
    **generation: Any,
) -> Dataset:
    """As [`sweep`], of methods by name at all preferences of a grid.

    Methods run one after the other, and only the models of one are in memory beside the base model. What stands in the
    file already is not done again, and a method of which nothing is missing is not loaded.

    Args:
        models ([`Models`]): The base model, and how to load others.
        methods (`Sequence`): Names of [`METHODS`], or mappings with `method`, `name` and the method's settings.
        preferences (`Sequence[Preference]`): The grid, points of the simplex of the rewards.
        prompts, path, batch_size, seed, template, max_prompt_length, on_batch, generation: As in [`sweep`].
        rewards (`Mapping[str, Reward]`): Objective name → reward, or `None` where nothing is to be scored.
        configuration (`Mapping`, *optional*): What the rows depend on beside what is given here, such as the rewards'.
        on_start (`Callable`, *optional*): Called with a method's name before it is loaded.

    Returns:
        `datasets.Dataset` as that of [`sweep`], by method, preference and prompt.

    Raises:
        ValueError: as [`sweep`]; a method that is unknown, given twice, or has other settings; a preference twice.
    """
    entries = {entry.name: entry for entry in map(Entry.of, methods)}
    if len(entries) < len(methods):
        raise ValueError("Two methods have the same name. Give each a `name` of its own.")
    config = models.generation_config
    decode = BatchDecoder(models.tokenizer, rewards, seed, template, max_prompt_length, generation, config)
    groups = []
    for name, entry in entries.items():
        runs = entry.runs(preferences)
        groups.append(_Group(name, runs, partial(_loaded, models, entry, runs)))
    whole = {
        "base": _with_fingerprints(models.name),
        "loading": plain({key: value for key, value in models.kwargs.items() if key != "device_map"}),
        **(configuration or {}),
        "methods": {name: entry.configuration() for name, entry in entries.items()},
    }
    return _table(decode, groups, prompts, path, whole, batch_size, on_start, on_batch)


@dataclass(frozen=True)
class _Group:
    """Runs of which all models are in memory together: their name, and the base model and them once loaded."""

    name: str
    runs: list[Run]
    load: Callable[[], AbstractContextManager[tuple[Any, list[Run]]]]


@contextmanager
def _loaded(models: Models, entry: Entry, runs: list[Run]) -> Iterator[tuple[PreTrainedModel, list[Run]]]:
    """The runs of a method with its models, which are gone after it."""
    with models.borrowed():
        base = models.base
        model = entry.method.make(models, **entry.settings)
        parameters, size = models.extra()
        yield base, [replace(run, model=model, extra_parameters=parameters, extra_bytes=size) for run in runs]


def _table(
    decode: BatchDecoder,
    groups: Sequence[_Group],
    prompts: Sequence[PromptText],
    path: str | Path | None,
    configuration: Mapping[str, Any],
    batch_size: int,
    on_start: Callable[[str], Any] = lambda name: None,
    on_batch: Callable[[Run], Any] = lambda run: None,
) -> Dataset:
    """Decodes what the records lack. Batches are cut as if nothing was there, so that they are those of one run."""
    every = [run for group in groups for run in group.runs]
    _check(prompts, every, decode.objectives)
    keys = list(map(prompt_key, prompts))
    places = [range(start, min(start + batch_size, len(keys))) for start in range(0, len(keys), batch_size)]

    def cells(run: Run) -> list[tuple]:
        weights = run.weights(decode.objectives)
        return [(run.method, weights, key) for key in keys]

    with Records(path, {**decode.configuration(), **configuration}, growing=["methods"]) as records:
        done = {_key(row): row for row in records.rows}
        for group in groups:
            on_start(group.name)
            whole = all(cell in done for run in group.runs for cell in cells(run))
            nothing = cast(Any, nullcontext((None, group.runs)))
            with nothing if whole else group.load() as (base, runs):
                for run in runs:
                    own = cells(run)
                    for batch in places:
                        todo = [prompts[i] for i in batch if own[i] not in done]
                        if todo:
                            rows = decode(run, base, todo)
                            records.append(rows)
                            done |= {_key(row): row for row in rows}
                        on_batch(run)
        return Dataset.from_list([dict(done[cell]) for run in every for cell in cells(run)])


def _check(prompts: Sequence[PromptText], runs: Sequence[Run], objectives: Sequence[str]) -> None:
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


def _key(row: Mapping[str, Any]) -> tuple:
    weights = row["preference"]
    return row["method"], None if weights is None else tuple(weights), prompt_key(row["prompt"])


def _with_fingerprints(value: Any) -> Any:
    """The value, with a hash beside each name of a local folder in it."""
    if isinstance(value, Mapping):
        return {key: _with_fingerprints(entry) for key, entry in value.items()}
    found = fingerprint(value) if isinstance(value, str) else None
    return value if found is None else {"path": value, "fingerprint": found}
