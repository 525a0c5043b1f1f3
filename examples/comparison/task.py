# SPDX-License-Identifier: Apache-2.0
"""A task of the comparison: a base model, pairs labelled for every objective, rewards, and what is spent on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trl_parm.records import read_rows
from trl_parm.texts import PromptText, prompt_key


SPLITS = ("train", "validation", "test")
ONE_EACH = ("genarm", "dpo")
KINDS = ("parm", "svd_lora", "uniarm", *ONE_EACH, "parm_disjoint")
"""What is trained: with one adapter for all preferences, or an adapter for each objective."""
BESIDE = ("parm", "genarm")
"""The kinds that every task has, which the page's sentences are about."""


@dataclass(frozen=True)
class Task:
    """What stands in `configs/small/tasks/<name>.yaml`.

    Attributes:
        name (`str`): Its name in pieces, files and the page.
        title (`str`): The same in words.
        model (`str`): The frozen base model, which is also the backbone of all ARMs and policies.
        pairs (`str`): JSONL of `prompt`, `response_0`, `response_1`, `split`, and for each objective which response is
            better (0 or 1; -1 for a tie), with the prompts of a split in no other.
        rewards (`dict[str, str]`): Objective → `module:function` that judges, higher is better.
        budgets (`dict[int, list[int]]`): Steps of `batch` pairs in all → seeds of training.
        kinds (`list[str]`): What is trained, of [`KINDS`], with PARM and GenARM: all by default. The methods of others
            are not compared.
        settings_steps (`int`, *optional*): Steps of the trainings that settings are chosen with. By default each
            budget has its own settings, chosen after as many steps: what is best in a short training can diverge in a
            longer one.
        scale_steps (`int`, *optional*): Steps of the trainings that scales are chosen with, if not as many as those of
            learning rates and β.
        other_judges (`bool`): Whether other scorers judge than those that labelled the pairs.
        field (`list[int]`, *optional*): Steps and seed with which the rest of the field is compared, where there are
            two objectives.
        descriptions (`dict[str, str]`): Of the objectives, for UniARM by descriptions.
        settings_seeds (`dict[int, list[int]]`): The seeds of these trainings by their steps, where not 100 to 102.
        scales, rates, betas (`list[float]`): The grids, which grow as long as the best lies at an edge: of how many
            times an adapter's usual `lora_alpha` it has, of the learning rate, and of β.
        limits (`dict[str, list[float]]`): How far they may grow.
        validation_pairs, diagnosis_pairs (`int`): Held-out pairs that learning rates are chosen with, and that the
            trainings of a piece are measured on.
        validation_prompts, test_prompts (`int`): Prompts that β are chosen with, and of the comparison.
        grid_steps (`int`): Preferences are 0, 1/n, ..., 1.
        reward_beta, policy_beta (`float`): β of the loss of ARMs, and of DPO.
        batch (`int`): Pairs of a step.
        dtype (`str`): Of the frozen weights, as [`trl_parm.optimize_for_cpu`] takes it: with `auto` products are in
            bfloat16 on a CPU with units for it.
        batch_texts, max_new_tokens, top_k (`int`): How answers are sampled.
    """

    name: str
    title: str
    model: str
    pairs: str
    rewards: dict[str, str]
    budgets: dict[int, list[int]]
    kinds: list[str] = dataclasses.field(default_factory=lambda: list(KINDS))
    settings_steps: int | None = None
    scale_steps: int | None = None
    other_judges: bool = False
    field: list[int] | None = None
    descriptions: dict[str, str] = dataclasses.field(default_factory=dict)
    settings_seeds: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    scales: list[float] = dataclasses.field(default_factory=lambda: [1.0, 4.0])
    rates: list[float] = dataclasses.field(default_factory=lambda: [8e-4, 2e-3, 5e-3])
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0, 2.0])
    limits: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {"scale": [1.0, 64.0], "rate": [1e-4, 1e-1], "beta": [0.015, 8.0]}
    )
    validation_pairs: int = 240
    diagnosis_pairs: int = 96
    validation_prompts: int = 60
    test_prompts: int = 120
    grid_steps: int = 5
    reward_beta: float = 0.05
    policy_beta: float = 0.1
    batch: int = 8
    dtype: str = "float32"
    batch_texts: int = 240
    max_new_tokens: int = 64
    top_k: int = 50

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Task:
        """A task from YAML, with some entries replaced. Raises `ValueError` for entries that a task does not have, and
        for kinds that there are not or without PARM and GenARM."""
        given = {**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}
        known = {one.name for one in fields(cls)}
        if unknown := set(given) - known:
            raise ValueError(f"{path} has {', '.join(sorted(unknown))}; a task has {', '.join(sorted(known))}.")
        kinds = given.get("kinds", KINDS)
        if not set(BESIDE) <= set(kinds) <= set(KINDS):
            raise ValueError(
                f"`kinds` of {path} are {', '.join(map(str, kinds))}, but they are some of {', '.join(KINDS)}, with "
                f"{' and '.join(BESIDE)} among them."
            )
        return cls(**given)

    @property
    def objectives(self) -> list[str]:
        return list(self.rewards)

    @property
    def model_name(self) -> str:
        """The base model's, without the folder that it is in."""
        return Path(self.model).name

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The pairs by split. Raises `ValueError` for a file without them, and for prompts in two splits."""
        if not Path(self.pairs).exists():
            raise ValueError(f"There are no pairs at {self.pairs}. The task's configuration says what makes them.")
        found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        home: dict[str, str] = {}
        for number, row in enumerate(read_rows(Path(self.pairs)), 1):
            if missing := {"prompt", "response_0", "response_1", "split", *self.objectives} - set(row):
                raise ValueError(f"Line {number} of {self.pairs} lacks {', '.join(sorted(missing))}.")
            if row["split"] not in found:
                raise ValueError(f"Line {number} of {self.pairs} is of the split {row['split']!r}, none of {SPLITS}.")
            first = home.setdefault(prompt_key(row["prompt"]), row["split"])
            if first != row["split"]:
                raise ValueError(f"The prompt in line {number} of {self.pairs} is in {first} and in {row['split']}.")
            found[row["split"]].append(row)
        if empty := [split for split, rows in found.items() if not rows]:
            raise ValueError(f"{self.pairs} has no pairs of the split {empty[0]}.")
        return found

    def prompts(self, split: str, count: int) -> list[PromptText]:
        """The first prompts of a split, each once."""
        found = {prompt_key(row["prompt"]): row["prompt"] for row in self.rows[split]}
        return list(found.values())[:count]

    def drawn(self, steps: int, seed: int) -> list[dict[str, Any]]:
        """The pairs of a training, the same for all methods, in order; no pair twice as long as there are enough."""
        count, rng, pairs = steps * self.batch, random.Random(seed), []
        while len(pairs) < count:
            pairs += rng.sample(self.rows["train"], min(count - len(pairs), len(self.rows["train"])))
        return pairs

    @property
    def middle_rate(self) -> float:
        """The learning rate that scales are chosen with."""
        return self.rates[len(self.rates) // 2]

    def settings_of(self, steps: int) -> int:
        """Steps of the trainings that the settings of a budget are chosen with."""
        return self.settings_steps or steps

    def seeds_of(self, settings_steps: int) -> list[int]:
        """Seeds of the trainings that settings are chosen with."""
        return self.settings_seeds.get(settings_steps, [100, 101, 102])

    def held_out(self, count: int) -> list[dict[str, Any]]:
        """Pairs of the split `validation`, the same ones for every training."""
        rows = self.rows["validation"]
        return random.Random(0).sample(rows, min(count, len(rows)))

    def fingerprint(self) -> str:
        """A hash of the pairs, and so of the prompts."""
        return hashlib.sha256(Path(self.pairs).read_bytes()).hexdigest()[:16]


def agreement(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> float:
    """The share of pairs in which no objective contradicts another: all that tell them apart prefer the same."""
    labels = [{row[name] for name in objectives} - {-1} for row in rows]
    return sum(len(found) <= 1 for found in labels) / len(labels)


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
