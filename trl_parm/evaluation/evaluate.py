# SPDX-License-Identifier: Apache-2.0
"""All methods of a configuration on the same prompts and preferences, in one table that resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset

from peft_pblora.preference import Preference
from trl_parm.provenance import fingerprint, plain
from trl_parm.rewards import Reward
from trl_parm.texts import PromptText

from .decoding import BatchDecoder, Run
from .engine import as_table, check_sweep, decode_missing, missing, open_records
from .methods import METHODS, Method
from .models import Models


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
    """Decodes all prompts with all methods at all preferences and scores the responses.

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
    entries = [Entry.of(given) for given in methods]
    decode = BatchDecoder(models.tokenizer, rewards, seed, template, max_prompt_length, generation)
    runs = {entry.name: entry.runs(preferences) for entry in entries}
    if len(runs) < len(entries):
        raise ValueError("Two methods have the same name. Give each a `name` of its own.")
    every = [run for of_method in runs.values() for run in of_method]
    check_sweep(prompts, every, decode.objectives)
    whole = {
        **decode.configuration(),
        "base": _with_fingerprints(models.name),
        "loading": plain({key: value for key, value in models.kwargs.items() if key != "device_map"}),
        **(configuration or {}),
        "methods": {entry.name: entry.configuration() for entry in entries},
    }
    with open_records(path, whole) as records:
        for entry in entries:
            on_start(entry.name)
            own = runs[entry.name]
            if not missing(records.rows, prompts, own, decode.objectives):
                for run in own:
                    for _ in range(-(-len(prompts) // batch_size)):
                        on_batch(run)
                continue
            with models.borrowed():
                base = models.base
                decoding = entry.method.make(models, **entry.settings)
                extra = models.extra()
                loaded = [Run(r.method, r.preference, decoding.decoder, decoding.generator, *extra) for r in own]
                decode_missing(decode, base, prompts, loaded, records, batch_size, on_batch)
        return as_table(records.rows, prompts, every, decode.objectives)


def _with_fingerprints(value: Any) -> Any:
    """The value, with a hash beside each name of a local folder in it."""
    if isinstance(value, Mapping):
        return {key: _with_fingerprints(entry) for key, entry in value.items()}
    found = fingerprint(value) if isinstance(value, str) else None
    return value if found is None else {"path": value, "fingerprint": found}
