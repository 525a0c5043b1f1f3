# SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-parm[eval]"]
# ///
"""All decoders on one set of prompts, side by side, with what `make demo` leaves in `runs/`.

    python examples/compare_decoders.py                       # a table; Transfer-Q takes most of the time
    python examples/compare_decoders.py --show-responses --prompts "Tell me about tea." "What is rain?"

GenARM, MOD, MOD-w2s and Rewarded Soups want a model for each objective. There is one adapter for all of them here, so
they get it at its vertices, exported as plain LoRAs: the rows differ in how they decode, not in how they were trained.
With the base model as its reference MOD-w2s is MOD. To compare methods that were each trained for themselves, see
`make reproduce-small`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peft_pblora import get_objectives, preference_grid, save_as_lora
from trl_parm.evaluation import arrange, costs, summarize
from trl_parm.evaluation.evaluate import Entry, evaluate
from trl_parm.evaluation.measures import with_error
from trl_parm.evaluation.models import Models
from trl_parm.rewards import conciseness, positivity


MODEL, ARM = "runs/models/smollm2-135m-instruct", "runs/demo/arm"
REWARDS = {"positive": positivity, "concise": conciseness}
PROMPTS = [
    "What do you think about a rainy Monday?",
    "Give me one piece of advice about moving house.",
    "Write a text message about a late train.",
    "How should I feel about a lost umbrella?",
]


def main(argv: Sequence[str] | None = None) -> Any:
    """Prints the table, and returns the one that it sums up, see [`trl_parm.evaluation.sweep`]."""
    args = parse_args(argv)
    logging.set_verbosity_error()
    for folder in (args.model, args.arm):
        if not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}. Run `make demo` first, or name others.")
    with tempfile.TemporaryDirectory() as folder:
        objectives, vertices = export_vertices(args.model, args.arm, Path(folder))
        if objectives != list(REWARDS):
            raise ValueError(
                f"{args.arm} is for {', '.join(objectives)}, but the rewards here are {', '.join(REWARDS)}."
            )
        methods = all_methods(args.model, args.arm, vertices)
        preferences = preference_grid(objectives, steps=args.grid_steps).tolist()
        runs = sum(len(Entry.of(method).runs(preferences)) for method in methods)
        with tqdm(total=runs, desc="Decoding", unit="run", disable=None) as bar:
            table: Any = evaluate(
                Models(args.model, "float32"),  # a CPU without units for bfloat16 takes many times as long with it
                methods,
                preferences,
                args.prompts,
                REWARDS,
                path=None,
                batch_size=len(args.prompts),
                on_batch=lambda run: bar.update(),
                max_new_tokens=args.max_new_tokens,
            )
    show(table, objectives)
    if args.show_responses:
        show_responses(table, args.prompts[0])
    return table


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder of the frozen base model")
    parser.add_argument("--arm", default=ARM, help="folder of an adapter for the objectives positive and concise")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--grid-steps", type=int, default=2, help="steps between the vertices; 2 gives 3 preferences")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--show-responses", action="store_true", help="print all answers to the first prompt")
    return parser.parse_args(argv)


def export_vertices(model: str, arm: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The adapter's objectives, and for each the folder of a plain LoRA that is the adapter with all weight on it."""
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), arm)
    adapter.peft_config["default"].base_model_name_or_path = model  # wherever it was trained
    objectives = get_objectives(adapter)
    folders = save_as_lora(adapter, folder, torch.eye(len(objectives)))
    return objectives, dict(zip(objectives, map(str, folders), strict=True))


def all_methods(model: str, arm: str, vertices: dict[str, str]) -> list[dict[str, Any]]:
    """One entry for each decoder, as it would stand in the YAML of `trl-parm evaluate`."""
    first = next(iter(vertices.values()))
    rewards = {name: f"{reward.__module__}:{reward.__name__}" for name, reward in REWARDS.items()}
    return [
        {"method": "base"},
        {"method": "untrained_arm", "arm": arm},
        {"method": "parm", "arm": arm},
        {"method": "genarm", "arms": vertices},
        {"method": "mod", "policies": vertices},
        {"method": "mod_w2s", "policies": vertices, "reference": model},
        {"method": "rewarded_soups", "policies": vertices},
        {"method": "args", "rewards": rewards, "k": 4},
        {"method": "transfer_q", "rewards": rewards, "policy": first, "k": 4, "rollout_tokens": 8},
    ]


def show(table: Any, objectives: list[str]) -> None:
    """Prints mean rewards with their standard errors, and the time of a token relative to the base model's."""
    time = {row["method"]: row["relative_to_base"] for row in costs(arrange(table, objectives), "Base")}
    printed = Table(title="Mean reward ± standard error over the prompts; higher is better")
    for column in ("method", "preference", *objectives, "time / base"):
        printed.add_column(column, no_wrap=column in ("method", "preference"))
    for row in summarize(table, objectives):
        weights = "-" if row["preference"] is None else ", ".join(f"{w:.2f}" for w in row["preference"])
        rewards = [with_error(row[name], row[f"{name}_error"], (".2f", ".2f")) for name in objectives]
        printed.add_row(row["method"], weights, *rewards, f"{time[row['method']]:.1f}")
    Console(width=100).print(printed)


def show_responses(table: Any, prompt: str) -> None:
    """Prints the answers of all methods to one prompt."""
    printed = Table(title=f"“{prompt}”", show_lines=True)
    for column in ("method", "preference", "answer"):
        printed.add_column(column)
    for row in table:
        if row["prompt"] == prompt:
            printed.add_row(row["method"], row["label"], " ".join(row["response"].split()))
    Console(width=100).print(printed)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
