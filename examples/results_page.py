# SPDX-License-Identifier: Apache-2.0
"""The page of `docs/results.md`: what `reproduce_small.py` found, and what holds, worked out from its tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_pblora.output import output_folder
from trl_parm.evaluation.fronts import summarize
from trl_parm.evaluation.measures import markdown, with_error
from trl_parm.records import read_rows


AGAINST = "PARM"
UPPER_BOUNDS = ("ARGS", "Transfer-Q")
STEERED = 0.9
"""A correlation of rank that five points in random order reach in 5 of 120 orders."""
VERSIONS = ("python", "torch", "transformers", "peft", "trl")

INTRODUCTION = """# Results on two cores

All methods on the same prompts, with the same training pairs and the same budget. `make reproduce-small` trains,
evaluates and writes this page; every sentence under "What holds" is worked out from the tables. A language model of
135 million parameters and two rewards that need no model (`positive`: VADER's compound sentiment; `concise`: minus the
mean number of words in a sentence) make a small and easy test: it shows whether methods steer, not how well they would
steer a large model towards helpful and harmless answers."""

SETTINGS = """- **Model**: SmolLM2-135M-Instruct, frozen, float32; it is also the backbone of all reward models and
  policies.
- **Pairs**: {pairs} of its own answers, labelled for both objectives, about topics that no evaluation prompt is about.
- **Budget**: {steps} steps of {batch} pairs for each method: {steps} for the one adapter of PARM, SVD-LoRA and UniARM,
  {share} for each objective's of GenARM and DPO. Adapters have rank 8 and lie on the attention's q, k and v.
- **Learning rates and β**: for each method those of the front with the largest hypervolume above (positive 0,
  concise -40) on {validation} prompts that no training pair has, of {tried} combinations: {chosen}.
  Rewarded Soups and MOD have no β. ARGS (w 1.5, k 10) and Transfer-Q (w 1, k 4, rollouts of 8 tokens) are not tuned.
- **Evaluation**: {prompts} prompts, five preferences, 40 new tokens sampled from the 50 likeliest; seed {seed}, the
  same noise for each prompt in all runs. The scorers that judge are those that labelled the pairs, no reward model.
- **Versions**: {versions}."""

CONTROLS = """ARGS and Transfer-Q search with the very scorers that judge, which a user of a reward model does not
have: they are upper bounds for search, not rivals. The untrained ARM multiplies the base model with the ARM's
backbone, which sharpens it without any preference."""

LIMITS = """## What this does not show

