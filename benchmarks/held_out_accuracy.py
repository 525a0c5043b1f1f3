# SPDX-License-Identifier: Apache-2.0
"""Does one PARM rank held-out pairs of each objective, and does its preference decide which? Beside GenARM's.

    python benchmarks/held_out_accuracy.py --model FOLDER --pairs FILE.jsonl \\
        --labels positive=pos_better brief=brev_better

`FILE` holds `prompt`, `response_0`, `response_1`, `split` (train or test) and, for each objective, the number of the
better response. The published table comes from a Llama of 260,032 parameters (karpathy/tinyllamas, stories260K) and
22,400 pairs that it sampled, labelled by VADER's sentiment and by words in a sentence. All adapters have rank 8 on all
linear layers, and all runs the same number of pairs, steps and learning rate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import report
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from peft_pblora import PBLoraConfig
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    labels = dict(entry.split("=") for entry in args.labels)
    data = {split: read(args.pairs, split) for split in ("train", "test")}
    data["test"] = data["test"].select(range(min(args.test_pairs, len(data["test"]))))
    rows = []
    for name, adapter, changes in methods(list(labels)):
        started = time.process_time()
        found = [evaluate(args, labels, data, adapter, changes, seed) for seed in range(args.seeds)]
        seconds = (time.process_time() - started) / args.seeds
        rows += [row(name, objective, labels, found, seconds) for objective in labels]
        print(*rows[-len(labels) :], sep="\n", flush=True)
    report("held_out_accuracy", rows, notes(args, data))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--labels", nargs=2, required=True, metavar="OBJECTIVE=COLUMN")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--test-pairs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def read(path: Path, split: str) -> Dataset:
    data = load_dataset("json", data_files=str(path), split="train").filter(lambda pair: pair["split"] == split)
    return data.map(lambda pair: {name: " " + pair[name].lstrip() for name in ("response_0", "response_1")})


def methods(objectives: list[str]):
    """Name, adapter and training arguments of each method."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    parm = PBLoraConfig(objectives=objectives, r1=4, r2=4, **common)
    yield "PARM", parm, {}
    yield "PARM, α for each pair", parm, {"preference_per": "pair"}
    yield "GenARM, one for each", LoraConfig(r=8, lora_alpha=16, **common), {}


def evaluate(args, labels, data, adapter, changes, seed) -> dict[str, float]:
    """Held-out metrics of one run; of GenARM, of one run for each objective."""
    if isinstance(adapter, LoraConfig):
        runs = [train(args, {objective: column}, data, adapter, changes, seed) for objective, column in labels.items()]
        return {name: value for run in runs for name, value in run.items()}
    return train(args, labels, data, adapter, changes, seed)


def train(args, labels, data, adapter, changes, seed) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceARMTrainer(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            PreferenceARMConfig(
                folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, seed=seed, data_seed=seed,
                per_device_eval_batch_size=64, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
                warmup_steps=20, beta=args.beta, label_columns=labels, use_cpu=not torch.cuda.is_available(),
                bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
                logging_strategy="no", eval_preferences=torch.eye(len(labels)).tolist(), **changes,
            ),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter,
        )  # fmt: skip
        trainer.train()
        size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        return {**trainer.evaluate(), f"parameters {' '.join(labels)}": size}


def row(method: str, objective: str, labels, found: list[dict], seconds: float) -> dict[str, object]:
    other = next(name for name in labels if name != objective)
    own = [run[f"eval_{objective}_accuracy@{objective}"] for run in found]
    ratio = [run[f"eval_{objective}_ratio_accuracy@{objective}"] for run in found]
    result = {"method": method, "objective": objective, "accuracy at its own vertex": text(own)}
    if f"eval_{objective}_accuracy@{other}" in found[0]:
        elsewhere = [run[f"eval_{objective}_accuracy@{other}"] for run in found]
        result["at the other vertex"] = text(elsewhere)
        result["difference"] = text([a - b for a, b in zip(own, elsewhere, strict=True)])
    result["relative to the untrained ARM"] = text(ratio)
    result["parameters"] = f"{sum(v for name, v in found[0].items() if name.startswith('parameters')):,}"
    result["CPU seconds a seed"] = f"{seconds:.0f}"
    return result


def text(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def notes(args, data) -> list[str]:
    return [
        f"Mean ± standard error over {args.seeds} seeds; {len(data['train'])} training pairs, {len(data['test'])} "
        f"held out; {args.steps} steps of {args.batch_size} pairs, learning rate {args.learning_rate:g}, "
        f"β {args.beta:g}.",
        "Accuracy: log π of the better response is larger. `relative to the untrained ARM` takes the untrained "
        "model's own taste away: the accuracy of the change of log π.",
    ]


if __name__ == "__main__":
    main()
