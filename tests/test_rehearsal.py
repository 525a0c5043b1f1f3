# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments from relabelling to figures, as their configurations say it, in miniature on a CPU.

Flags stand in for size alone: fewer pairs and tokens, one step of training, no GPU. Everything else is the file's.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rehearsal import make_world

from trl_parm.records import read_rows


pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "examples/configs"
TRAIN = (
    "--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--gradient_accumulation_steps", "1",
    "--per_device_train_batch_size", "2", "--warmup_steps", "0", "--logging_steps", "1", "--save_steps", "2",
)  # fmt: skip
RELABEL = ("--validation_size", "8", "--test_size", "8", "--batch_size", "8")
EVALUATE = ("--max_new_tokens", "4", "--num_prompts", "4", "--batch_size", "32", "--optimize_for_cpu", "false")
EXPERIMENTS = {
    "safety_7b": (
        ["relabel", "parm", "genarm_harmless", "genarm_helpful", "dpo_harmless", "dpo_helpful", "evaluate", "plot"],
        2 + 6 * 11,
    ),
    "safety_65b": (["evaluate", "plot"], 2 + 5 * 11),
    "ablation": (["pblora_0_8", "svd_lora", "evaluate", "plot"], 2 + 3 * 11),
    "assistant": (
        ["relabel", "parm"]
        + [f"{kind}_{name}" for kind in ("genarm", "dpo") for name in ("helpful", "harmless", "humor")]
        + ["evaluate", "plot"],
        2 + 4 * 13,
    ),
    "tulu": (["parm", "uniarm", "evaluate", "plot"], 2 + 2 * 13),
}
"""Experiment → its files in their order, and the runs of its table. Later ones read what earlier ones have written."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("rehearsal"))


def call(world, experiment: str, step: str) -> None:
    path = str(CONFIGS / experiment / f"{step}.yaml")
    module, verb, flags = "trl_parm", [step.split("_")[0]], ()
    if step == "relabel":
        flags = (*RELABEL, *(("--data", '{"path": "trl-lib/hh-rlhf-helpful-base", "split": "train[:30]"}')
                             if experiment == "assistant" else ()))  # fmt: skip
    elif step == "evaluate":
        flags = (*EVALUATE, *(("--dtype", "float32", "--model_kwargs", "{}") if experiment == "safety_65b" else ()))
    elif step.startswith("dpo_"):
        module, verb, flags = "trl.cli", ["dpo"], TRAIN
    elif step != "plot":
        verb, flags = ["train"], (*TRAIN, "--per_device_eval_batch_size", "4")
    if module == "trl.cli":
        command = [sys.executable, "-m", "trl.scripts.dpo", "--config", path, *flags]
    else:
        command = [sys.executable, "-m", module, *verb, "--config", path, *flags]
    environment = {
        **os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "TRL_PARM_TRACEBACK": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=world.folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{experiment}/{step}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_from_its_data_to_its_figures(world, experiment):
    steps, runs = EXPERIMENTS[experiment]
    for step in steps:
        call(world, experiment, step)
    rows = read_rows(world.folder / f"runs/{experiment}/results/results.jsonl")
    assert len(rows) == 4 * runs
    assert all(row["tokens"] >= 1 for row in rows)
    with (world.folder / f"runs/{experiment}/figures/measures.csv").open() as file:
        measured = {row["measure"] for row in csv.DictReader(file)}
    assert {"hypervolume", "mean inner product"} <= measured
    assert list((world.folder / f"runs/{experiment}/figures").glob("*.png"))
