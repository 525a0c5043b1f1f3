# SPDX-License-Identifier: Apache-2.0
"""`trl-parm relabel`: pairs of responses and reward models → the labelled data set that training takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.arguments import option, parse, required
from trl_parm.processes import ALONE, Processes

from .common import Progress, load_data, load_rewards, say, tell_costs, write_run


SHARED = ("test_size", "validation_size", "tie_margin", "ranked", "seed")
"""Arguments of verbs that label pairs."""


@dataclass
class RelabelArguments:
    """Arguments of [`trl_parm.relabel.relabel`]."""

    data: dict | str | None = option(None, "Pairs: a file or Hub id, or {path: , split: }.")
    rewards: dict | None = option(None, "Objective to module:function, a model, or {source: , template: , ...}.")
    output_dir: str = option("", "Where the splits go.")
    test_size: float = option(0.1, "Pairs in the test split: a share below 1, or a number.")
    validation_size: float = option(0.0, "The same for the validation split.")
    tie_margin: float = option(0.0, "How much rewards of a tie may differ.")
    template: str | None = option(None, "What training reads as the prompt: a text with {prompt}; see raw_prompt.")
    ranked: bool = option(False, "Also write chosen and rejected for each objective.")
    seed: int = option(0, "Of the split.")
    batch_size: int = option(32, "Pairs that are scored and written at once.")
    restart: bool = option(False, "Remove scores of other pairs or rewards, instead of refusing to go on.")

    def __post_init__(self) -> None:
        required(self, "data", "rewards", "output_dir")
        check_sizes(self)
        if isinstance(self.data, Mapping) and self.data.get("streaming"):
            raise ValueError(
                "`data` has `streaming: true`, but all pairs are read before the first is scored. Leave it out."
            )


def check_sizes(arguments: Any) -> None:
    """Raises `ValueError` for a size of a split that is neither a share nor a whole number."""
    for name in ("test_size", "validation_size"):
        size = getattr(arguments, name)
        if size >= 1 and size != int(size):
            raise ValueError(f"`{name}` is {size}, but it must be a share below 1, or a whole number of pairs.")


def main(argv: list[str]) -> None:
    arguments: RelabelArguments = parse("relabel", RelabelArguments, argv, __doc__)
    processes = Processes.launched()
    rewards = load_rewards(arguments.rewards)
    for source in rewards.values():
        processes.check_devices(getattr(source, "model_kwargs", {}))
    pairs, folder = load_data(arguments.data), Path(arguments.output_dir)
    options = {name: getattr(arguments, name) for name in ("template", "batch_size", "restart")}
    label(pairs, rewards, folder, arguments, "relabel", processes, **options)
    tell_costs(rewards, processes)
    processes.end()


def label(
    pairs: Any,
    rewards: Mapping[str, Any],
    folder: Path,
    arguments: Any,
    verb: str,
    processes: Processes = ALONE,
    **options: Any,
) -> dict[str, Path]:
    """[`relabel`](trl_parm.relabel.relabel) with the arguments of a verb; returns the file of each split."""
    from trl_parm.evaluation.measures import markdown
    from trl_parm.relabel import agreement, relabel

    options |= {name: getattr(arguments, name) for name in SHARED}

    def start(objective: str) -> None:
        write_run(folder, verb, arguments, processes)
        say(f"{objective}: {rewards[objective].source}", processes)

    options |= {"on_start": start, "processes": processes}
    with Progress(len(rewards) * len(pairs), "pair", quiet=not processes.is_first) as bar:
        splits = relabel(pairs, rewards, folder, on_batch=bar.update, **options)
    files = {str(name): folder / f"{name}.jsonl" for name in splits}
    say(", ".join(f"{len(rows)} pairs in {files[str(name)]}" for name, rows in splits.items()), processes)
    labelled: list[Any] = [row for rows in splits.values() for row in rows]
    say(markdown(agreement(labelled, list(rewards))), processes)
    return files
