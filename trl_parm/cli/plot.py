# SPDX-License-Identifier: Apache-2.0
"""`trl-parm plot`: measures, tables and figures of what `evaluate` has written."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trl_parm.arguments import option, parse, required
from trl_parm.extras import require

from .common import UNJUDGED_PROMPTS, say, write_run


TABLES = ("measures.md", "measures.csv", "differences.csv", "correlations.csv", "answers.csv", "costs.csv")
ANSWERS = (
    "Answers, with mean tokens, shares at the cap and of repeated 4-grams, and of a token log π_base and, as kl, "
    "log π − log π_base"
)
OF_TEXTS = (
    "base", "sampling", "generation", "generation_config", "end_tokens", "template", "chat_template",
    "max_prompt_length", "escape_control_tokens",
)  # fmt: skip
"""What of a configuration the texts of all methods depend on, but for noise and the last digits of arithmetic."""
Rows = list[dict[str, Any]]


@dataclass
class PlotArguments:
    """Arguments of `trl-parm plot`."""

    results: list[str] | None = option(None, "Files that evaluate has written.")
    output_dir: str = option("", "Where tables and figures go.")
    references: list[list | dict] | None = option(
        None, "Reference points of the hypervolume: vectors or mappings, as JSON in a flag."
    )
    objectives: list[str] | None = option(None, "Columns with rewards; those that were evaluated if not given.")
    methods: list[str] | None = option(None, "Names of methods; all if not given.")
    against: str | None = option(None, "The method from which the others' differences are taken.")
    base: str = option("Base", "The method that is the bare base model, for costs and the scale of rewards.")
    seeds: bool = option(False, "Methods of one name in several files are one method, trained with several seeds.")
    resamples: int = option(2000, "Of the bootstrap over prompts.")
    seed: int = option(0, "Of the bootstrap.")
    name: str = option("fronts", "How the figures' files begin.")
    html: bool = option(False, "Also write one page that needs no other file, with all of this and the responses.")
    html_prompts: int = option(50, "To how many prompts that page has the responses.")
    card: str | None = option(None, "The folder of an adapter, whose card gets the measures and the first figure.")

    def __post_init__(self) -> None:
        required(self, "results", "output_dir")


def main(argv: list[str]) -> None:
    arguments: PlotArguments = parse("plot", PlotArguments, argv, __doc__)
    require("eval", "a plot", "matplotlib", "moocore", "scipy")
    from peft_pblora import add_results
    from peft_pblora.card.files import WRITER as FIGURE
    from peft_pblora.output import check_output, remove_output
    from trl_parm.evaluation.fronts import judged, summarize
    from trl_parm.evaluation.measures import WRITER
    from trl_parm.evaluation.plots import any_figure_files, draw_fronts, figure_files

    if arguments.card and not Path(arguments.card, "adapter_config.json").is_file():
        raise ValueError(
            f"There is no adapter in {arguments.card!r}, whose card could get the figure. Name its folder."
        )
    rows, objectives, names = read_results(arguments.results or [], arguments.objectives)
    if other := differing(arguments.results or [], objectives):
        if arguments.seeds:
            raise ValueError(f"With `seeds` all texts must be decoded alike: {other}. Plot the files apart.")
        say(f"Not all of these texts were decoded alike: {other}.")
    rows, lost = judged(_chosen(rows, names, arguments.methods), objectives)
    if lost and not rows:
        raise ValueError(f"A judge failed on each of {lost} prompts, so none is left. `trl-parm rescore` asks again.")
    if lost:
        say(UNJUDGED_PROMPTS.format(lost))
    references = [_point(given, objectives) for given in arguments.references or []]
    folder = Path(arguments.output_dir)
    planned = [folder / name for name in TABLES] + figure_files(objectives, folder, arguments.name)
    page = folder / f"{arguments.name}.html"
    planned += [page] if arguments.html else []
    if len({str(path).casefold() for path in planned}) < len(planned):
        raise ValueError(f"`name` is {arguments.name!r}, which is the name of a table. Name the figures otherwise.")
    for path in planned:
        check_output(path, WRITER)  # before any of them is written
    if arguments.card:
        check_output(Path(arguments.card, planned[len(TABLES)].name), FIGURE)
    tables, missing = _tables(rows, names, objectives, references, arguments)
    summary = summarize(rows, objectives, arguments.resamples, arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_fronts(summary, objectives, folder, references, arguments.name)
    text, written = _write(tables, folder)
    possible = [folder / name for name in TABLES] + any_figure_files(folder, arguments.name) + [page]
    for path in possible:
        if path not in written and path not in planned[len(TABLES) :]:  # of an earlier call, about other rows
            remove_output(path, WRITER)
    if missing:
        text += f"\n\n{missing}"
    if arguments.html:
        from trl_parm.evaluation.page import write_page

        records = _records(arguments.results or [])
        told = [missing, UNJUDGED_PROMPTS.format(lost)][: 1 + bool(lost)]
        write_page(
            page, rows, summary, objectives, tables, records, references, list(filter(None, told)),
            arguments.html_prompts,
        )  # fmt: skip
        say(f"The page is {page}; it needs no other file.")
    write_run(folder, "plot", arguments)
    if arguments.card:
        measures = next(iter(tables.values()))
        table = [list(measures[0]), *(list(row.values()) for row in measures)] if measures else None
        add_results(arguments.card, table, next(path for path in figures if path.suffix == ".png"))
        say(f"The card in {arguments.card} has the measures and the figure.")
    say(text)
    if not references:
        point = shlex.quote(json.dumps(dict.fromkeys(objectives, 0), ensure_ascii=False))
        say(f"No hypervolume: it needs a reference point, which is worse than all that counts: --references {point}")
    say(f"Tables are in {folder / TABLES[0]}, figures in {', '.join(path.name for path in figures)}.")


class Origin(NamedTuple):
    """Where a method comes from: its name in its file, and the file."""

    method: str
    file: str


def read_results(results: Sequence[str], objectives: list[str] | None) -> tuple[Rows, list[str], dict[str, Origin]]:
    """The rows of several files, the objectives, in whose order preferences are, and where each method comes from.

    A method that is in more than one of the files is called by the file too, by what its path has of its own, such as
    `PARM (seed-1)`.
    """
    from trl_parm.records import read_rows

    files = [Path(path) for path in results]
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"A file is twice among the results {', '.join(map(str, files))}. Name each once.")
    tables = [read_rows(path) for path in files]
    wanted = objectives or read_objectives(files[0])
    methods = [list(dict.fromkeys(row["method"] for row in rows)) for rows in tables]
    count = Counter(name for of_file in methods for name in of_file)
    names: dict[str, Origin] = {}
    for path, label, rows, of_file in zip(files, _own_parts(files), tables, methods):
        order = read_objectives(path, objectives)
        if objectives is None and set(order) != set(wanted):
            raise ValueError(f"{path} has the objectives {order}, but {files[0]} has {wanted}. Plot them apart.")
        shown = {name: f"{name} ({label})" if count[name] > 1 else name for name in of_file}
        for old, new in shown.items():
            if new in names:
                raise ValueError(f"Two methods would be called {new!r}, one of them of {path}. Plot the files apart.")
            names[new] = Origin(old, str(path))
        for row in rows:
            row["method"] = shown[row["method"]]
            if row["preference"] is not None:  # which has no weight for a reward that was no objective
                weights = dict(zip(order, row["preference"], strict=True))
                row["preference"] = [weights.get(name, 0.0) for name in wanted]
    return [row for rows in tables for row in rows], wanted, names


def _records(results: Sequence[str]) -> dict[str, str]:
    """What stands beside files of results: their configuration, and the run that made them."""
    from trl_parm.jsonl import configuration_path

    found = [path for file in results for path in (configuration_path(file), Path(file).with_name("run.yaml"))]
    return {str(path): path.read_text(encoding="utf-8") for path in found if path.is_file()}


def read_objectives(path: Path, otherwise: list[str] | None = None) -> list[str]:
    """The objectives in the order in which the preferences of a file are."""
    from trl_parm.jsonl import configuration_path
    from trl_parm.records import read_configuration

    beside = configuration_path(path)
    if beside.exists():
        return list(read_configuration(path)["objectives"])
    if otherwise is None:
        raise ValueError(f"{beside} is missing, which names the objectives. Give them with `objectives`.")
    return otherwise


def differing(results: Sequence[str | Path], objectives: Sequence[str]) -> str:
    """What the texts of several files were decoded with differently, in words, as far as the files beside them say it.
    Raises `ValueError` for a reward that is not one function in all of them."""
    from trl_parm.jsonl import configuration_path
    from trl_parm.records import read_configuration

    known = {str(path): read_configuration(path) for path in results if configuration_path(path).is_file()}
    rewards = {path: one.get("rewards") or {} for path, one in known.items()}
    if other := _differences({p: {n: own[n] for n in objectives if own.get(n)} for p, own in rewards.items()}):
        raise ValueError(
            f"A reward must be one function in all results: {other}. Score them alike with `trl-parm rescore`, or "
            "leave it out of `objectives`."
        )
    return _differences({path: {key: one[key] for key in OF_TEXTS if key in one} for path, one in known.items()})


def _differences(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What files say otherwise than the first one that says it; nothing where none does."""
    from trl_parm.records import differences

    first: dict[str, tuple[str, Any]] = {}
    texts = []
    for path, entries in found.items():
        for name, entry in entries.items():
            if isinstance(entry, Mapping) and entry.get("fingerprint"):  # which says what it is, wherever it is
                entry = {key: value for key, value in entry.items() if key not in ("path", "source")}
            before, known = first.setdefault(name, (path, entry))
            texts += [f"from {before} to {path} {text}" for text in differences({name: known}, {name: entry})]
    return "; ".join(texts)


