# SPDX-License-Identifier: Apache-2.0
"""What is left of PARM's steering when its sharpening is undone by a temperature, or by weaker guidance.

    python benchmarks/sharpening.py [--task smollm2] [--seed 0]

π_base · π_ARM^(1/β) is sharper than either: with an untrained ARM, which says what the base says, it is
π_base^(1 + 1/β). Sampling at the temperature 1 + 1/β undoes that, and what is sampled is a weighted geometric mean of
the two. PARM is trained once, with a task's pairs and settings of `benchmarks/results/small`, and answers the prompts
of the comparison at temperatures from 1 to that one, and with larger β at temperature 1; the untrained control beside
it. The model and the pairs are those of `make reproduce-small`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, report
from prompt_groups import products


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from comparison.methods import BASE, UNTRAINED, decode
from comparison.pooled import PARM
from comparison.settings import Settings
from comparison.task import Task
from reproduce_small import CONFIGS, PUBLISHED

from peft_pblora import preference_grid
from trl_parm.evaluation import arrange, describe_answers, mean_and_error, rank_correlations, standardized


WEAKER = (2, 4)
"""How many times its β PARM has at temperature 1, for comparison."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--task", default="smollm2", help="of examples/configs/small/tasks, with its model and pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--steps", type=int, help="of the training; the task's first budget if not given")
    parser.add_argument("--work", type=Path, default=Path("runs/sharpening"), help="where adapter and answers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task.read(CONFIGS / f"{args.task}.yaml")
    steps = args.steps or min(task.budgets)
    settings = Settings(task, task.settings_of(steps), PUBLISHED / task.name, args.work / task.name)
    training = settings.chosen(["parm"], steps, args.seed, args.work / task.name / f"{steps}-seed{args.seed}")["parm"]
    training.run()
    beta = settings.beta("parm")
    notes = [
        f"{task.title}, {steps} steps, training seed {args.seed}, β {beta:g} unless another is named; "
        f"{task.test_prompts} prompts, sampled from the {task.top_k} likeliest tokens, standardised by the base's "
        "answers. Rank is the least rank correlation of α with its reward. Intervals are standard errors over prompts."
    ]
    report("sharpening", measure(task, training, beta), notes, args.results, args.table)


def measure(task: Task, training: Any, beta: float) -> Iterator[dict[str, object]]:
    """The rows of the table."""
    arm, whole = training.adapter(), 1 + 1 / beta
    prompts = task.prompts("test", task.test_prompts)
    grid = preference_grid(task.objectives, steps=task.grid_steps).tolist()

    def answers(entries: list[Any], temperature: float) -> list[dict[str, Any]]:
        path = training.folder / f"answers-{temperature:.3g}.jsonl"
        rows = decode(task, prompts, grid, entries, path, temperature=temperature)
        return [{**row, "method": f"{row['method']}, temperature {temperature:.3g}"} for row in rows]

    def entry(method: str, name: str, beta: float) -> dict[str, Any]:
        return {"method": method, "name": name, "arm": arm, "beta": beta}

    own = [entry("untrained_arm", UNTRAINED, beta), entry("parm", PARM, beta)]
    rows = answers(["base", *own, *(entry("parm", f"{PARM}, β {n * beta:g}", n * beta) for n in WEAKER)], 1.0)
    for temperature in (math.sqrt(whole), whole):
        rows += answers(own, temperature)
    said = describe_answers(rows)
    for front in standardized(arrange(rows, task.objectives), f"{BASE}, temperature 1", task.objectives):
        like = [row for row in said if row["method"] == front.method]
        mean, error = mean_and_error(products(front).tolist())
        α = front.preferences
        yield {
            "method": front.method,
            "MIP": f"{mean:.2f} ± {error:.2f}",
            "rank": "-" if α is None else f"{rank_correlations(α, front.points).min():.2f}",
            "repeated 4-grams": f"{100 * sum(row['repetition'] for row in like) / len(like):.1f}%",
            "at the worst α": f"{100 * max(row['repetition'] for row in like):.1f}%",
            "log π_base of a token": f"{sum(row['log_prob_base'] for row in like) / len(like):.2f}",
        }


if __name__ == "__main__":
    main()
