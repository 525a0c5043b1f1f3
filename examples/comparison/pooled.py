# SPDX-License-Identifier: Apache-2.0
"""The pieces of one budget of a task, put together: fronts over training seeds, raw and standardised."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from trl_parm.evaluation import Front, arrange, mean_and_error, pool_seeds, rank_correlations, standardized
from trl_parm.evaluation.measures import differences, measure

from .methods import BASE, UNTRAINED, mean_kl, methods_of
from .piece import AT_KL
from .results import OF_KINDS, kinds_of, read_facts, read_piece, rows_path
from .task import BESIDE, KINDS


PARM, GENARM, SHUFFLED = "PARM", "GenARM", "PARM, α permuted"
PRODUCT, ABOVE_MINUS_ONE, ABOVE_ZERO = "MIP", "HV above −1", "HV above 0"
"""Measures of standardised rewards: mean inner product, and hypervolume above −1 and above 0 in all objectives."""


SHARED = ("model", "prompts", "pairs", "batch", "betas", "matched", "top_k", "max_new_tokens", "products")
SETTINGS = ("scale", "rate")
"""What all seeds have in common, of pieces and of each training in them."""
UNTRAINED_LOSS = "_untrained_loss"
"""Ends the names of metrics that no training changes."""


@dataclass(frozen=True)
class Budget:
    """What was found with one budget.

    Attributes:
        steps (`int`): Steps of training in all.
        seeds, missing (`list[int]`): Seeds of training that are there, and those that were planned beside them.
        kinds (`list[str]`): What was trained with all of these seeds.
        partial (`dict[str, list[int]]`): What was trained with some of them, which is left out: kind → these seeds.
        facts (`list[dict]`): Of each seed.
        rows (`list[dict]`): Of all seeds, each method named with its seed.
        names (`dict[str, str]`): Method with seed → method.
        resamples (`int`): Of the bootstrap.
    """

    steps: int
    seeds: list[int]
    missing: list[int]
    kinds: list[str]
    partial: dict[str, list[int]]
    facts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    names: dict[str, str]
    resamples: int = 2000

    @classmethod
    def read(
        cls,
        results: Path,
        steps: int,
        planned: Sequence[int],
        resamples: int = 2000,
        kinds: Collection[str] = KINDS,
    ) -> Budget | None:
        """From the files of a task: what was trained with all seeds that have PARM and GenARM; `None` if no seed has
        both. Raises `ValueError` for pieces of different runs."""
        every = {seed: rows_path(results, steps, seed) for seed in planned}
        there = {seed: [kind for kind in kinds if kind in kinds_of(path)] for seed, path in every.items()}
        there = {seed: found for seed, found in there.items() if {*BESIDE} <= {*found}}
        if not there:
            return None
        shared = [kind for kind in kinds if all(kind in found for found in there.values())]
        partial = {
            kind: own
            for kind in kinds
            if kind not in shared and (own := [seed for seed, found in there.items() if kind in found])
        }
        facts = [_of_kinds(read_facts(every[seed]), shared) for seed in there]
        for seed, one in zip(there, facts):
            _check_same(results, steps, min(there), facts[0], seed, one)
        rows, names = [], {}
        methods = _titles(shared)
        for seed in there:
            for row in read_piece(every[seed]):
                if row["method"] in methods:
                    name = f"{row['method']} (seed {seed})"
                    names[name] = row["method"]
                    rows.append({**row, "method": name})
        for seed in there:
            if len([name for name in names if name.endswith(f"(seed {seed})")]) != len({*names.values()}):
                raise ValueError(f"The seed {seed} of {results.name}, {steps} steps, lacks methods that others have.")
        missing = [seed for seed in planned if seed not in there]
        return cls(steps, list(there), missing, shared, partial, facts, rows, names, resamples)

    @cached_property
    def alike(self) -> list[list[int]]:
        """The seeds for which what no training changes, the base's answers and losses of untrained ARMs, is the same:
        of several groups each was run with other arithmetic, such as products in bfloat16 on another CPU."""
        groups: list[tuple[Any, list[int]]] = []
        for seed, one in zip(self.seeds, self.facts):
            own = [row for row in self.rows if row["method"] == f"{BASE} (seed {seed})"]
            answers = [[row[name] for name in self.objectives] for row in own]
            metrics = [(kind, *item) for kind, of in one["trained"].items() for item in of["metrics"].items()]
            found = answers, [metric for metric in metrics if metric[1].endswith(UNTRAINED_LOSS)]
            for known, seeds in groups:
                if known == found:
                    seeds.append(seed)
                    break
            else:
                groups.append((found, [seed]))
        return [seeds for _, seeds in groups]

    @property
    def objectives(self) -> list[str]:
        return self.facts[0]["objectives"]

    @cached_property
    def fronts(self) -> dict[str, Front]:
        """Raw fronts by method, PARM with permuted α among them."""
        found = {front.method: front for front in pool_seeds(arrange(self.rows, self.objectives), self.names)}
        if shuffled := permuted(found[PARM]):
            found[SHUFFLED] = shuffled
        return found

    @cached_property
    def scaled(self) -> dict[str, Front]:
        """The fronts with rewards in standard deviations of the base's answers, from their mean."""
        return {front.method: front for front in standardized(list(self.fronts.values()), BASE, self.objectives)}

    @cached_property
    def measures(self) -> list[dict[str, Any]]:
        """MIP and HV of standardised rewards, and spreads, of each method, with 95 % intervals."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing lies above a reference point: the table says so
            rows = measure(list(self.scaled.values()), self.objectives, self._references, self.resamples)
        return [_named(row) for row in rows]

    def difference(self, method: str, minus: str) -> dict[str, dict[str, Any]]:
        """Paired differences of two methods by measure, each with `value`, `low`, `high` and `differs`."""
        if (method, minus) not in self._differences:
            pair = [self.scaled[method], self.scaled[minus]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = differences(pair, self.objectives, self._references, minus, self.resamples)
            self._differences[method, minus] = {_named(row)["measure"]: row for row in rows}
        return self._differences[method, minus]

    def correlations(self, method: str) -> np.ndarray:
        """Rank correlation of α with its reward, of shape `(1 + seeds, k)`: of the mean over seeds, and of each."""
        front = self.fronts[method]
        every = [front.points, *front.runs.mean(1)]
        return np.array([rank_correlations(front.preferences, points) for points in every])

    def kl(self, method: str) -> float:
        """Mean KL to the base of a token, over seeds and preferences."""
        return mean_kl([row for row in self.rows if self.names[row["method"]] == method])

    def kl_range(self, method: str) -> tuple[float, float]:
        """The least and the largest of it over seeds."""
        found = [
            mean_kl([row for row in self.rows if row["method"] == f"{method} (seed {seed})"]) for seed in self.seeds
        ]
        return min(found), max(found)

    def relative_time(self, method: str, other: str) -> tuple[float, float, float]:
        """The time of a token of a method by that of another, in batches of one size: the median over seeds, the least
        and the largest."""
        both = [[self._seconds(f"{name} (seed {seed})") for name in (method, other)] for seed in self.seeds]
        found = [own / others for own, others in both]
        return float(np.median(found)), min(found), max(found)

    def gain_difference(self, kind: str, minus: str) -> tuple[float, float, float] | None:
        """How much more the losses at the vertices fell in one kind of training than in another, summed over
        objectives: the mean over seeds, and its 95 % interval by Student's t. `None` with one seed, or without such
        metrics."""
        names = [f"{name}_gain" for name in self.objectives]
        found = [
            [one["trained"][k]["metrics"].get(name) for k in (kind, minus) for name in names] for one in self.facts
        ]
        if len(found) < 2 or any(None in gains for gains in found):
            return None
        values = [sum(gains[: len(names)]) - sum(gains[len(names) :]) for gains in found]
        mean, error = mean_and_error(values)
        half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
        return mean, mean - half, mean + half

    def mean_metric(self, kind: str, name: str) -> tuple[float, float, float] | None:
        """Mean, least and largest over seeds of a metric of training on held-out pairs; `None` where no such kind was
        trained, or without that metric."""
        trained = [one["trained"][kind]["metrics"] for one in self.facts if kind in one["trained"]]
        found = [value for metrics in trained if (value := metrics.get(name)) is not None]
        return (float(np.mean(found)), min(found), max(found)) if found else None

    def compared(self) -> list[str]:
        """Methods but PARM itself, its permuted control and those at another's KL."""
        own = {PARM, SHUFFLED, BASE, UNTRAINED}
        return [name for name in self.fronts if name not in own and name not in self.matched().values()]

    def matched(self) -> dict[str, str]:
        """Method → its name near PARM's KL, where it was decoded with another β for that."""
        return {name: AT_KL.format(name) for name in self.fronts if AT_KL.format(name) in self.fronts}

    def near_kl(self) -> dict[str, str]:
        """Method → its name near PARM's KL, of all whose β was searched: its own where its own β is about that."""
        searched = {method.title for method in methods_of(self.kinds).values() if method.searched} - {PARM}
        return {name: self.matched().get(name, name) for name in self.fronts if name in searched}

    @cached_property
    def _differences(self) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
        return {}

    @property
    def _references(self) -> list[list[float]]:
        return [[value] * len(self.objectives) for value in (-1.0, 0.0)]

    def _seconds(self, name: str) -> float:
        rows = [row for row in self.rows if row["method"] == name]
        return sum(row["seconds"] for row in rows) / sum(row["tokens"] for row in rows)


