# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods on two CPU cores: the configurations of `configs/small`, one after the other.

    python examples/reproduce_small.py      # or `make reproduce-small`; about two hours

Trains everything on the same pairs with the same budget, chooses a learning rate for each training run and a β for
each guided method, evaluates all methods on the same prompts, and writes `docs/results.md`. What is complete is not
done again, so that a run that was stopped goes on; delete `runs/small` to begin anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from results_page import write_page
from smollm2 import smollm2

from trl_parm.evaluation import hypervolume
from trl_parm.evaluation.fronts import summarize
from trl_parm.records import read_rows


CONFIGS, FOLDER = Path(__file__).parent / "configs" / "small", Path("runs/small")
OBJECTIVES = ["positive", "concise"]
REWARD_MODELS = ["parm", "svd_lora", "uniarm", "genarm_positive", "genarm_concise"]
POLICIES = ["dpo_positive", "dpo_concise"]
LEARNING_RATES = [2e-3, 1e-2]
BETAS = [0.5, 1.0, 2.0]
GUIDED = ["parm", "svd_lora", "uniarm", "genarm"]
REFERENCE = [0.0, -40.0]


def main() -> None:
    smollm2()
    run("trl_parm", "relabel", "--config", CONFIGS / "relabel.yaml")
    rates = {name: train_at_best_rate(name) for name in REWARD_MODELS + POLICIES}
    betas = choose_betas()
    for name in ("evaluate", "evaluate_transfer_q"):
        run("trl_parm", "evaluate", "--config", with_betas(CONFIGS / f"{name}.yaml", betas))
    for name in ("plot", "plot_transfer_q"):
        run("trl_parm", "plot", "--config", CONFIGS / f"{name}.yaml")
    write_page(FOLDER, Path("docs"), rates, betas)


def train_at_best_rate(name: str) -> float:
    """Trains at each learning rate, keeps the run with the lowest loss in its last third, and returns its rate.

    There are more pairs than a run reads, so each pair is new when its loss is taken: learning by heart is no help.
    """
    losses = {}
    for rate in LEARNING_RATES:
        folder = FOLDER / "rates" / f"{name}-{rate:g}"
        if not (folder / "adapter_model.safetensors").exists():
            train(name, folder, rate)
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        history = [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]
        losses[rate] = fmean(history[-len(history) // 3 :])
    best = min(losses, key=lambda rate: losses[rate])
    shutil.copytree(FOLDER / "rates" / f"{name}-{best:g}", FOLDER / name, dirs_exist_ok=True)
    (FOLDER / "rates" / f"{name}.json").write_text(json.dumps(losses, indent=2) + "\n")
    return best


def train(name: str, folder: Path, rate: float) -> None:
    """Trains what a configuration describes, a reward model with our command and a policy with TRL's."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config |= {"output_dir": str(folder), "learning_rate": rate, "logging_steps": 1}
    config.pop("eval_data", None)
    command = ("trl_parm", "train") if name in REWARD_MODELS else ("trl.scripts.dpo",)
    run(*command, "--config", written(config, f"{name}.yaml"))


def choose_betas() -> dict[str, float]:
    """For each guided method the β whose front has the largest hypervolume on prompts of the validation pairs."""
    config = yaml.safe_load((CONFIGS / "evaluate_validation.yaml").read_text())
    methods = {entry["method"]: entry for entry in config["methods"]}
    config["methods"] = [
        {**methods[name], "name": f"{name} {beta}", "beta": beta} for name in GUIDED for beta in BETAS
    ]
    run("trl_parm", "evaluate", "--config", written(config, "evaluate_validation.yaml"))
    rows = summarize(read_rows(Path(config["output_dir"]) / "results.jsonl"), OBJECTIVES)
    volumes = {
        name: {beta: hypervolume(points(rows, f"{name} {beta}"), REFERENCE) for beta in BETAS} for name in GUIDED
    }
    (FOLDER / "betas.json").write_text(json.dumps(volumes, indent=2) + "\n")
    return {name: max(found, key=lambda beta: found[beta]) for name, found in volumes.items()}


def points(rows: list[dict[str, Any]], method: str) -> list[list[float]]:
    return [[row[name] for name in OBJECTIVES] for row in rows if row["method"] == method]


def with_betas(path: Path, betas: dict[str, float]) -> Path:
    """A configuration whose guided methods have the β that was chosen; the untrained ARM has PARM's."""
    config = yaml.safe_load(path.read_text())
    for entry in config["methods"]:
        if isinstance(entry, dict) and "beta" in entry:
            entry["beta"] = betas["parm" if entry["method"] == "untrained_arm" else entry["method"]]
    return written(config, path.name)


def written(config: dict[str, Any], name: str) -> Path:
    path = FOLDER / name
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def run(*words: Any) -> None:
    """Runs a module; ends with its exit code if it fails, since it has said why."""
    print("\n$ python -m " + " ".join(map(str, words)), flush=True)
    code = subprocess.run([sys.executable, "-m", *map(str, words)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
