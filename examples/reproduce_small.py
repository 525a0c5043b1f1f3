# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods on two CPU cores: the configurations of `configs/small`, one after the other.

    python examples/reproduce_small.py      # or `make reproduce-small`; several hours on two cores

Trains everything on the same pairs with the same budget at three learning rates, chooses one of them and a β for each
method on prompts of its own, evaluates all methods on the same prompts, and writes the page of `docs/results.md` to
`runs/small/page`. What is complete is not done again, so that a run that was stopped goes on; move `runs/small` away
to begin anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from make_pairs import DATA, make_prompts
from results_page import label, write_page
from smollm2 import smollm2

from peft_pblora.output import output_file
from trl_parm.evaluation import hypervolume
from trl_parm.evaluation.fronts import summarize
from trl_parm.records import read_rows


CONFIGS, FOLDER = Path(__file__).parent / "configs" / "small", Path("runs/small")
OBJECTIVES = ["positive", "concise"]
REWARD_MODELS = ["parm", "svd_lora", "uniarm", "genarm_positive", "genarm_concise"]
POLICIES = ["dpo_positive", "dpo_concise"]
LEARNING_RATES = [2e-3, 5e-3, 1e-2]
BETAS = [0.5, 1.0, 2.0]
SETTINGS_OF = {"untrained_arm": "parm", "transfer_q": "rewarded_soups"}
"""Methods without a choice of their own, and those whose models they use."""
REFERENCE = [0.0, -40.0]


def main() -> None:
    smollm2()
    run("trl_parm", "relabel", "--config", CONFIGS / "relabel.yaml")
    for rate in LEARNING_RATES:
        for name in REWARD_MODELS + POLICIES:
            train(name, rate)
    settings = choose_settings()
    for name in ("evaluate", "evaluate_transfer_q"):
        run("trl_parm", "evaluate", "--config", with_settings(CONFIGS / f"{name}.yaml", settings))
    for name in ("plot", "plot_transfer_q"):
        run("trl_parm", "plot", "--config", CONFIGS / f"{name}.yaml")
    write_page(FOLDER, FOLDER / "page", settings)
    print(f"\nThe results are in {FOLDER / 'page' / 'results.md'}")


def train(name: str, rate: float) -> None:
    """Trains what a configuration describes, a reward model with our command and a policy with TRL's."""
    folder = FOLDER / f"{name}-{rate:g}"
    if (folder / "adapter_model.safetensors").exists():
        return
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config |= {"output_dir": str(folder), "learning_rate": rate, "logging_steps": 1}
    config.pop("eval_data", None)
    command = ("trl_parm", "train") if name in REWARD_MODELS else ("trl.scripts.dpo",)
    run(*command, "--config", written(config, f"{name}.yaml"))


def choose_settings() -> dict[str, dict[str, float]]:
    """For each trained method the learning rate, and β if it has one, of the front with the largest hypervolume.

    Nothing was trained on the prompts, and nothing is evaluated on them.
    """
    write_validation_prompts(FOLDER / "validation_prompts.jsonl")
    config = yaml.safe_load((CONFIGS / "evaluate_validation.yaml").read_text())
    tried = {entry["method"]: settings_of(entry) for entry in config["methods"]}
    config["methods"] = [
        {**with_setting(entry, setting), "name": label(entry["method"], setting)}
        for entry in config["methods"]
        for setting in tried[entry["method"]]
    ]
    run("trl_parm", "evaluate", "--config", written(config, "evaluate_validation.yaml"))
    rows = summarize(read_rows(Path(config["output_dir"]) / "results.jsonl"), OBJECTIVES)
    volumes = {
        name: hypervolume([[row[o] for o in OBJECTIVES] for row in rows if row["method"] == name], REFERENCE)
        for name in (entry["name"] for entry in config["methods"])
    }
    write(FOLDER / "validation.json", json.dumps(volumes, indent=2) + "\n")
    return {
        method: max(settings, key=lambda setting: volumes[label(method, setting)])
        for method, settings in tried.items()
    }


def write_validation_prompts(path: Path) -> None:
    """Prompts about the topics of training that training leaves out: of held-out pairs, or without any pair."""
    held_out = [row["prompt"] for row in read_rows(FOLDER / "pairs" / "test.jsonl")]
    paired = [row["prompt"] for row in read_rows(DATA / "pairs.jsonl")]
    asked = [[{"role": "user", "content": prompt}] for prompt, split in make_prompts(seed=0) if split == "train"]
    prompts = held_out + [prompt for prompt in asked if prompt not in paired]
    write(path, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def settings_of(entry: Mapping[str, Any]) -> list[dict[str, float]]:
    """All settings that are tried for a method."""
    betas = [{"beta": beta} for beta in BETAS] if "beta" in entry else [{}]
    return [{"rate": rate, **beta} for rate in LEARNING_RATES for beta in betas]


def with_settings(path: Path, settings: Mapping[str, Mapping[str, float]]) -> Path:
    """A configuration whose methods have the settings that were chosen for them."""
    config = yaml.safe_load(path.read_text())
    config["methods"] = [
        with_setting(entry, settings.get(SETTINGS_OF.get(entry["method"], entry["method"]), {}))
        if isinstance(entry, dict)
        else entry
        for entry in config["methods"]
    ]
    return written(config, path.name)


def with_setting(entry: Mapping[str, Any], setting: Mapping[str, float]) -> dict[str, Any]:
    """The entry of a method with this β, if it has one, and with what was trained at this learning rate."""

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: located(one) for key, one in value.items()}
        trained = isinstance(value, str) and value.startswith(f"{FOLDER}/")
        return f"{value}-{setting['rate']:g}" if trained else value

    found = {key: located(value) for key, value in entry.items()}
    return found | {"beta": setting["beta"]} if "beta" in entry else found


def written(config: dict[str, Any], name: str) -> Path:
    return write(FOLDER / name, yaml.safe_dump(config, sort_keys=False))


def write(path: Path, text: str) -> Path:
    with output_file(path, "reproduce_small.py") as file:
        file.write(text)
    return path


def run(*words: Any) -> None:
    """Runs a module; ends with its exit code if it fails, since it has said why."""
    print("\n$ python -m " + " ".join(map(str, words)), flush=True)
    code = subprocess.run([sys.executable, "-m", *map(str, words)]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
