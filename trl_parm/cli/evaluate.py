# SPDX-License-Identifier: Apache-2.0
"""`trl-parm evaluate`: the same prompts with all methods at all preferences, scored, in one table."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.arguments import option, parse, required
from trl_parm.processes import Processes

from .common import OFF_SIMPLEX, UNJUDGED_PROMPTS, grid, load_rewards, say, tell_costs, write_run
from .generate import DecodingArguments


RESULTS = "results.jsonl"


@dataclass(kw_only=True)
class EvaluateArguments(DecodingArguments):
    """Arguments of [`trl_parm.evaluation.evaluate.evaluate`]."""

    methods: list[dict | str] | None = option(
        None, "Methods: names, or {method: parm, name: , arm: , beta: }, as JSON in a flag."
    )
    rewards: dict | None = option(None, "Objective to module:function, a model, or {source: , template: , ...}.")
    preferences: list[list | dict] | None = option(None, "The grid: vectors or mappings by objective, JSON in a flag.")
    grid_steps: int | None = option(None, "A regular grid of so many steps instead.")
    allow_off_simplex: bool = option(False, OFF_SIMPLEX)
    output_dir: str = option("", f"Where {RESULTS} goes.")
    restart: bool = option(False, "Remove rows of another configuration, instead of refusing to go on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        required(self, "methods", "rewards", "output_dir")


def main(argv: list[str]) -> None:
    arguments: EvaluateArguments = parse("evaluate", EvaluateArguments, argv, __doc__)
    from trl_parm.evaluation.evaluate import Entry
    from trl_parm.evaluation.fronts import judged, summarize

    processes, models = Processes.launched(), arguments.models()
    sources = load_rewards(arguments.rewards)
    for source in sources.values():
        processes.check_devices(getattr(source, "model_kwargs", {}))
    objectives, folder = list(sources), Path(arguments.output_dir)
    preferences = grid(arguments.preferences, arguments.grid_steps, objectives, arguments.allow_off_simplex)
    methods: list[Any] = arguments.methods or []
    prompts, entries = arguments.read_prompts(), list(map(Entry.of, methods))
    runs = sum(len(entry.runs(preferences)) for entry in entries)
    said = f"{len(methods)} methods, {runs} runs of {len(prompts)} prompts; results go to {folder / RESULTS}"

    def start(name: str) -> None:
        write_run(folder, "evaluate", arguments, processes)
        if name == entries[0].name:  # once all is checked
            say(said, processes)
        say(name, processes)

    table = arguments.evaluate(
        methods,
        preferences,
        prompts,
        models,
        rewards=sources,
        path=folder / RESULTS,
        restart=arguments.restart,
        on_start=start,
        processes=processes,
        allow_off_simplex=arguments.allow_off_simplex,
    )
    tell_costs(sources, processes)
    processes.end()
    if not processes.is_first:
        return
    rows, lost = judged(table, objectives)
    if lost:
        say(UNJUDGED_PROMPTS.format(lost))
    if rows:
        say(_means(summarize(rows, objectives), objectives))
    plot = ["trl-parm", "plot", "--results", str(folder / RESULTS), "--output_dir", str(folder)]
    say(f"Measures and figures: {shlex.join(plot)}")


def _means(summary: list[dict[str, Any]], objectives: list[str]) -> str:
    from trl_parm.evaluation.measures import markdown, with_error

    places = _decimals([row["preference"] for row in summary if row["preference"] is not None])
    rows = [
        {
            "method": row["method"],
            "preference": ", ".join(f"{w:.{places}f}" for w in row["preference"] or ()) or "-",
            **{name: with_error(row[name], row[f"{name}_error"]) for name in objectives},
        }
        for row in summary
    ]
    return f"Mean rewards ± standard error; preferences are ({', '.join(objectives)}):\n\n{markdown(rows)}"


def _decimals(preferences: list[list[float]]) -> int:
    """How many decimals show preferences as they are, or with four: two or more, and so many that none looks like
    another."""
    for places in range(2, 9):
        shown = [[round(weight, places) for weight in preference] for preference in preferences]
        exact = all(abs(w - own) < 1e-6 for row, one in zip(shown, preferences) for w, own in zip(row, one))
        if (exact or places >= 4) and len(set(map(tuple, shown))) == len(set(map(tuple, preferences))):
            return places
    return 9
