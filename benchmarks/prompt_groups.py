# SPDX-License-Identifier: Apache-2.0
"""How much the intervals of the published comparison depend on prompts being taken for independent.

    python benchmarks/prompt_groups.py

Prompts of the tasks `smollm2` and `manners` are templates about topics; training has seen the templates, and none of
the topics. Of PARM's mean inner product of standardised rewards minus another method's, in the mean over training
seeds, this gives the standard error over prompts: of single ones, of topics and of templates, where those of one group
count as one. The scale is that of all prompts. From `benchmarks/results/small` and `examples/data`.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
from common import argument_parser, report


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from comparison.methods import UNTRAINED  # noqa: E402
from comparison.pooled import PARM, Budget  # noqa: E402
from comparison.task import Task  # noqa: E402
from reproduce_small import CONFIGS, PUBLISHED  # noqa: E402

from trl_parm.evaluation import Front  # noqa: E402


TASKS = ("smollm2", "manners")


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    rows = [row for name in TASKS for row in measure(Task.read(CONFIGS / f"{name}.yaml"))]
    report("prompt_groups", rows, ["Times play no part in it."], args.results, args.table)


def measure(task: Task) -> Iterator[dict[str, object]]:
    """The standard errors of a task, for each other method."""
    topics = (ROOT / "examples/data/topics.txt").read_text(encoding="utf-8").splitlines()
    prompts = test_prompts(task)
    of_prompts = [next(topic for topic in sorted(topics, key=len, reverse=True) if topic in text) for text in prompts]
    templates = [text.replace(topic, "{}") for text, topic in zip(prompts, of_prompts)]
    for steps, seeds in task.budgets.items():
        found = Budget.read(PUBLISHED / task.name, steps, seeds, kinds=task.kinds)
        if found is None:
            continue
        own = products(found.scaled[PARM])
        if len(own) != len(prompts):
            raise ValueError(f"The table of {task.name} has {len(own)} prompts, its pairs have {len(prompts)}.")
        for other in (UNTRAINED, *found.compared()):
            values = own - products(found.scaled[other])
            errors = [grouped_error(values, groups) for groups in (range(len(values)), of_prompts, templates)]
            yield {
                "task": task.title,
                "steps": steps,
                "PARM −": other,
                "MIP": f"{values.mean():+.3f}",
                "prompts": len(values),
                "error over prompts": f"{errors[0]:.3f}",
                "by topics": f"{errors[1] / errors[0]:.2f} of it",
                "by templates": f"{errors[2] / errors[0]:.2f} of it",
            }


def test_prompts(task: Task) -> list[str]:
    """The task's prompts, in the order of its tables."""
    with gzip.open(ROOT / f"examples/data/{task.name}_pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = dict.fromkeys(row["prompt"][-1]["content"] for row in rows if row["split"] == "test")
    return list(texts)[: task.test_prompts]


def products(front: Front) -> np.ndarray:
    """The mean inner product of each prompt, over preferences and seeds; a control counts at all objectives alike."""
    k = front.rewards.shape[-1]
    preferences = np.full((1, k), 1 / k) if front.preferences is None else front.preferences
    return (front.rewards * preferences).sum(-1).mean(-1)


def grouped_error(values: np.ndarray, groups: Sequence[Hashable]) -> float:
    """The standard error of a mean whose values scatter by groups, such as clusters of a sample."""
    sums: dict[Hashable, float] = {}
    for group, value in zip(groups, values - values.mean(), strict=True):
        sums[group] = sums.get(group, 0.0) + value
    count = len(sums)
    return float(np.sqrt(count / (count - 1) * np.square(list(sums.values())).sum()) / len(values))


if __name__ == "__main__":
    main()
