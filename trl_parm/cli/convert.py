# SPDX-License-Identifier: Apache-2.0
"""`trl-parm convert`: responses of an evaluation as AlpacaEval reads them, or as a data set for the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trl_parm.arguments import option, parse, required

from .common import say


@dataclass
class ConvertArguments:
    """Arguments of `trl-parm convert`."""

    results: str = option("", "What evaluate, or generate, has written.")
    format: str = option("", "alpaca_eval: instruction, output, generator in JSON; dataset: Parquet with a card.")
    output_dir: str = option("", "Where it goes.")
    methods: list[str] | None = option(None, "Names of methods; all if not given.")

    def __post_init__(self) -> None:
        required(self, "results", "format", "output_dir")


def main(argv: list[str]) -> None:
    arguments: ConvertArguments = parse("convert", ConvertArguments, argv, __doc__)
    from trl_parm.evaluation.formats import FORMATS, alpaca_eval_files, dataset_folder
    from trl_parm.records import read_configuration, read_rows

    if arguments.format not in FORMATS:
        raise ValueError(f"`format` is {arguments.format!r}, but it must be one of {', '.join(FORMATS)}.")
    rows, configuration = read_rows(arguments.results), read_configuration(arguments.results)
    names = list(dict.fromkeys(row["method"] for row in rows))
    unknown = [name for name in arguments.methods or () if name not in names]
    if unknown:
        raise ValueError(f"The results have no method {unknown[0]!r}; they have {', '.join(names)}.")
    rows = [row for row in rows if row["method"] in (arguments.methods or names)]
    objectives, folder = configuration["objectives"], Path(arguments.output_dir)
    if arguments.format == "dataset":
        dataset_folder(rows, objectives, configuration, folder)
        say(f'{len(rows)} rows in {folder}: load_dataset("{folder}", split="test") reads them, and has push_to_hub.')
        return
    for name, path in alpaca_eval_files(rows, objectives, folder).items():
        say(f"{name}: alpaca_eval --model_outputs '{path}'")
