# SPDX-License-Identifier: Apache-2.0
"""`trl-parm compare`: two evaluations, or two methods of one, prompt by prompt, by their rewards and by a judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.arguments import check_fields, option, parse, required

from .common import Progress, say, write_run
from .plot import Rows, differing, read_objectives


FILES = ("comparison.md", "comparison.csv", "wins.csv", "verdicts.jsonl")


@dataclass
class CompareArguments:
    """Arguments of `trl-parm compare`."""

    results: list[str] | None = option(None, "One or two files that evaluate has written.")
    output_dir: str = option("", "Where tables and verdicts go.")
    methods: list[str] | None = option(None, "A method, and the one that it is compared with; each with its namesake.")
    objectives: list[str] | None = option(None, "Columns with rewards; those that were evaluated if not given.")
    judge: dict | None = option(
        None, "Who sees both responses, in both orders: {source: openai, base_url: , model: , template: , ...}."
    )
    resamples: int = option(2000, "Of the bootstrap over prompts.")
    seed: int = option(0, "Of the bootstrap.")

    def __post_init__(self) -> None:
        required(self, "results", "output_dir")
        if len(self.results or ()) > 2:
            raise ValueError(f"`results` has {len(self.results or ())} files, but two at most are compared.")
        if self.methods is not None and len(self.methods) != 2:
            raise ValueError(f"`methods` are {self.methods}, but they must be two.")
        if len(self.results or ()) == 1 and self.methods is None:
            raise ValueError("Within one file two methods are compared: name them with `methods`.")


def main(argv: list[str]) -> None:
    arguments: CompareArguments = parse("compare", CompareArguments, argv, __doc__)
    from peft_pblora.output import check_output, output_file, remove_output
    from trl_parm.evaluation.comparison import compare, judge_pairs, pair_up
    from trl_parm.evaluation.measures import WRITER, markdown, write_csv
    from trl_parm.jsonl import as_line

    judge = _judge(arguments.judge)
    sides, objectives = _sides(arguments)
    methods = None if arguments.methods is None else (arguments.methods[0], arguments.methods[1])
    pairings = pair_up(sides[0], sides[1], methods)
    folder = Path(arguments.output_dir)
    for name in FILES:
        check_output(folder / name, WRITER)
    tables = {"Differences of mean rewards, first minus second, on the same prompts": compare(
        pairings, objectives, arguments.resamples, arguments.seed
    )}  # fmt: skip
    verdicts: Rows = []
    if judge is not None:
        with Progress(len(pairings), "pairing") as bar:
            rates, verdicts = judge_pairs(pairings, judge, lambda _: bar.update(), arguments.resamples, arguments.seed)
        tables["Wins of the first, by a judge that saw both responses in both orders"] = rates
        say(f"Judged by {judge.endpoint.cost()}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("comparison", "wins"), tables.values()):
        write_csv(rows, folder / f"{name}.csv")
    shown = [[_with_interval(row) for row in rows] for rows in tables.values()]
    text = "\n\n".join(f"{title}\n\n{markdown(rows)}" for title, rows in zip(tables, shown))
    with output_file(folder / FILES[0], WRITER) as file:
        file.write(text + "\n")
    if judge is not None:
        with output_file(folder / FILES[-1], WRITER) as file:
            file.writelines(map(as_line, verdicts))
    else:
        for name in FILES[2:]:  # of an earlier call, whose judge saw other responses
            remove_output(folder / name, WRITER)
    write_run(folder, "compare", arguments)
    say(text)
    alone = sum(pairing.alone for pairing in pairings)
    if alone:
        say(f"{alone} responses are to prompts that the other side does not have, and were left out.")


def _with_interval(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose interval stands beside its value, for reading."""
    from trl_parm.evaluation.comparison import WINS
    from trl_parm.evaluation.metrics import Interval

    name = WINS if WINS in row else "difference"
    found = {key: value for key, value in row.items() if key not in ("low", "high", "error")}
    return found if row["low"] is None else {**found, name: str(Interval(row[name], row["low"], row["high"]))}


def _judge(given: Any) -> Any:
    if given is None:
        return None
    from trl_parm.endpoint import Endpoint
    from trl_parm.judges import PairJudge, judge_of

    for owner in (Endpoint, PairJudge):
        given = check_fields(given, owner, "`judge`")
    judge = judge_of(given, PairJudge)
    judge.endpoint.check()
    return judge


def _sides(arguments: CompareArguments) -> tuple[list[Rows], list[str]]:
    """The rows of both sides, their preferences in one order of the objectives, and what is compared."""
    from trl_parm.records import read_rows

    files = [Path(path) for path in arguments.results or ()]
    orders = [read_objectives(path, arguments.objectives) for path in files]
    if set(orders[0]) != set(orders[-1]):
        raise ValueError(f"{files[0]} has the objectives {orders[0]}, but {files[-1]} has {orders[-1]}.")
    tables = [read_rows(path) for path in files]
    for rows, order in zip(tables, orders):
        for row in rows:
            if row["preference"] is not None:
                weights = dict(zip(order, row["preference"], strict=True))
                row["preference"] = [weights[name] for name in orders[0]]
    wanted = arguments.objectives or orders[0]
    if not wanted:
        raise ValueError(
            f"{files[0]} has no objectives. Name the columns with rewards as `objectives`, or let `trl-parm rescore` "
            "write some."
        )
    missing = [name for name in wanted if not all(name in rows[0] for rows in tables)]
    if missing:
        raise ValueError(f"The results have no reward {missing[0]!r}.")
    if other := differing(files, wanted):
        say(f"The texts of both sides were not decoded alike: {other}.")
    return [tables[0], tables[-1]], wanted
