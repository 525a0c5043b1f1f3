# SPDX-License-Identifier: Apache-2.0
"""The pieces of the comparison, each of which can be run on its own, and is never done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft_pblora import preference_grid
from trl_parm.cpu import products_of
from trl_parm.identity import short_hash
from trl_parm.records import versions
from trl_parm.texts import prompt_key

from .methods import UNTRAINED, decode, methods_of
from .results import facts_path, join_pieces, kinds_of, read_facts, rows_path, write_piece
from .settings import Settings
from .task import Task, agreement
from .training import Training


AT_KL = "{} at PARM's KL"


@dataclass(frozen=True)
class Piece:
    """A part of the work.

    Attributes:
        name (`str`): `task/settings/steps/...` or `task/steps/seed/kind`, by whose beginnings pieces are asked for.
        run (`Callable`): Does what is not done yet.
    """

    name: str
    run: Callable[[], None]

    def is_asked(self, only: list[str]) -> bool:
        """Whether it is one of those that are asked for, by whole parts of its name; all are if none is named."""
        parts = self.name.split("/")
        return not only or any(parts[: len(asked)] == asked for asked in (o.strip("/").split("/") for o in only))


def pieces(task: Task, results: Path, work: Path) -> Iterator[Piece]:
    """All pieces of a task, in the order in which they need each other.

    Args:
        task ([`Task`]): The task.
        results (`Path`): A folder for what is kept, of all tasks.
        work (`Path`): A folder for adapters and answers, of all tasks.
    """
    results, work = results / task.name, work / task.name
    every = {steps: Settings(task, steps, results, work) for steps in map(task.settings_of, task.budgets)}
    for steps, settings in every.items():
        for kind in task.kinds:
            yield Piece(f"{task.name}/settings/{steps}/scale/{kind}", partial(settings.choose_scale, kind))
            yield Piece(f"{task.name}/settings/{steps}/rate/{kind}", partial(settings.choose_rate, kind))
        for method in methods_of(task.kinds):
            yield Piece(f"{task.name}/settings/{steps}/beta/{method}", partial(settings.choose_beta, method))
    for steps, seeds in task.budgets.items():
        settings = every[task.settings_of(steps)]
        for seed in seeds:
            for kind in task.kinds:
                run = partial(compare, task, steps, seed, kind, settings, results, work)
                yield Piece(f"{task.name}/{steps}/{seed}/{kind}", run)


def compare(task: Task, steps: int, seed: int, kind: str, settings: Settings, results: Path, work: Path) -> None:
    """Trains a kind with one seed, evaluates the methods that need it, and keeps the rewards; the last kind puts those
    of all together. Raises `ValueError` for tables of another model, other pairs or other prompts."""
    path, part = rows_path(results, steps, seed), rows_path(results, steps, seed, kind)
    for known in (path, part):
        check_same_run(known, task)
    if kind in kinds_of(path):
        return
    if not facts_path(part).exists():
        folder = work / f"{steps}-seed{seed}"
        training = settings.chosen([kind], steps, seed, folder)[kind]
        entries = chosen_entries(settings, training)  # before hours of training, whether all is chosen
        print(f"{task.name}: {kind}, {steps} steps, seed {seed}", flush=True)
        rows, facts = _evaluate(task, training, entries, settings, folder)
        write_piece(part, rows, facts)
    known = kinds_of(path)
    rest = [rows_path(results, steps, seed, kind) for kind in task.kinds if kind not in known]
    join_pieces(path, [path, *rest] if known else rest)


def identity(task: Task) -> dict[str, Any]:
    """What tables have in common that can be put together."""
    prompts = task.prompts("test", task.test_prompts)
    return {
        "task": task.name, "model": task.model_name, "batch": task.batch, "pairs": task.fingerprint(),
        "prompts": short_hash("\n".join(map(prompt_key, prompts)).encode()),
    }  # fmt: skip


def check_same_run(path: Path, task: Task) -> None:
    """Raises `ValueError` for a table that is there, of another model, other pairs or other prompts than a task's."""
    if not facts_path(path).exists():
        return
    known, expected = read_facts(path), identity(task)
    for key, value in expected.items():
        if known.get(key) != value:
            raise ValueError(
                f"{path} has the {key} {known.get(key)}, but that of the task is {value}. Name another folder with "
                "`--results`."
            )


def _evaluate(
    task: Task, training: Training, entries: Sequence[Callable[[], Any]], settings: Settings, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a piece, and the facts about it."""
    trained, steps, seed = training.run(), training.steps, training.seed
    names = methods_of([training.kind])
    prompts = task.prompts("test", task.test_prompts)
    grid = preference_grid(task.objectives, steps=task.grid_steps).tolist()
    rows = decode(task, prompts, grid, [entry() for entry in entries], folder / f"answers-{training.kind}.jsonl")
    return rows, {
        **identity(task), "steps": steps, "seed": seed, "objectives": task.objectives,
        "agreement": agreement(task.drawn(steps, seed), task.objectives), "trained": {training.kind: trained},
        "betas": {name: settings.beta(name) for name in names},
        "matched": {name: settings.matched(name) for name in names},
        "max_new_tokens": task.max_new_tokens, "top_k": task.top_k, "products": products_of(task.dtype),
        "versions": versions(),
    }  # fmt: skip


def chosen_entries(settings: Settings, training: Training) -> list[Callable[[], Any]]:
    """What is evaluated of a kind: every method at its β, and at the β of PARM's KL, and the controls beside PARM.
    Each is made when adapters are there."""
    found: list[Callable[[], Any]] = []
    if training.kind == "parm":
        arm = training.adapter()
        control = {"method": "untrained_arm", "name": UNTRAINED, "arm": arm, "beta": settings.beta("parm")}
        found += [lambda: "base", lambda: control]
    for name, method in methods_of([training.kind]).items():
        for beta, title in ((settings.beta(name), ""), (settings.matched(name), AT_KL.format(method.title))):
            if title and beta is None:
                continue
            found.append(lambda method=method, beta=beta, title=title: method.entry(training, beta, title))
    return found
