# SPDX-License-Identifier: Apache-2.0
"""A task of the small comparison on a random tiny model, and results of it that nothing was trained for."""

import json
from pathlib import Path

import numpy as np
import yaml
from comparison.methods import BASE, UNTRAINED, methods_of
from comparison.results import rows_path, write_piece
from comparison.settings import BETA, RATE, SCALE
from comparison.task import KINDS
from conftest import tiny_llama, tiny_tokenizer

from peft_pblora import name_preference
from trl_parm.records import Records


OBJECTIVES = ["early", "short"]
GRID = [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
FACTS = {
    "task": "tiny", "model": "model", "objectives": OBJECTIVES, "prompts": "p", "pairs": "q", "batch": 4, "steps": 4,
    "agreement": 0.5,
    "betas": {"parm": 1.0}, "max_new_tokens": 6, "top_k": 50,
    "versions": dict.fromkeys(("python", "torch", "transformers", "peft", "trl"), "1"),
}  # fmt: skip


def early(prompts, responses):
    """More for words of low numbers."""
    return [
        -sum(int(digits) for word in r.split("w") if (digits := word.strip(" .")).isdigit()) / 58 for r in responses
    ]


def short(prompts, responses):
    """Minus the number of letters."""
    return [-float(len(response)) for response in responses]


def write_task(folder: Path, **changes) -> Path:
    """A model, pairs and the configuration `tasks/tiny.yaml`, which is returned."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    sizes = {"train": 12, "validation": 3, "test": 4}
    splits = [split for split, size in sizes.items() for _ in range(size)]
    rows = [
        {"prompt": f"w{i} w3", "response_0": f" w{i % 7} w2 w1", "response_1": f" w{i % 5 + 20}", "split": split,
         "early": i % 2, "short": 1 - (i // 2) % 2}
        for i, split in enumerate(splits)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "tiny", "title": "Tiny", "model": str(folder / "model"), "pairs": str(folder / "pairs.jsonl"),
        "rewards": {name: f"small_task:{name}" for name in OBJECTIVES}, "budgets": {4: [0]}, "settings_steps": 2,
        "settings_seeds": {steps: [7] for steps in (2, 4, 8)}, "scales": [1.0], "rates": [0.01], "betas": [1.0],
        "validation_pairs": 3, "diagnosis_pairs": 2, "validation_prompts": 3, "test_prompts": 4, "grid_steps": 2,
        "batch": 2, "max_new_tokens": 6,
    }  # fmt: skip
    (folder / "tasks").mkdir(exist_ok=True)
    path = folder / "tasks" / "tiny.yaml"
    path.write_text(yaml.safe_dump({**task, **changes}))
    return path


def write_results(results: Path, seeds, lead=0.0, steps: int = 4, prompts: int = 12, kinds=KINDS, **facts) -> None:
    """Pieces whose methods follow the preference, GenARM by `lead` more than the others, in both rewards."""
    for seed in seeds:
        rng = np.random.default_rng([seed, steps])
        answers = np.random.default_rng(7).normal(size=(prompts, 2))  # the same of all methods
        rows = []
        for name in (BASE, UNTRAINED, *(method.title for method in methods_of(kinds).values())):
            guided = name not in (BASE, UNTRAINED)
            for α in GRID if guided else [None]:
                gain = np.array([1 + 0.5 * weight for weight in α]) if guided else np.zeros(2)
                gain = gain + (lead if name == "GenARM" else 0.0) + (rng.normal(scale=0.02, size=2) if guided else 0)
                rows += [_row(name, α, i, values + gain) for i, values in enumerate(answers)]
        metrics = {"vertex_correlation": 0.5, "early_gain": 0.1, "short_gain": 0.2}
        trained = {kind: {"metrics": metrics, "seconds": 60.0} for kind in kinds}
        write_piece(rows_path(results, steps, seed), rows, {**FACTS, "seed": seed, "trained": trained, **facts})


def write_settings(results: Path, rates=(1, 2, 3), losses=(2.0, 1.0, 2.0), steps: int = 2, kinds=KINDS) -> None:
    """What was tried, with the best in the middle."""
    with Records(results / f"settings-{steps}.jsonl", {}) as kept:
        for kind in kinds:
            kept.append([{"what": SCALE, "of": kind, "at": at, "seed": 7, "value": at} for at in (1, 4)])
            kept.append([{"what": RATE, "of": kind, "at": at, "seed": 7, "value": v} for at, v in zip(rates, losses)])
        for name in methods_of(kinds):
            kept.append(
                [
                    {"what": BETA, "of": name, "at": at, "seed": 7, "value": -1.0, "error": 0.0, "kl": 1 / at}
                    for at in (0.5, 1.0)
                ]
            )


def _row(method, preference, number, values) -> dict:
    return {
        "method": method, "preference": preference, "prompt": f"prompt {number}", "response": "a b c d e",
        "label": "-" if preference is None else name_preference(preference, OBJECTIVES),
        **dict(zip(OBJECTIVES, values.tolist())), "tokens": 5, "capped": False, "log_prob_base": -5.0,
        "log_ratio": 0.0 if method == BASE else 2.0, "seconds": 0.1, "extra_parameters": 20 if "Gen" in method else 10,
        "extra_bytes": 40,
    }  # fmt: skip
