# SPDX-License-Identifier: Apache-2.0
"""The same prompts with every method at every preference, scored, in one table that resumes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import name_preference
from peft_pblora.preference import Preference, check_columns, check_objectives
from trl_parm.decoding import BASE, Guided
from trl_parm.decoding.adapters import Adapters
from trl_parm.decoding.probes import sees_over_padding
from trl_parm.decoding.search import TopKReward
from trl_parm.identity import describe_model, short_hash
from trl_parm.noise import row_seed
from trl_parm.records import Records
from trl_parm.reward_models import reward_configuration
from trl_parm.rewards import Reward, score
from trl_parm.shapes import read_text
from trl_parm.texts import PromptText, prompt_key

from .answers import with_all_columns
from .decoding import (
    GREEDY,
    SAME_OBJECTIVES,
    Batch,
    RowSampling,
    Run,
    acting_settings,
    encode_prompts,
    ends_within,
    prompt_ids,
    split_settings,
    text_length,
    with_common_start,
)
from .fronts import OF_OBJECTIVE, SUMMARY, check_scores, row_cell
from .likelihood import ChosenLogProbs, base_log_probs, own_adapters
from .methods import Entry, with_fingerprints
from .models import Models, positions_of
from .rescoring import COLUMNS, DECODED


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
        path (`str` or `Path`, *optional*): A JSONL file for the rows, from which a run that was killed goes on. Runs,
            preferences and prompts may be added to it later.
        configuration (`Mapping`, *optional*): What the rows depend on beside these arguments, such as the methods'
            settings. A file of another configuration is refused; only entries of its key `methods`, by method, may be
            added.
        template (`str`, *optional*): How the base model reads a prompt; see [`encode_prompts`].
        max_prompt_length (`int`, *optional*): Most tokens of a prompt, whose end is kept.
        escape_control_tokens (`bool`, *optional*, defaults to `False`): As in [`encode_prompts`].
        on_batch (`Callable`, *optional*): Called after each batch, for progress bars.
        restart (`bool`, *optional*, defaults to `False`): Remove rows of another configuration from the file, instead
            of refusing it: those of the methods that differ, or all.
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
    table = _Table(
        tokenizer, model.generation_config, runs, prompts, rewards, batch_size, seed, template, max_prompt_length,
        escape_control_tokens, on_batch, positions_of(model.config), **generation,
    )  # fmt: skip
    whole = {**table.configuration, "model": describe_model(model), **(configuration or {})}
    with Records(path, whole, {"methods": "method"}, restart, table.stored) as records:
        table.fill(records, table.runs, lambda: (model, table.runs))
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
    allow_off_simplex: bool = False,
    **options: Any,
) -> Dataset:
    """As [`sweep`], of methods by name at all preferences of a grid.

    Methods run one after the other, and only the models of one are in memory beside the base model. What stands in the
    file already is not done again, and a method of which nothing is missing is not loaded.

    Args:
        models ([`Models`]): The base model, and how to load others.
        methods (`Sequence`): Names of [`METHODS`], or mappings with `method`, `name` and the method's settings.
        preferences (`Sequence[Preference]`): The grid, points of the simplex of the rewards.
        prompts, path: As in [`sweep`].
        rewards (`Mapping[str, Reward]`): Objective name → reward, or `None` where nothing is to be scored.
        configuration (`Mapping`, *optional*): What the rows depend on beside what is given here.
        on_start (`Callable`, *optional*): Called with a method's name before it is loaded.
        restart: As in [`sweep`].
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].
        **options: `batch_size`, `seed`, `template`, `max_prompt_length`, `escape_control_tokens`, `on_batch` and
            arguments of `generate`, as in [`sweep`].

    Returns:
        `datasets.Dataset` as that of [`sweep`], by method, preference and prompt.

    Raises:
        ValueError: as [`sweep`]; a method that is unknown, given twice, or has other settings; a preference twice, or
            off the simplex for a method that can't extrapolate.
    """
    entries = list(map(Entry.of, methods))
    for entry in entries if allow_off_simplex else ():
        entry.check_extrapolates(preferences, list(rewards))
    runs = {entry.name: entry.runs(preferences, allow_off_simplex) for entry in entries}
    if len(runs) < len(entries):
        raise ValueError("Two methods have the same name. Give each a `name` of its own.")
    every = [run for of_method in runs.values() for run in of_method]
    table = _Table(
        models.tokenizer, models.generation_config, every, prompts, rewards, positions=models.positions, **options
    )
    whole = {
        **table.configuration,
        "base": with_fingerprints(models.name),
        "loading": models.loading,
        **(configuration or {}),
        "methods": {entry.name: entry.configuration(models.name) for entry in entries},
    }
    with Records(path, whole, {"methods": "method"}, restart, table.stored) as records:
        for entry in entries:
            on_start(entry.name)
            with models.borrowed():
                table.fill(records, runs[entry.name], partial(_load, models, entry, runs[entry.name]))
        return table.data(records)


def _load(models: Models, entry: Entry, runs: Sequence[Run]) -> tuple[PreTrainedModel, list[Run]]:
    base = models.base
    model = entry.method.make(models, **entry.settings)
    parameters, size = models.extra()
    return base, [replace(run, model=model, extra_parameters=parameters, extra_bytes=size) for run in runs]


class _Table:
    """A row for each run and prompt. The arguments are those of [`sweep`], the base model's generation config, and its
    number of positions.
    `configuration` is what the rows depend on beside the models, as JSON."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        base_config: Any,
        runs: Sequence[Run],
        prompts: Sequence[PromptText],
        rewards: Mapping[str, Reward | None],
        batch_size: int = 16,
        seed: int = 0,
        template: str | None = None,
        max_prompt_length: int | None = None,
        escape_control_tokens: bool = False,
        on_batch: Callable[[Run], Any] = lambda run: None,
        positions: int | None = None,
        **generation: Any,
    ) -> None:
        self.tokenizer, self.settings = tokenizer, acting_settings(base_config) or {}
        self.runs = list(runs)
        self.prompts = [read_text(prompt, f"row {number} of `prompts`") for number, prompt in enumerate(prompts)]
        self.keys = list(map(prompt_key, self.prompts))
        self.rewards, self.objectives = rewards, list(rewards)
        self.batch_size, self.seed, self.on_batch = batch_size, seed, on_batch
        self.template, self.max_prompt_length = template, max_prompt_length
        self.escape_control_tokens = escape_control_tokens
        self.sampling, self.generation = split_settings(generation)
        self.ends = self.generation.get("eos_token_id", base_config.eos_token_id)
        chat = tokenizer.chat_template if template is None else None
        self._over_padding: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self.configuration = {
            "objectives": self.objectives,
            "rewards": {name: reward_configuration(reward) for name, reward in rewards.items()},
            "seed": seed,
            "sampling": self.sampling,
            "generation": self.generation,
            "generation_config": self.settings or None,
            "end_tokens": self.ends,
            "template": template,
            "chat_template": chat and short_hash(chat.encode()),
            "max_prompt_length": max_prompt_length,
            "escape_control_tokens": escape_control_tokens or None,  # as in files of before there was a choice
        }
        if not self.prompts:
            raise ValueError("`prompts` is empty. Give at least one prompt.")
        for number, ids in enumerate(
            prompt_ids(tokenizer, self.prompts, template, max_prompt_length, escape_control_tokens)
        ):
            if positions is not None and len(ids) >= positions:
                raise ValueError(
                    f"row {number} of `prompts` has {len(ids)} tokens, but the base model has {positions} positions. "
                    "Leave it out, or set `max_prompt_length`, which keeps the end of a prompt."
                )
        for prompt in _repeated(self.keys):
            raise ValueError(f"The prompt {prompt[:80]!r} is given twice. Give each prompt once.")
        if self.objectives:  # none are needed where nothing is scored
            check_objectives(self.objectives)
        for name in (run.method for run in self.runs):
            if not (isinstance(name, str) and name.strip() and name.isprintable()):
                raise ValueError(f"The name of a method is {name!r}, but it must be a text of one line, in quotes.")
        check_columns(self.objectives, COLUMNS)
        check_columns(self.objectives, SUMMARY, OF_OBJECTIVE)  # what the table is summed up to
        for method, weights in _repeated((run.method, run.weights(self.objectives)) for run in self.runs):
            raise ValueError(f"The method {method!r} is given twice at the preference {weights}. Give each run once.")

    def stored(self, row: Mapping[str, Any]) -> tuple:
        """The cell of a row in a file, which must have all columns."""
        judged = [name for name, reward in self.rewards.items() if reward is not None]
        check_scores(row, (*judged, *DECODED))
        return row_cell(row)

    def data(self, records: Records) -> Dataset:
        """The rows of all runs, which are there."""
        done = {row_cell(row): row for row in records.rows}
        rows = [dict(done[cell]) for run in self.runs for cell in self._cells(run)]
        return Dataset.from_list(with_all_columns(rows), on_mixed_types="use_json")  # texts and conversations

    def fill(
        self, records: Records, runs: Sequence[Run], load: Callable[[], tuple[PreTrainedModel, Sequence[Run]]]
    ) -> None:
        """Decodes what the records lack of some runs, and only then loads the base model and theirs."""
        batches = [batch for group in self._together(runs) for batch in self._batches(records, runs, group)]
        base, runs = load() if any(todo for _, _, todo in batches) else (cast(Any, None), runs)
        for group, prompts, todo in batches:
            if todo:
                records.append(self._rows([(runs[number], self.prompts[i]) for number, i in todo], base))
            # As often for each run as there are batches of its prompts alone.
            ends = sum(i % self.batch_size == self.batch_size - 1 or i == len(self.prompts) - 1 for i in prompts)
            for number in group:
                for _ in range(ends):
                    self.on_batch(runs[number])

    def _together(self, runs: Sequence[Run]) -> list[list[int]]:
        """The numbers of runs that share batches."""
        groups: dict[Any, list[int]] = {}
        for number, run in enumerate(runs):
            kind: Any = run.together
            if kind == SAME_OBJECTIVES:
                kind = kind, tuple(weight != 0 for weight in run.weights(self.objectives) or ())
            groups.setdefault(number if kind is None else (run.method, kind), []).append(number)
        size = self.batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _batches(
        self, records: Records, runs: Sequence[Run], group: list[int]
    ) -> Iterator[tuple[list[int], range, list[tuple[int, int]]]]:
        """Of a group of runs, for each batch: the group, the prompts, and the pairs of run and prompt that no row is
        of. No batch has more pairs than its size."""
        count = max(1, self.batch_size // len(group))
        chunks = [range(start, min(start + count, len(self.prompts))) for start in range(0, len(self.prompts), count)]
        pairs = [(number, i) for chunk in chunks for number in group for i in chunk]
        cells = {number: self._cells(runs[number]) for number in group}
        done = records.missing([cells[number][i] for number, i in pairs], row_cell, count * len(group))
        for chunk, (_, todo) in zip(chunks, done, strict=True):
            yield group, chunk, [pairs[i] for i in todo]

    def _cells(self, run: Run) -> list[tuple]:
        weights = run.weights(self.objectives)
        return [(run.method, weights, key) for key in self.keys]

    def _rows(self, pairs: Sequence[tuple[Run, PromptText]], base: PreTrainedModel) -> list[dict[str, Any]]:
        """The rows of runs and prompts, decoded together: of one run, or of several that share batches."""
        runs, prompts = [run for run, _ in pairs], [prompt for _, prompt in pairs]
        run, several = runs[0], any(run is not runs[0] for run in runs)
        αs = [run.vector(self.objectives) for run in runs]
        names = [{} if α is None else dict(zip(self.objectives, α.tolist(), strict=True)) for α in αs]
        α, named = (torch.stack(cast(list, αs)), names) if several else (αs[0], names[0])
        escape = self.escape_control_tokens
        inputs = encode_prompts(self.tokenizer, prompts, self.template, self.max_prompt_length, escape).to(base.device)
        seeds = [row_seed(self.seed, prompt) for prompt in prompts]
        batch = Batch(α, prompts, inputs, named, escape, run.allow_off_simplex)
        found = base if run.model is None else run.model(batch)
        model, arguments = found if isinstance(found, tuple) else (found, {})
        chosen = ChosenLogProbs()
        tokens, seconds = self._generate(model, arguments, inputs, seeds, chosen)
        lengths = [text_length(row, self.ends) for row in tokens]
        guided = [row[:length].sum().item() for row, length in zip(chosen.of(tokens), lengths, strict=True)]
        read = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        texts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        likely = base_log_probs(base, read, texts, own_adapters(model, base))
        responses = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        judges = {name: reward for name, reward in self.rewards.items() if reward is not None}
        scores = {name: score(name, reward, prompts, responses) for name, reward in judges.items()}
        weights = [run.weights(self.objectives) for run in runs]
        return [
            {
                "method": run.method,
                "preference": None if (own := weights[i]) is None else list(own),
                "label": "-" if (α := αs[i]) is None else name_preference(α, self.objectives, run.allow_off_simplex),
                "prompt": prompt,
                "response": responses[i],
                **{name: values[i] for name, values in scores.items()},
                "tokens": lengths[i],
                "seconds": seconds / len(prompts),
                "seed": seeds[i],
                "extra_parameters": run.extra_parameters,
                "extra_bytes": run.extra_bytes,
                "capped": not ends_within(tokens[i], self.ends),
                "log_prob_base": likely[i],
                "log_ratio": guided[i] - likely[i],
            }
            for i, (run, prompt) in enumerate(pairs)
        ]

    def _generate(
        self, model: Any, arguments: Mapping[str, Any], inputs: BatchEncoding, seeds: list[int], chosen: ChosenLogProbs
    ) -> tuple[torch.Tensor, float]:
        """The new tokens, of shape `(rows, new)`, and the seconds that they took. All methods generate greedily, and
        where texts are sampled, that is the noise of each prompt."""
        # log π of every method, so that a repetition penalty and its like act on all of them alike.
        model = model if isinstance(model, Guided) else Guided(model, BASE)
        own = dict.fromkeys(acting_settings(cast(Any, model.generation_config)) or {})  # the base's act instead
        length = cast(torch.Tensor, inputs["input_ids"]).shape[1]
        noise = [] if self.sampling is None else [RowSampling(seeds, length, **self.sampling)]
        if self._reads_over_padding(model, arguments):
            inputs = with_common_start(inputs)
        start = _now(model.device)
        output = cast(Any, model).generate(
            **inputs,
            **arguments,
            logits_processor=[chosen, *noise],
            pad_token_id=self.tokenizer.pad_token_id,
            end_tokens=[self.ends] if isinstance(self.ends, int) else self.ends,
            **{**own, **self.settings, **GREEDY, "eos_token_id": self.ends, **self.generation},
        )
        return output[:, length:], _now(model.device) - start

    def _reads_over_padding(self, model: Guided, arguments: Mapping[str, Any]) -> bool:
        """Whether padding may stand within the prompts, so that what they all begin with is read once."""
        others = {"cache_implementation", "use_cache", "prefill_chunk_size"} & set(self.generation)
        if others or not set(arguments) <= {"guide_input_ids", "guide_attention_mask"}:
            return False
        scorers = set(model.formula.scorers()) - {BASE, *model.terms}
        if not all(isinstance(scorer, TopKReward) and scorer.reads_text_alone for scorer in scorers):
            return False
        for backbone in (model.backbone, *(term.backbone for term in model.terms)):
            if backbone not in self._over_padding:
                self._over_padding[backbone] = sees_over_padding(backbone, Adapters(backbone))
        return all(self._over_padding[term.backbone] for term in model.terms) and self._over_padding[model.backbone]


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
