# SPDX-License-Identifier: Apache-2.0
"""The scaling, learning rate and β of each method: chosen with training seeds, pairs and prompts of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from peft_pblora import preference_grid
from trl_parm.cpu import products_of
from trl_parm.evaluation import arrange, mean_and_error, mean_inner_product, standardized
from trl_parm.records import Records, read_rows

from .methods import METHODS, Method, decode, mean_kl
from .task import Task
from .training import Training


SCALE, RATE, BETA = "scale", "rate", "beta"
GRID_STEPS = 2
CLOSE = 1.1
"""β whose quotient is smaller count as one."""


class Settings:
    """What was tried, in `settings-<steps>.jsonl`, and what follows from it.

    Args:
        task ([`Task`]): Whose settings.
        steps (`int`): Of the trainings that they are chosen with; scales with those of `task.scale_steps`, if it has.
        results (`Path`): The task's folder with results.
        work (`Path`): Where adapters and answers go.
    """

    def __init__(self, task: Task, steps: int, results: Path, work: Path) -> None:
        self.task, self.steps, self.work = task, steps, work / f"settings-{steps}"
        self.seeds = task.seeds_of(steps)
        self.path = results / f"settings-{steps}.jsonl"
        other = task.scale_steps or steps
        self.of_scales = self if other == steps else Settings(task, other, results, work)

    def choose_scale(self, kind: str) -> None:
        """Tries `lora_alpha`, as multiples of the usual one, at the learning rate in the middle of its grid: the best
        has the smallest sum of the objectives' losses on held-out pairs."""
        if self.of_scales is not self:
            return self.of_scales.choose_scale(kind)
        middle = self.task.middle_rate
        self._search(SCALE, kind, self.task.scales, lambda scale, seed: self._loss(kind, scale, middle, seed))

    def choose_rate(self, kind: str) -> None:
        """Tries learning rates at the scale that was chosen: the best has the smallest loss, as for scales."""
        scale = self.scale(kind)
        self._search(RATE, kind, self.task.rates, lambda rate, seed: self._loss(kind, scale, rate, seed))

    def choose_beta(self, name: str, method: Method | None = None) -> None:
        """Tries β: the largest whose mean inner product of standardised rewards is within a standard error of the
        largest, since more strength than that goes further from the base for nothing. A method without β is measured
        once."""
        method = method or METHODS[name]
        grid = self.task.betas if method.has_beta else [1.0]
        self._search(BETA, name, grid, lambda beta, seed: self._front(method, beta, seed))

    def tried(self, what: str, of: str) -> list[dict[str, Any]]:
        """All that was tried with every seed for a kind or a method, in the order of the grid: means over seeds."""
        if what == SCALE and self.of_scales is not self:
            return self.of_scales.tried(what, of)
        places: dict[float, list[dict[str, Any]]] = {}
        for row in self._rows(what, of):
            if row["seed"] in self.seeds:
                places.setdefault(row["at"], []).append(row)
        return [_mean(at, rows) for at, rows in sorted(places.items()) if len(rows) == len(self.seeds)]

    def scale(self, kind: str) -> float:
        """How many times its usual `lora_alpha` a kind has. Raises `ValueError` if its search has not come to its
        end."""
        return self._best(SCALE, kind, self.task.scales)

    def rate(self, kind: str) -> float:
        """The learning rate of a kind. Raises `ValueError` as [`scale`] does."""
        return self._best(RATE, kind, self.task.rates)

    def beta(self, name: str, method: Method | None = None) -> float | None:
        """The β of a method; `None` for one that has none. Raises `ValueError` as [`scale`] does."""
        method = method or METHODS[name]
        return self._best(BETA, method.beta_of or name, self.task.betas) if method.has_beta else None

    def matched(self, method: str) -> float | None:
        """The β at which a method is as far from the base, in KL, as PARM at its own; `None` if that is its own β too,
        or it has none. Between the β that were tried log KL is taken to be linear in log β."""
        if method == "parm" or not METHODS[method].has_beta:
            return None
        aim = next(row["kl"] for row in self.tried(BETA, "parm") if row["at"] == self.beta("parm"))
        rows = sorted((row for row in self.tried(BETA, method) if row["kl"] > 0), key=lambda row: row["kl"])
        if aim <= 0 or not rows:  # estimates may come out so, close to the base
            return None
        logs = np.log([[row["kl"], row["at"]] for row in rows])
        found = round(float(np.exp(np.interp(math.log(aim), logs[:, 0], logs[:, 1]))), 3)
        return None if 1 / CLOSE < found / (self.beta(method) or 1.0) < CLOSE else found

    def training(self, kind: str, scale: float, rate: float, seed: int) -> Training:
        """A training that settings are chosen with."""
        folder = self.work / f"{kind}-{scale:g}-{rate:g}-seed{seed}"
        return Training(self.task, kind, self.steps, seed, scale, rate, folder, self.task.validation_pairs)

    def chosen(self, kinds: Iterable[str], steps: int, seed: int, folder: Path) -> dict[str, Training]:
        """A piece's trainings by kind, at the settings that were chosen. Raises `ValueError` as [`scale`] does."""
        pairs = self.task.diagnosis_pairs
        return {
            kind: Training(self.task, kind, steps, seed, self.scale(kind), self.rate(kind), folder, pairs)
            for kind in kinds
        }

    def _rows(self, what: str, of: str) -> list[dict[str, Any]]:
        rows = read_rows(self.path) if self.path.exists() and self.path.stat().st_size else []
        return [row for row in rows if (row["what"], row["of"]) == (what, of)]

    def _loss(self, kind: str, scale: float, rate: float, seed: int) -> dict[str, Any]:
        """The sum of the objectives' losses on held-out pairs, of a training that is not repeated where the search for
        the other of scale and rate came by it."""
        made = {"scale": scale, "rate": rate}
        for row in (*self._rows(SCALE, kind), *self._rows(RATE, kind)):
            if row["seed"] == seed and {name: row[name] for name in made} == made:
                return {name: row[name] for name in (*made, "value", "losses", "seconds", "products") if name in row}
        found = self.training(kind, scale, rate, seed).run()
        value = sum(found["losses"].values())
        products = products_of(self.task.dtype)
        return {**made, "value": value, "losses": found["losses"], "seconds": found["seconds"], "products": products}

    def _front(self, method: Method, beta: float, seed: int) -> dict[str, Any]:
        training = self.training(method.kind, self.scale(method.kind), self.rate(method.kind), seed)
        training.run()
        own = beta if method.has_beta else None
        entry = method.entry(training, own, f"{method.title} {beta:g}" if method.has_beta else "")
        prompts = self.task.prompts("validation", self.task.validation_prompts)
        grid = preference_grid(self.task.objectives, steps=GRID_STEPS).tolist()
        rows = decode(self.task, prompts, grid, ["base", entry], self.work / f"answers-{seed}.jsonl")
        front = standardized(arrange(rows, self.task.objectives), "Base", self.task.objectives)[1]
        products = [mean_inner_product(cast(Any, front.preferences), rewards) for rewards in front.rewards]
        value, error = mean_and_error([-product for product in products])
        kl = mean_kl([row for row in rows if row["preference"] is not None])
        return {"value": value, "error": error, "kl": kl, "products": products_of(self.task.dtype)}

    def _search(
        self, what: str, of: str, grid: Sequence[float], value: Callable[[float, int], dict[str, Any]]
    ) -> None:
        try:
            records = Records(self.path, self._configuration(), cell_of=cell_of)
        except ValueError as error:
            raise ValueError(f"{error} Here `--results` names the output, and there is no `restart`.") from error
        with records as kept:
            while (at := next_of(self.tried(what, of), grid, self.task.limits[what])) is not None:
                known = {row["seed"] for row in self._rows(what, of) if row["at"] == at}
                for seed in self.seeds:
                    if seed not in known:
                        print(f"{self.task.name}: {of} at {what} {at:g}, seed {seed}", flush=True)
                        kept.append([{"what": what, "of": of, "at": at, "seed": seed, **value(at, seed)}])

    def _best(self, what: str, of: str, grid: Sequence[float]) -> float:
        rows = self.tried(what, of)
        if next_of(rows, grid, self.task.limits[what]) is not None:
            raise ValueError(
                f"The {what} of {of} is not chosen yet. Run the piece {self.task.name}/settings/{self.steps} first."
            )
        return best(rows)["at"]

    def _configuration(self) -> dict[str, Any]:
        task = self.task
        return {
            "task": task.name, "model": task.model_name, "pairs": task.fingerprint(), "steps": self.steps,
            "batch": task.batch, "reward_beta": task.reward_beta, "policy_beta": task.policy_beta,
            "held_out": task.validation_pairs, "prompts": task.validation_prompts, "rewards": task.rewards,
            "max_new_tokens": task.max_new_tokens, "top_k": task.top_k,
        }  # fmt: skip