def _own_parts(files: Sequence[Path]) -> list[str]:
    """What each path has of its own, without the beginnings and ends that all have in common."""
    parts = [list(path.resolve().parts) for path in files]
    for end in (0, -1):
        while all(parts) and len({own[end] for own in parts}) == 1:
            for own in parts:
                own.pop(end)
    return ["/".join(own) or str(path) for own, path in zip(parts, files)]


def _called(names: Mapping[str, Origin], name: str) -> list[str]:
    """What methods of this name, here or in their files, are called here."""
    return [new for new, origin in names.items() if name in (new, origin.method)]


def _chosen(rows: Rows, names: Mapping[str, Origin], methods: list[str] | None) -> Rows:
    """The rows of the methods that are asked for, by their names here or in their files, in this order."""
    found = {name: _called(names, name) for name in methods or names}
    unknown = [name for name, own in found.items() if not own]
    if unknown:
        raise ValueError(f"The results have no method {unknown[0]!r}; they have {', '.join(names)}.")
    wanted = dict.fromkeys(name for own in found.values() for name in own)
    return [row for name in wanted for row in rows if row["method"] == name]


def _point(given: Any, objectives: list[str]) -> list[float]:
    """A reference point in the order of the objectives."""
    if isinstance(given, Mapping):
        if set(given) != set(objectives):
            raise ValueError(f"A reference point names {list(given)}, but the objectives are {objectives}.")
        given = [given[name] for name in objectives]
    try:
        return [math.nan if isinstance(value, bool) else float(value) for value in given]
    except (TypeError, ValueError):
        raise ValueError(f"A reference point is {given!r}, but it must be a list of numbers.") from None


