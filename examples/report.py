# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: tables, claims with their standard errors, the figure, and responses side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from peft_pblora import add_results
from trl_parm.evaluation import hypervolume, mean_and_error, mean_inner_product, plot_front, summarize
from trl_parm.evaluation.measures import with_error


CONTROL = "base, sharpened"
FORMS = (".2f", ".2f")


def print_accuracies(metrics: Mapping[str, float], objectives: Sequence[str]) -> None:
    """Held-out accuracy of each objective at each vertex, raw and relative to the untrained reward model."""
    table = Table(title="Held-out pair accuracy: raw (relative to the untrained reward model)")
    table.add_column("objective")
    for vertex in objectives:
        table.add_column(f"at {vertex} = 1")
    for objective in objectives:
        cells = [
            f"{metrics[f'eval_{objective}_accuracy@{vertex}']:.2f} "
            f"({metrics[f'eval_{objective}_ratio_accuracy@{vertex}']:.2f})"
            for vertex in objectives
        ]
        table.add_row(objective, *cells)
    Console().print(table)


def write_report(table: Dataset, objectives: Sequence[str], reference: Sequence[float], folder: Path) -> None:
    """Prints the results and writes them into `folder`, and into the card of the adapter there."""
    summary = summarize(table, objectives)
    front = [row for row in summary if row["method"] == "PARM"]
    points = [[row[name] for name in objectives] for row in front]
    measures = {
        "hypervolume": hypervolume(points, reference),
        "reference_point": dict(zip(objectives, reference)),
        "mean_inner_product": mean_inner_product([row["preference"] for row in front], points),
        "claims": claims(table, objectives),
    }
    table.to_json(folder / "responses.jsonl", force_ascii=False)
    (folder / "measures.json").write_text(json.dumps(measures, indent=2) + "\n", encoding="utf-8")
    plot_front(summary, objectives, folder / "pareto.png", reference)
    above = ", ".join(f"{name} {value:g}" for name, value in measures["reference_point"].items())
    rows = [
        ["measure", "value"],
        [f"hypervolume above ({above})", round(measures["hypervolume"], 2)],
        ["mean inner product", round(measures["mean_inner_product"], 2)],
    ]
    add_results(folder / "arm", rows, folder / "pareto.png")
    text = "\n\n".join([table_text(summary, objectives), measures_text(measures), samples_text(table, objectives)])
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def claims(table: Dataset, objectives: Sequence[str]) -> list[dict]:
    """Whether reward i at e_i exceeds its value at the other vertices, and at the control, by two standard errors.

    Responses of two runs to one prompt are compared with each other, so the error is that of the paired difference; of
    one prompt there is none.
    """
    values = {
        (row["method"] if row["preference"] is None else row["label"], name, row["prompt"]): row[name]
        for row in table
        for name in objectives
    }
    prompts = sorted(set(table["prompt"]))
    found = []
    for name in objectives:
        for other in [*(o for o in objectives if o != name), CONTROL]:
            gain, error = mean_and_error([values[name, name, p] - values[other, name, p] for p in prompts])
            known = {} if math.isnan(error) else {"standard_error": error, "holds": gain > 2 * error}
            found.append({"reward": name, "over": other, "gain": gain, **known})
    return found


def table_text(summary: Sequence[Mapping], objectives: Sequence[str]) -> str:
    """The results as a Markdown table."""
    lines = [
        f"| method | preference ({', '.join(objectives)}) | " + " | ".join(objectives) + " |",
        "|---" * (2 + len(objectives)) + "|",
    ]
    for row in summary:
        weights = "-" if row["preference"] is None else ", ".join(f"{w:.2f}" for w in row["preference"])
        cells = [with_error(row[name], row[f"{name}_error"], FORMS) for name in objectives]
        lines.append(f"| {row['method']} | {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measures_text(measures: Mapping) -> str:
    """Hypervolume, mean inner product, and what holds and what does not."""
    reference = ", ".join(f"{name} {value:g}" for name, value in measures["reference_point"].items())
    lines = [
        f"Hypervolume {measures['hypervolume']:.2f} above the reference point ({reference}); "
        f"mean inner product {measures['mean_inner_product']:.2f}."
    ]
    for claim in measures["claims"]:
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "can't be told"}[claim.get("holds")]
        gain = with_error(claim["gain"], claim.get("standard_error", math.nan), FORMS)
        lines.append(
            f"- {claim['reward']} at {claim['reward']} = 1 exceeds its value at {claim['over']}"
            f"{'' if claim['over'] == CONTROL else ' = 1'} by {gain}: "
            f"more than two standard errors {verdict}."
        )
    return "\n".join(lines)


def samples_text(table: Dataset, objectives: Sequence[str]) -> str:
    """Responses to one prompt at the two ends and the middle of the front."""
    prompt = table["prompt"][0]
    rows = {row["label"]: row for row in table if row["prompt"] == prompt and row["preference"] is not None}
    lines = [f"“{prompt}”", "", "| " + " | ".join([objectives[0], "uniform", objectives[1]]) + " |", "|---|---|---|"]
    texts = [" ".join(rows[label]["response"].split()) for label in (objectives[0], "uniform", objectives[1])]
    return "\n".join([*lines, "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"])
