# SPDX-License-Identifier: Apache-2.0
"""A table of results as others read it: AlpacaEval's model outputs, and a data set for the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_pblora.output import file_name, output_files, output_folder
from trl_parm.texts import as_text

from .answers import with_all_columns


WRITER = "trl-parm convert"
FORMATS = ("alpaca_eval", "dataset")


def generator_name(method: str, preference: Sequence[float] | None, objectives: Sequence[str]) -> str:
    """One name for a method at a preference, such as `PARM helpful=0.7 harmless=0.3`."""
    weights = [] if preference is None else [f"{o}={w:g}" for o, w in zip(objectives, preference, strict=True)]
    return " ".join([method, *weights])


def alpaca_eval_files(
    table: Iterable[Mapping[str, Any]], objectives: Sequence[str], folder: str | Path
) -> dict[str, Path]:
    """Writes responses as AlpacaEval reads them with `--model_outputs`: a JSON list for each method and preference.

    An entry has `instruction`, `output` and `generator`. A conversation becomes one text, as [`as_text`] has it.

    Args:
        table (`Iterable[Mapping]`): The rows of [`sweep`], or of its file.
        objectives (`Sequence[str]`): In the order of the preferences.
        folder (`str` or `Path`): Where the files go.

    Returns:
        `dict[str, Path]`: Generator → file.

    Raises:
        ValueError: a file in the place of one of these that was not written here.
    """
    outputs: dict[str, list[dict[str, str]]] = {}
    for row in table:
        name = generator_name(row["method"], row["preference"], objectives)
        entry = {"instruction": as_text(row["prompt"]), "output": row["response"], "generator": name}
        outputs.setdefault(name, []).append(entry)
    files = {name: Path(folder) / f"{file_name(name)}.json" for name in outputs}
    with output_files(folder, WRITER) as new:
        for name, path in files.items():
            (new / path.name).write_text(json.dumps(outputs[name], ensure_ascii=False, indent=1), encoding="utf-8")
    return files


def dataset_folder(
    table: Iterable[Mapping[str, Any]], objectives: Sequence[str], configuration: Mapping[str, Any], folder: str | Path
) -> Dataset:
    """Writes a table as a folder that `load_dataset` reads and the Hub shows: Parquet, and a card with the record of
    the run.

    `load_dataset(folder, split="test").push_to_hub(name)` uploads the rows, `hf upload` the folder with its card.

    Args:
        table (`Iterable[Mapping]`): The rows of [`sweep`], or of its file.
        objectives (`Sequence[str]`): In the order of the preferences, which are a column each, `α <objective>`, too.
        configuration (`Mapping`): What the rows depend on, as it stands beside the file.
        folder (`str` or `Path`): Where to write; an older one that was written here is replaced.

    Returns:
        `datasets.Dataset`: What was written.

    Raises:
        ValueError: something else in the place of the folder.
    """
    rows = []
    for row in with_all_columns(table):
        weights = [None] * len(objectives) if row["preference"] is None else row["preference"]
        rows.append({**row, **{f"α {name}": weight for name, weight in zip(objectives, weights, strict=True)}})
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    with output_folder(folder, WRITER) as new:
        data.to_parquet(str(new / "results.parquet"))
        (new / "README.md").write_text(_card(rows, objectives, configuration), encoding="utf-8")
    return data


def _card(rows: Sequence[Mapping[str, Any]], objectives: Sequence[str], configuration: Mapping[str, Any]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    record = json.dumps(configuration, ensure_ascii=False, indent=1).replace("```", "'''")
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: results.parquet\n"
        "tags:\n- trl-parm\n---\n\n# Responses at preferences\n\n"
        f"{len(rows)} responses of {len(methods)} methods, scored for {', '.join(objectives)}; higher is better. A "
        "row is a method's response to a prompt at a preference, with a weight for each objective, or null for a "
        "control. `trl-parm evaluate` has written them.\n\n"
        f"What the rows depend on:\n\n```json\n{record}\n```\n"
    )
