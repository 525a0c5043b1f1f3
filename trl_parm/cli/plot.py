# SPDX-License-Identifier: Apache-2.0
"""`trl-parm plot`: measures, tables and figures of what `evaluate` has written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl_parm.arguments import decoded, option, parse, required

from .common import say, write_run


if TYPE_CHECKING:
    from trl_parm.evaluation.fronts import Front


TABLES = ("measures.md", "measures.csv", "differences.csv", "correlations.csv", "costs.csv")


@dataclass
class PlotArguments:
    """Arguments of `trl-parm plot`."""

    results: list[str] | None = option(None, "Files that evaluate has written.")
    output_dir: str = option("", "Where tables and figures go.")
    references: list[str] | None = option(
        None, "Reference points of the hypervolume: vectors or mappings, as JSON in a flag."
    )
    objectives: list[str] | None = option(None, "Columns with rewards; those that were evaluated if not given.")
    methods: list[str] | None = option(None, "Names of methods; all if not given.")
    against: str | None = option(None, "The method from which the others' differences are taken.")
    base: str = option("Base", "The method that is the bare base model, for costs.")
    resamples: int = option(2000, "Of the bootstrap over prompts.")
    seed: int = option(0, "Of the bootstrap.")
    name: str = option("fronts", "How the figures' files begin.")
    card: str | None = option(None, "The folder of an adapter, whose card gets the measures and the first figure.")

    def __post_init__(self) -> None:
        self.references = decoded(self.references)
        required(self, "results", "output_dir")


def main(argv: list[str]) -> None:
    arguments: PlotArguments = parse("plot", PlotArguments, argv, __doc__)
    from peft_pblora.output import check_output
    from trl_parm.evaluation.fronts import arrange, summarize
    from trl_parm.evaluation.measures import WRITER
    from trl_parm.evaluation.plots import draw_fronts, figure_files

    rows, objectives, names = read_results(arguments.results or [], arguments.objectives)
    rows = _chosen(rows, names, arguments.methods)
    references = [_point(given, objectives) for given in arguments.references or []]
    folder = Path(arguments.output_dir)
    planned = [folder / name for name in TABLES] + figure_files(objectives, folder, arguments.name)
    if len({str(path).casefold() for path in planned}) < len(planned):
        raise ValueError(f"`name` is {arguments.name!r}, which is the name of a table. Name the figures otherwise.")
    for path in planned:
        check_output(path, WRITER)  # before any of them is written
    tables = _tables(arrange(rows, objectives), names, objectives, references, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    text = write_tables(tables, folder)
    figures = draw_fronts(summarize(rows, objectives), objectives, folder, references, arguments.name)
    write_run(folder, "plot", arguments)
    if arguments.card:
        _complete_card(arguments.card, next(iter(tables.values())), figures)
    say(text)
    if not references:
        say("No hypervolume: it needs a reference point, such as --references '[-3, -5]'.")
    say(f"Tables are in {folder / 'measures.md'}, figures in {', '.join(path.name for path in figures)}.")


def read_results(
    results: Sequence[str], objectives: list[str] | None = None
) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """The rows of several files, with preferences in the order of the objectives.

    A method that is in more than one of the files is called by the file too, by what its path has of its own, such as
    `PARM (seed-1)`.

    Returns:
        `tuple` of the rows, the objectives, and by the name of each method its name in its file.

    Raises:
        ValueError: a file twice, without objectives, or with other ones than the first; a method that is called as one
            of two that were told apart.
    """
    from trl_parm.records import read_rows

    files = [Path(path) for path in results]
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"A file is twice among the results {', '.join(map(str, files))}. Name each once.")
    tables = [read_rows(path) for path in files]
    wanted = objectives or _objectives(files[0])
    orders = [_objectives(path, objectives) for path in files]
    methods = [list(dict.fromkeys(row["method"] for row in rows)) for rows in tables]
    count = Counter(name for own_methods in methods for name in own_methods)
    names: dict[str, str] = {}
    for path, label, rows, found, order in zip(files, _own_parts(files), tables, methods, orders):
        if objectives is None and set(order) != set(wanted):
            raise ValueError(f"{path} has the objectives {order}, but {files[0]} has {wanted}. Plot them apart.")
        shown = {name: f"{name} ({label})" if count[name] > 1 else name for name in found}
        for old, new in shown.items():
            if new in names:
                raise ValueError(f"Two methods would be called {new!r}, one of them of {path}. Plot the files apart.")
            names[new] = old
        for row in rows:
            row["method"] = shown[row["method"]]
            if row["preference"] is not None and set(order) == set(wanted):
                row["preference"] = [row["preference"][order.index(name)] for name in wanted]
    return [row for rows in tables for row in rows], wanted, names


def _own_parts(files: Sequence[Path]) -> list[str]:
    """What each path has of its own, without the beginnings and ends that all have in common."""
    parts = [list(path.resolve().parts) for path in files]
    for end in (0, -1):
        while all(parts) and len({own[end] for own in parts}) == 1:
            for own in parts:
                own.pop(end)
    return ["/".join(own) or str(path) for own, path in zip(parts, files)]


def write_tables(tables: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> str:
    """Writes tables by title as CSV files and together as `measures.md`, and returns that text."""
    from peft_pblora.output import output_file
    from trl_parm.evaluation.measures import WRITER, markdown, write_csv

    found = {title: rows for title, rows in tables.items() if rows}
    text = "\n\n".join(f"{title}\n\n{markdown(rows)}" for title, rows in found.items())
    for title, rows in found.items():
        write_csv(rows, folder / f"{title.split()[0].strip(',').lower()}.csv")
    with output_file(folder / "measures.md", WRITER) as file:
        file.write(text + "\n")
    return text


def _complete_card(adapter: str, measures: Sequence[Mapping[str, Any]], figures: Sequence[Path]) -> None:
    from peft_pblora import add_results

    table = [list(measures[0]), *(list(row.values()) for row in measures)] if measures else None
    add_results(adapter, table, next(path for path in figures if path.suffix == ".png"))
    say(f"The card in {adapter} has the measures and the figure.")


def _tables(
    found: Sequence[Front],
    names: Mapping[str, str],
    objectives: list[str],
    references: list[list[float]],
    arguments: PlotArguments,
) -> dict[str, list[dict[str, Any]]]:
    from trl_parm.evaluation.measures import correlations, costs, differences, measure

    options = (objectives, references)
    sampling = {"resamples": arguments.resamples, "seed": arguments.seed}
    guided = [front.method for front in found if front.preferences is not None]
    against, base = (
        next((new for new, old in names.items() if name in (new, old)), name)  # of several files the first one's
        for name in (arguments.against or next(iter(guided), found[0].method), arguments.base)
    )
    return {
        f"Measures with 95 % bootstrap intervals over prompts ({', '.join(objectives)}; higher is better)": measure(
            found, *options, **sampling
        ),
        f"Differences from {against} on the same prompts, with 95 % bootstrap intervals": differences(
            found, *options, against, **sampling
        ),
        "Correlations of rank between the weight of an objective and its reward": correlations(found, objectives),
        f"Costs, relative to {base}": costs(found, base),
    }


def _chosen(rows: list[dict[str, Any]], names: Mapping[str, str], methods: list[str] | None) -> list[dict[str, Any]]:
    unknown = [name for name in methods or [] if name not in (*names, *names.values())]
    if unknown:
        raise ValueError(f"The results have no method {unknown[0]!r}; they have {', '.join(names)}.")
    wanted = [new for name in methods or names for new, old in names.items() if name in (new, old)]
    return [row for name in dict.fromkeys(wanted) for row in rows if row["method"] == name]


def _objectives(path: Path, otherwise: list[str] | None = None) -> list[str]:
    """The objectives in the order in which the preferences of a file are."""
    from trl_parm.records import configuration_path

    beside = configuration_path(path)
    if not beside.exists():
        if otherwise is not None:
            return otherwise
        raise ValueError(f"{beside} is missing, which names the objectives. Give them with `objectives`.")
    return json.loads(beside.read_text(encoding="utf-8"))["objectives"]


def _point(given: Any, objectives: list[str]) -> list[float]:
    """A reference point in the order of the objectives."""
    if isinstance(given, Mapping):
        if set(given) != set(objectives):
            raise ValueError(f"A reference point names {list(given)}, but the objectives are {objectives}.")
        return [float(given[name]) for name in objectives]
    try:
        return [float(value) for value in cast(Any, given)]
    except (TypeError, ValueError):
        raise ValueError(f"A reference point is {given!r}, but it must be a list of numbers.") from None