def _mean(at: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of rows of several seeds. A standard error over prompts and the one over seeds add up in squares."""
    value, over_seeds = mean_and_error([row["value"] for row in rows])
    found = {"at": at, "value": value}
    if "kl" in rows[0]:
        error = float(np.mean([row["error"] for row in rows]))
        found["error"] = error if len(rows) == 1 else math.hypot(error, over_seeds)
        found["kl"] = float(np.mean([row["kl"] for row in rows]))
    if products := {row["products"] for row in rows if "products" in row}:  # rows of earlier runs do not say
        found["products"] = sorted(map(str, products))
    return found


def cell_of(row: Mapping[str, Any]) -> tuple:
    """What a row is of."""
    return row["what"], row["of"], row["at"], row["seed"]


def next_of(rows: Sequence[Mapping[str, Any]], grid: Sequence[float], limits: Sequence[float]) -> float | None:
    """What to try next: the rest of a grid, or beyond its edge if that is the best so far; `None` at the end.

    A grid of one is no search.
    """
    known = {row["at"] for row in rows}
    if rest := [at for at in grid if at not in known]:
        return rest[0]
    if len(grid) == 1:
        return None
    ordered, at = sorted(known), best(rows)["at"]
    if at == ordered[0]:
        further = ordered[0] ** 2 / ordered[1]
    elif at == ordered[-1]:
        further = ordered[-1] ** 2 / ordered[-2]
    else:
        return None
    further = float(f"{further:.3g}")
    return further if limits[0] <= further <= limits[1] else None


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What has the smallest value; or of values with a standard error the largest setting that is within one of it."""
    lowest = min(rows, key=lambda row: row["value"])
    near = [row for row in rows if "error" in row and row["value"] <= lowest["value"] + lowest["error"]]
    return max(near, key=lambda row: row["at"], default=lowest)


def at_edge(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the best of several lies at an edge of what was tried, so that a better one may lie beyond."""
    tried = [row["at"] for row in rows]
    return len(tried) > 1 and best(rows)["at"] in (min(tried), max(tried))