def _tables(
    rows: Rows,
    names: Mapping[str, Origin],
    objectives: list[str],
    references: list[list[float]],
    arguments: PlotArguments,
) -> tuple[dict[str, Rows], str]:
    """Tables by title, the measures first, and what could not be measured, in words."""
    from trl_parm.evaluation.answers import describe_answers
    from trl_parm.evaluation.fronts import arrange, pool_seeds, standardized
    from trl_parm.evaluation.measures import both_scales, correlations, costs, differences, measure

    found = arrange(rows, objectives)
    if arguments.base != PlotArguments.base and not _called(names, arguments.base):
        raise ValueError(f"`base` is {arguments.base!r}, but the methods are {', '.join(names)}.")
    if arguments.seeds:
        methods, files = ({new: origin[i] for new, origin in names.items()} for i in range(2))
        found = pool_seeds(found, methods, files)
        names = {origin.method: origin for origin in names.values()}
    guided = [front.method for front in found if front.preferences is not None]
    against, base = (
        next(iter(_called(names, name)), name)  # of several files the first one's
        for name in (arguments.against or next(iter(guided), found[0].method), arguments.base)
    )
    scaled, missing = None, []
    try:
        scaled = standardized(found, base, objectives)
    except ValueError as error:
        missing.append(f"No measures of standardised rewards: {error}")
    over = "prompts"
    if any(len(front.runs) > 1 for front in found):
        over = "prompts and training seeds"
    else:
        missing.append("Intervals are of one training each: they lack what another seed of training would change.")
    sampling = {"resamples": arguments.resamples, "seed": arguments.seed}
    measures = both_scales(lambda f, points: measure(f, objectives, points, **sampling), found, scaled, references)
    other = both_scales(
        lambda f, points: differences(f, objectives, points, against, **sampling), found, scaled, references
    )
    return {
        f"Measures with 95 % bootstrap intervals over {over} ({', '.join(objectives)}; higher is better)": measures,
        f"Differences from {against} on the same prompts, with 95 % bootstrap intervals": other,
        "Correlations of rank between the weight of an objective and its reward": correlations(found, objectives),
        ANSWERS: describe_answers(rows),
        f"Costs, relative to {base}": costs(found, base),
    }, "\n\n".join(missing)


def _write(tables: Mapping[str, Rows], folder: Path) -> tuple[str, list[Path]]:
    """Writes each table as a CSV file, called as its title begins, and all as Markdown, which is returned with the
    files."""
    from peft_pblora.output import output_file
    from trl_parm.evaluation.measures import WRITER, markdown, write_csv

    found = {title: rows for title, rows in tables.items() if rows}
    files = [folder / f"{title.split()[0].strip(',').lower()}.csv" for title in found]
    for rows, file in zip(found.values(), files):
        write_csv(rows, file)
    text = "\n\n".join(f"{title}\n\n{markdown(rows)}" for title, rows in found.items())
    with output_file(folder / TABLES[0], WRITER) as file:
        file.write(text + "\n")
    return text, [folder / TABLES[0], *files]
