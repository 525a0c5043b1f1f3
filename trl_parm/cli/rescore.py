# SPDX-License-Identifier: Apache-2.0
"""`trl-parm rescore`: other or further rewards for the responses of an evaluation, without decoding them again."""

from __future__ import annotations

from dataclasses import dataclass

from trl_parm.arguments import option, parse, required

from .common import Progress, load_rewards, say, tell_costs


@dataclass
class RescoreArguments:
    """Arguments of [`trl_parm.evaluation.rescoring.rescore`]."""

    results: str = option("", "What evaluate, or generate, has written.")
    rewards: dict | None = option(None, "Objective to module:function, a model, or {source: , template: , ...}.")
    output: str = option("", "A JSONL file for the rows with these rewards; the old one stays as it is.")
    batch_size: int = option(16, "Responses that are scored and written at once.")
    restart: bool = option(False, "Remove rows of another configuration, instead of refusing to go on.")

    def __post_init__(self) -> None:
        required(self, "results", "rewards", "output")


def main(argv: list[str]) -> None:
    arguments: RescoreArguments = parse("rescore", RescoreArguments, argv, __doc__)
    from trl_parm.evaluation.rescoring import rescore
    from trl_parm.jsonl import beside
    from trl_parm.records import read_rows, write_run

    rewards = load_rewards(arguments.rewards)
    with Progress(len(read_rows(arguments.results)), "row") as bar:
        table = rescore(
            arguments.results, rewards, arguments.output, arguments.batch_size, arguments.restart, bar.update
        )
    tell_costs(rewards)
    write_run(beside(arguments.output, "run.yaml"), "rescore", vars(arguments))
    say(f"{len(table)} responses with the rewards {', '.join(rewards)} in {arguments.output}")