One seed of training for each method, one small model, {prompts} prompts, and rewards that short happy phrases satisfy.
The intervals are over prompts, so they do not contain what another training run would change. Two settings were
changed after evaluations on the same prompts: PARM, SVD-LoRA and UniARM got the budget of the others, 100 steps for
50, and UniARM's objectives got embeddings, without which it did not follow the preference. Three learning rates and
three β are a coarse choice, made on few prompts. With few prompts hypervolume is biased upwards, more so for methods
with noisier points. Times are those of a shared machine with two cores; [decoding](decoding.md) has paired
measurements."""


def write_page(folder: Path, page: Path, settings: Mapping[str, Mapping[str, float]]) -> None:
    """Writes `results.md` and its figure into `page`, from the tables that `trl-parm plot` left in `folder`."""
    search = [row for row in _table(folder / "figures_transfer_q" / "measures.csv") if row["measure"] == "hypervolume"]
    figures = folder / "figures"
    lines = [steering(_table(figures / "correlations.csv")), *findings(_table(figures / "differences.csv"))]
    sections = [
        INTRODUCTION,
        settings_text(folder, settings),
        "![Mean rewards of all methods at five preferences](images/results.png)",
        CONTROLS,
        "## What holds\n\n" + "\n".join(f"- {line}" for line in lines),
        "## Mean rewards\n\n" + rewards_text(folder / "results" / "results.jsonl"),
        (figures / "measures.md").read_text().strip(),
        f"## With Transfer-Q\n\nTransfer-Q was run on {search[0]['prompts']} of the prompts, beside these methods.",
        (folder / "figures_transfer_q" / "measures.md").read_text().strip(),
        LIMITS.format(prompts=_run(folder / "results")["num_prompts"]),
    ]
    with output_folder(page, "results_page.py") as staging:
        (staging / "images").mkdir()
        (staging / "images" / "results.png").write_bytes((figures / "fronts.png").read_bytes())
        (staging / "results.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def settings_text(folder: Path, settings: Mapping[str, Mapping[str, float]]) -> str:
    """What was run, from the files that the commands wrote beside their results."""
    evaluated = _run(folder / "results")
    trained = _run(folder / f"parm-{settings['parm']['rate']:g}")
    versions = yaml.safe_load((folder / "results" / "run.yaml").read_text())["versions"]
    return SETTINGS.format(
        pairs=len((folder / "pairs" / "train.jsonl").read_text().splitlines()),
        steps=trained["max_steps"],
        share=_run(folder / f"genarm_positive-{settings['genarm']['rate']:g}")["max_steps"],
        batch=trained["per_device_train_batch_size"],
        tried=len(json.loads((folder / "validation.json").read_text())),
        chosen=", ".join(label(method, setting) for method, setting in settings.items()),
        validation=_run(folder / "validation")["num_prompts"],
        prompts=evaluated["num_prompts"],
        seed=evaluated["seed"],
        versions=", ".join(f"{name} {versions[name]}" for name in VERSIONS),
    )


def label(method: str, setting: Mapping[str, float]) -> str:
    """A method with its settings, in words."""
    return " ".join([method, *(f"{name} {value:g}" for name, value in setting.items())])


def steering(correlations: Sequence[Mapping[str, str]]) -> str:
    """Which methods move each reward with the weight of its objective."""
    objectives = [name for name in correlations[0] if name != "method"]
    moved: dict[str, list[str]] = {}
    for row in correlations:
        names = [name for name in objectives if float(row[name]) > STEERED - 1e-6]
        moved.setdefault(" and ".join(names) or "none", []).append(row["method"])
    return (
        f"**Steering**: rewards whose correlation of rank with their objective's weight is at least {STEERED}, which "
        f"five points in random order reach in 5 of 120 orders: "
        + "; ".join(f"{names}: {', '.join(methods)}" for names, methods in moved.items())
        + "."
    )


def findings(differences: Sequence[Mapping[str, str]]) -> list[str]:
    """For each measure, which methods are above PARM, below it, or not told apart from it by 95 % intervals."""
    lines = []
    for measure, reference in dict.fromkeys((row["measure"], row["reference"]) for row in differences):
        rows = [row for row in differences if (row["measure"], row["reference"]) == (measure, reference)]
        above = f" above ({reference})" if measure.startswith("hypervolume") else ""
        parts = []
        for verdict, chosen in _by_verdict(rows).items():
            if chosen:
                parts.append(f"{verdict} " + ", ".join(f"{row['method']} ({_interval(row)})" for row in chosen))
        lines.append(f"**{measure.capitalize()}{above}**, relative to {AGAINST}: " + "; ".join(parts) + ".")
    return lines


def rewards_text(results: Path) -> str:
    """Mean rewards of every run as a Markdown table."""
    objectives = json.loads(results.with_name("results.config.json").read_text())["objectives"]
    rows = [
        {
            "method": row["method"] + (" (upper bound)" if row["method"] in UPPER_BOUNDS else ""),
            f"preference ({', '.join(objectives)})": (
                "-" if row["preference"] is None else ", ".join(f"{weight:.2f}" for weight in row["preference"])
            ),
            **{name: with_error(row[name], row[f"{name}_error"], (".2f", ".2f")) for name in objectives},
        }
        for row in summarize(read_rows(results), objectives)
    ]
    return "Mean ± standard error over prompts.\n\n" + markdown(rows)


def _by_verdict(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    verdicts: dict[str, list[Mapping[str, str]]] = {"lower:": [], "not told apart:": [], "higher:": []}
    for row in rows:
        verdict = (
            "not told apart:" if row["differs"] == "False" else "lower:" if float(row["value"]) < 0 else "higher:"
        )
        verdicts[verdict].append(row)
    return verdicts


def _interval(row: Mapping[str, str]) -> str:
    value, low, high = (float(row[key]) for key in ("value", "low", "high"))
    return f"{value:+.2f} [{low:.2f}, {high:.2f}]"


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _run(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "run.yaml").read_text())["arguments"]
