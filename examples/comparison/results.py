# SPDX-License-Identifier: Apache-2.0
"""What is kept of a piece: rewards of each answer and facts about the training, without any text of an answer."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pblora import name_preference
from peft_pblora.output import output_file
from trl_parm.evaluation import repetition


WRITER = "reproduce_small.py"
HEAD = ("method", "preference", "prompt")
MEASURED = ("tokens", "capped", "repetition", "log_prob_base", "log_ratio", "seconds")
COSTS = ("extra_parameters", "extra_bytes")
AND = " and "
OF_KINDS = ("trained", "betas", "matched", "methods")
"""The facts of a table that are said of each kind, or of its methods."""


def rows_path(results: Path, steps: int, seed: int, kind: str = "") -> Path:
    """Where rows stand, `<results>/<steps>-seed<seed>.csv.gz`, or `...-<kind>.csv.gz` of one kind, with the facts
    about them in `.json` beside it."""
    return results / f"{steps}-seed{seed}{kind and '-'}{kind}.csv.gz"


def facts_path(rows: Path) -> Path:
    return rows.with_name(rows.name.removesuffix(".csv.gz") + ".json")


def write_piece(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Writes the table of a piece, the facts last, so that a table with facts is whole.

    Args:
        path (`Path`): From [`rows_path`].
        rows (`Sequence[Mapping]`): Of `trl_parm.evaluation.evaluate`.
        facts (`Mapping`): With `objectives` and whatever else is to be known of it.
    """
    numbers: dict[str, int] = {}
    methods = {row["method"]: {name: row[name] for name in COSTS} for row in rows}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEAD, *facts["objectives"], *MEASURED])
    for row in rows:
        number = numbers.setdefault(json.dumps(row["prompt"]), len(numbers))
        weights = "" if row["preference"] is None else " ".join(f"{weight:g}" for weight in row["preference"])
        repeated = repetition(row["response"])
        found = {**row, "capped": int(row["capped"]), "repetition": "" if repeated is None else repeated}
        values = [_short(found[name]) for name in (*facts["objectives"], *MEASURED)]
        writer.writerow([row["method"], weights, number, *values])
    _write(path, text.getvalue(), {**facts, "methods": methods})


def join_pieces(path: Path, parts: Sequence[Path]) -> None:
    """Puts the tables of several kinds into one and removes them, once all are there; does nothing before.

    Args:
        path (`Path`): Of the table of all, from [`rows_path`].
        parts (`Sequence[Path]`): Of the single ones, of which the first may be `path` itself, with fewer kinds.

    Raises:
        ValueError: the parts are of different runs.
    """
    if not all(facts_path(part).exists() for part in parts):
        return
    every = [read_facts(part) for part in parts]
    for part, facts in zip(parts, every):
        for key in set(every[0]) - {*OF_KINDS, "versions"}:
            if facts[key] != every[0][key]:
                raise ValueError(f"{parts[0].name} and {part.name} have different {key}. Run one of them again.")
    merged = {key: {k: v for facts in every for k, v in facts[key].items()} for key in OF_KINDS}
    tables = [gzip.decompress(part.read_bytes()).decode().splitlines(keepends=True) for part in parts]
    text = "".join(tables[0][:1])
    for table, facts in zip(tables, every):
        # No more than the facts tell of: a stop may have come between the two files of an earlier join.
        text += "".join(line for line in table[1:] if next(csv.reader([line]))[0] in facts["methods"])
    merged["versions"] = joined_versions([facts["versions"] for facts in every])
    # A table among the parts was looked at, whoever has written it, as the published ones of a clone.
    _write(path, text, {**every[0], **merged}, None if path in parts else WRITER)
    for part in parts:
        if part != path:
            facts_path(part).unlink()
            part.unlink()


def joined_versions(every: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The versions of several tables, of which some may be of several already: each once."""
    found: dict[str, dict[str, None]] = {}
    for versions in every:
        for name, known in versions.items():
            found.setdefault(name, {}).update(dict.fromkeys(known.split(AND)))
    return {name: AND.join(sorted(known)) for name, known in found.items()}


def _write(path: Path, text: str, facts: Mapping[str, Any], writer: str | None = WRITER) -> None:
    with output_file(path, writer, binary=True) as file:
        file.write(gzip.compress(text.encode(), mtime=0))
    with output_file(facts_path(path), writer) as file:
        json.dump(facts, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_facts(path: Path) -> dict[str, Any]:
    return json.loads(facts_path(path).read_text(encoding="utf-8"))


def kinds_of(path: Path) -> set[str]:
    """The kinds whose methods are in a table; none where there is no table."""
    return set(read_facts(path)["trained"]) if facts_path(path).exists() else set()


def read_piece(path: Path) -> list[dict[str, Any]]:
    """The rows of a piece, as [`trl_parm.evaluation.arrange`] takes them. Raises `ValueError` for a damaged file."""
    facts = read_facts(path)
    objectives = facts["objectives"]
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
        preferences = {text: _preference(text, objectives) for text in {row["preference"] for row in found}}
        return [_row(row, preferences[row["preference"]], objectives, facts) for row in found]
    except (EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole file of results: {error!r}. Take it from where it was made.") from error


def _preference(text: str, objectives: Sequence[str]) -> dict[str, Any]:
    weights = [float(weight) for weight in text.split()] or None
    label = "-" if weights is None else name_preference(weights, list(objectives), True)
    return {"preference": weights, "label": label}


def _row(
    row: Mapping[str, str], preference: Mapping[str, Any], objectives: Sequence[str], facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "method": row["method"],
        **preference,
        "prompt": f"{facts['prompts']}:{row['prompt']}",
        "response": "",
        **{name: float(row[name]) for name in objectives},
        "tokens": int(row["tokens"]),
        "capped": row["capped"] == "1",
        **{name: float(row[name]) if row[name] else None for name in MEASURED[2:]},
        **facts["methods"][row["method"]],
    }


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value
