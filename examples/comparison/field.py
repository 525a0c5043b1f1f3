# SPDX-License-Identifier: Apache-2.0
"""The rest of the field beside PARM and GenARM: with one budget and seed, most of it on ARMs that these have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peft_pblora import preference_grid
from trl_parm.records import versions

from .methods import BASE, METHODS, Method, decode
from .piece import Piece, check_same_run, identity
from .pooled import GENARM, PARM, Budget
from .results import facts_path, read_facts, read_piece, rows_path, write_piece
from .settings import Settings
from .task import Task
from .training import FURTHER_KINDS


FIELD = {
    "uniarm_descriptions": Method("UniARM by descriptions", "uniarm", "uniarm_descriptions"),
    "parm_prompt": Method("PARM, α in the prompt", "parm_prompt", "parm_prompt"),
    "cage_parm": Method("CAGE of PARM", "cage", "parm", has_beta=False),
    "cage_genarm": Method("CAGE of GenARM", "cage", "genarm", "arms", has_beta=False),
    "worst_parm": Method("Worst case of PARM", "worst_case", "parm", beta_of="parm"),
    "worst_genarm": Method("Worst case of GenARM", "worst_case", "genarm", "arms", beta_of="genarm"),
}
BEYOND = ((1.5, -0.5), (-0.5, 1.5))
"""Weights off the simplex of two objectives, which extrapolate."""
NAME = "field"


def field_pieces(task: Task, results: Path, work: Path) -> Iterator[Piece]:
    """The pieces of a task that compares the rest of the field; none of one that does not.

    Args:
        task ([`Task`]): The task.
        results, work (`Path`): As of [`pieces`](comparison.piece.pieces).
    """
    if task.field is None:
        return
    results, work, (steps, seed) = results / task.name, work / task.name, task.field
    settings = Settings(task, task.settings_of(steps), results, work)
    for kind in FURTHER_KINDS:
        yield Piece(f"{task.name}/field/scale/{kind}", partial(settings.choose_scale, kind))
        yield Piece(f"{task.name}/field/rate/{kind}", partial(settings.choose_rate, kind))
    for name, method in FIELD.items():
        if method.searched:
            yield Piece(f"{task.name}/field/beta/{name}", partial(settings.choose_beta, name, method))
    yield Piece(f"{task.name}/field/{steps}/{seed}", lambda: compare_field(task, settings, results, work))


def compare_field(task: Task, settings: Settings, results: Path, work: Path) -> None:
    """Trains what the comparison has not, evaluates the field, and PARM and GenARM beyond the simplex."""
    assert task.field is not None
    steps, seed = task.field
    path, folder = rows_path(results, steps, seed, NAME), work / f"{steps}-seed{seed}"
    check_same_run(path, task)
    if facts_path(path).exists():
        return
    trainings = settings.chosen({method.kind for method in FIELD.values()}, steps, seed, folder)
    betas = {name: settings.beta(name, method) for name, method in FIELD.items()}
    trained = {kind: training.run() for kind, training in trainings.items()}
    prompts = task.prompts("test", task.test_prompts)
    grid = preference_grid(task.objectives, steps=task.grid_steps).tolist()
    entries = [method.entry(trainings[method.kind], betas[name]) for name, method in FIELD.items()]
    rows = decode(task, prompts, grid, entries, folder / "field.jsonl")
    known = {name: METHODS[name] for name in ("parm", "genarm")}
    entries = [method.entry(trainings[method.kind], settings.beta(name)) for name, method in known.items()]
    rows += decode(task, prompts, BEYOND, entries, folder / "beyond.jsonl", allow_off_simplex=True)
    facts = {
        **identity(task), "steps": steps, "seed": seed, "objectives": task.objectives,
        "trained": trained, "betas": betas, "versions": versions(),
    }  # fmt: skip
    write_piece(path, rows, facts)


def read_field(results: Path, task: Task, budget: Budget) -> tuple[Budget, list[dict[str, Any]]] | None:
    """The field beside the methods of the same seed that it is compared with, and the rows beyond the simplex; `None`
    where it was not run.

    Args:
        results (`Path`): The task's folder with results.
        task ([`Task`]): The task.
        budget ([`Budget`]): Of as many steps, with all seeds.

    Raises:
        ValueError: the field was run on other pairs or prompts.
    """
    if task.field is None or task.field[0] != budget.steps:
        return None
    path = rows_path(results, *task.field, NAME)
    if not facts_path(path).exists():
        return None
    facts, own = read_facts(path), next((one for one in budget.facts if one["seed"] == task.field[1]), None)
    if own is None or not _agree(own, facts):
        raise ValueError(
            f"{path} has other pairs, prompts or settings than the seed {task.field[1]} of {results.name}, "
            f"{budget.steps} steps. Run them again together."
        )
    rows = [row for row in read_piece(path) if row["preference"] is None or min(row["preference"]) >= 0]
    beyond = [row for row in read_piece(path) if row["preference"] is not None and min(row["preference"]) < 0]
    names = {f"{name} (seed {task.field[1]})": name for name in (BASE, PARM, GENARM)}
    rows += [row for row in budget.rows if row["method"] in names]
    names |= {row["method"]: row["method"] for row in rows if row["method"] not in names}
    facts = [{**own, "trained": {**own["trained"], **facts["trained"]}, "betas": {**own["betas"], **facts["betas"]}}]
    return replace(budget, seeds=[task.field[1]], missing=[], facts=facts, rows=rows, names=names), beyond


def _agree(own: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a piece and the field's were run alike."""
    alike = [(own.get(key), facts.get(key)) for key in ("model", "prompts", "pairs", "batch")]
    for kind in set(own["trained"]) & set(facts["trained"]):
        alike += [(own["trained"][kind].get(key), facts["trained"][kind].get(key)) for key in ("scale", "rate")]
    alike += [(own["betas"].get(m.beta_of), facts["betas"].get(name)) for name, m in FIELD.items() if m.beta_of]
    return all(first == second for first, second in alike)


def beyond_table(field: Budget, beyond: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean rewards at the vertices, and beyond them, and how much further apart they are."""
    rows = []
    for method in (PARM, GENARM):
        inside = [row for row in field.rows if field.names[row["method"]] == method]
        every = [*inside, *(row for row in beyond if row["method"] == method)]
        means = {weights: _means(every, weights, field.objectives) for weights in (*BEYOND, (1.0, 0.0), (0.0, 1.0))}
        outer, inner = (abs(means[a] - means[b]) for a, b in (BEYOND, ((1.0, 0.0), (0.0, 1.0))))
        for weights in (BEYOND[0], (1.0, 0.0), (0.0, 1.0), BEYOND[1]):
            cells = {name: f"{value:.2f}" for name, value in zip(field.objectives, means[weights])}
            rows.append({"method": method, "α": " ".join(f"{weight:g}" for weight in weights), **cells})
        ratio = {n: f"{out / own:.2f}" if own else "—" for n, out, own in zip(field.objectives, outer, inner)}
        rows.append({"method": method, "α": "spread beyond / between vertices", **ratio})
    return rows


def _means(rows: Sequence[Mapping[str, Any]], weights: Sequence[float], objectives: Sequence[str]) -> np.ndarray:
    own = [row for row in rows if row["preference"] == list(weights)]
    return np.array([np.mean([row[name] for row in own]) for name in objectives])
