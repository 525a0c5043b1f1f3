# SPDX-License-Identifier: Apache-2.0
"""`trl-parm evaluate` in one process and in two, in turn: wall time from the command to its table.

    python benchmarks/processes.py [--prompts 64] [--tokens 48] [--repeats 3]

Each process has one thread. SmolLM2-135M-Instruct, guided by an ARM of random weights, at five preferences and alone;
starting Python and loading counts, as it does for a user.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import argument_parser, paired_ratio, report, verdict


ON_CPUS = Path(__file__).parents[1] / "examples" / "accelerate_configs" / "ddp_cpu.yaml"
LAUNCH = ("accelerate.commands.launch", "--config_file", str(ON_CPUS), "--main_process_port", "0", "-m", "trl_parm")
WORDS = {1: ("trl_parm",), 2: LAUNCH}
MOST = 0.6
"""The share of one process's time that two may take on two cores."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    times: dict[int, list[float]] = {count: [] for count in WORDS}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save(folder, args.prompts, args.tokens)
        for number in range(args.repeats):
            for count in WORDS:
                times[count].append(seconds(folder, count, f"{count}_{number}"))
    ratio, low, high = paired_ratio({str(c): t for c, t in times.items()}, "2", "1")
    rows = [
        {"processes": count, "seconds": " ".join(f"{value:.0f}" for value in of_count)}
        for count, of_count in times.items()
    ]
    rows.append({"processes": "two / one", "seconds": f"{ratio:.2f} [{low:.2f}, {high:.2f}]"})
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    notes = [
        f"SmolLM2-135M-Instruct. {args.prompts} prompts, {args.tokens} new tokens, {args.repeats} runs of each; "
        f"{os.cpu_count()} cores, whose load was {load} at the end. {verdict(ratio, MOST)}."
    ]
    report("processes", rows, notes, args.results, args.table, "wall time")


def save(folder: Path, prompts: int, tokens: int) -> None:
    """SmolLM2 beside an adapter, and a configuration."""
    import torch
    from models import load, with_arm
    from smollm2 import smollm2

    model = load("SmolLM2-135M", torch.float32, torch.device("cpu"))
    with_arm(model).save_pretrained(folder / "arm")
    rewards = {"objective 1": "trl_parm.rewards:brevity", "objective 2": "trl_parm.rewards:conciseness"}
    configuration = {
        "model_name_or_path": str(Path(smollm2()).resolve()), "dtype": "float32", "grid_steps": 4, "batch_size": 16,
        "max_new_tokens": tokens, "do_sample": True, "rewards": rewards,
        "prompts": [f"What do you know about the number {i * i}?" for i in range(prompts)],
        "methods": ["base", {"method": "parm", "arm": str(folder / "arm"), "beta": 1.0}],
    }  # fmt: skip
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(configuration))


def seconds(folder: Path, count: int, output: str) -> float:
    given = ["--config", str(folder / "evaluate.yaml"), "--output_dir", str(folder / output)]
    command = [sys.executable, "-m", *WORDS[count], "evaluate", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