def permuted(front: Front) -> Front | None:
    """PARM's front where its ARM gets the reversed α, which for two objectives is the permuted one: its answers are
    PARM's at that preference, noise included. `None` where there is another number, or no such preference."""
    grid = front.preferences
    if grid is None or grid.shape[1] != 2 or not np.allclose(grid[::-1], grid[:, ::-1]):
        return None
    return replace(front, method=SHUFFLED, runs=front.runs[:, :, ::-1])


def _titles(kinds: Collection[str]) -> set[str]:
    """The names of methods of some kinds, also at PARM's KL, and of what is decoded beside PARM."""
    titles = [method.title for method in methods_of(kinds).values()]
    return {BASE, UNTRAINED, *titles, *map(AT_KL.format, titles)}


def _of_kinds(facts: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The facts of a table as far as they are about some kinds."""
    known = {"trained": kinds, "betas": methods_of(kinds), "matched": methods_of(kinds), "methods": _titles(kinds)}
    return {
        key: {name: of for name, of in value.items() if name in known[key]} if key in OF_KINDS else value
        for key, value in facts.items()
    }


def _check_same(
    results: Path, steps: int, first: int, expected: Mapping[str, Any], seed: int, facts: Mapping[str, Any]
) -> None:
    for key in (*SHARED, *SETTINGS):
        if _said(facts, key) != _said(expected, key):
            raise ValueError(
                f"The seeds {first} and {seed} of {results.name}, {steps} steps, have different {key}. Only pieces of "
                "one comparison can be put together: run the others again."
            )


def _said(facts: Mapping[str, Any], key: str) -> Any:
    if key in SETTINGS:
        return {kind: trained.get(key) for kind, trained in facts["trained"].items()}
    return facts.get(key)


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    reference = row["reference"].split()[-1] if row["measure"] == "hypervolume" else ""
    name = {"-1": ABOVE_MINUS_ONE, "0": ABOVE_ZERO}.get(reference, row["measure"])
    return {**row, "measure": PRODUCT if name == "mean inner product" else name}
