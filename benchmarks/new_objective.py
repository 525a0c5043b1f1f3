# SPDX-License-Identifier: Apache-2.0
"""Frozen embeddings of descriptions beside learned ones, and objectives that are added by a description alone.

    python benchmarks/new_objective.py --model FOLDER --pairs FILE.jsonl

`FILE` is as of `held_out_accuracy.py`, with the columns of `--labels`. MoSLoRA is trained for its objectives, with
frozen embeddings of their descriptions and with learned ones. Then two objectives are added to the former without any
training, and held-out pairs of each are ranked at its vertex: one says in other words what an objective says that was
trained; the other, more quotation marks, has nothing to do with them. The published table comes from the model and the
pairs of `held_out_accuracy.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, report
from datasets import Dataset, disable_progress_bars
from held_out_accuracy import read, text
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from peft_pblora import MoSLoraConfig, embed_objectives, load_adapter
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer


DESCRIPTIONS = {
    "positive": "A happy story in which all are glad, kind and full of joy.",
    "brief": "Short sentences. Few words.",
}
NEW = {
    "terse": ("brev_better", "Little sentences with not many words."),
    "spoken": ("quotes_better", 'People talk to each other and say, "Hello!"'),
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    labels = dict(entry.split("=") for entry in args.labels)
    data = {split: with_quotes(read(args.pairs, split)) for split in ("train", "test")}
    data["test"] = data["test"].select(range(min(args.test_pairs, len(data["test"]))))
    started = time.process_time()
    found = {
        kind: [train(args, labels, data, kind == "frozen descriptions", seed) for seed in range(args.seeds)]
        for kind in ("frozen descriptions", "learned, d = 64")
    }
    seconds = time.process_time() - started
    report("new_objective", rows(labels, found), notes(args, data, seconds), args.results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--labels", nargs=2, default=["positive=pos_better", "brief=brev_better"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--test-pairs", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    return parser.parse_args()


def with_quotes(data: Dataset) -> Dataset:
    """Adds which response has more quotation marks, −1 for as many."""

    def label(pair: dict[str, Any]) -> dict[str, int]:
        first, second = (pair[name].count('"') for name in ("response_0", "response_1"))
        return {"quotes_better": -1 if first == second else int(second > first)}

    return data.map(label)


def train(args, labels, data, frozen: bool, seed: int) -> dict[str, float]:
    """Held-out metrics at the vertices that were trained; with frozen embeddings also at those of new objectives."""
    common = {"objectives": list(labels), "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    own = {"objective_descriptions": DESCRIPTIONS} if frozen else {"embedding_size": 64}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            args, folder, load(args), labels, data, seed, peft_config=MoSLoraConfig(**common, **own)
        )
        trainer.train()
        metrics = trainer.evaluate()
        if not frozen:
            return metrics
        trainer.model.save_pretrained(folder)
        more = {name: description for name, (_, description) in NEW.items()}
        wider = embed_objectives(trainer.adapter_config, trainer.model, tokenizer, more)
        model = load_adapter(load(args), folder, config=wider, is_trainable=True)
        every = labels | {name: column for name, (column, _) in NEW.items()}
        found = make_trainer(args, folder, model, every, data, seed).evaluate()
        o = torch.tensor(wider.objective_embeddings)
        cosines = {f"cosine {a} {b}": float(o[i] @ o[j]) for i, a in enumerate(every) for j, b in enumerate(every)}
        return metrics | {name: value for name, value in found.items() if name not in metrics} | cosines


def load(args) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def make_trainer(args, folder, model, labels, data, seed, peft_config=None) -> PreferenceARMTrainer:
    k = len(labels)
    uniform = [0.5, 0.5, *[0.0] * (k - 2)]  # of the objectives that were trained
    return PreferenceARMTrainer(
        model,
        PreferenceARMConfig(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch_size, seed=seed, data_seed=seed,
            per_device_eval_batch_size=64, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=20, beta=args.beta, label_columns=labels, use_cpu=not torch.cuda.is_available(),
            bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", eval_preferences=[*torch.eye(k).tolist(), uniform], card_prompt=None,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=peft_config,
    )  # fmt: skip


def rows(labels, found: dict[str, list[dict]]):
    """How an objective's pairs are ranked relative to the untrained model, at its vertex, the others, and between."""
    first, second = labels
    for kind, runs in found.items():
        for objective in labels:
            other = second if objective == first else first
            yield {
                "embeddings": kind,
                "objective": objective,
                "at its vertex": accuracy(runs, objective, objective),
                "at the other vertex": accuracy(runs, objective, other),
                "between": accuracy(runs, objective, "uniform"),
                "correlation of the vertices": text([run["eval_vertex_correlation"] for run in runs]),
            }
    runs = found["frozen descriptions"]
    for objective in NEW:
        cosines = [f"{name} {runs[0][f'cosine {objective} {name}']:.2f}" for name in labels]
        yield {
            "embeddings": "added, not trained",
            "objective": f"{objective} (cosine: {', '.join(cosines)})",
            "at its vertex": accuracy(runs, objective, objective),
            "at the other vertex": ", ".join(f"{name} {accuracy(runs, objective, name)}" for name in labels),
            "between": accuracy(runs, objective, between(runs[0], objective)),
        }


def accuracy(runs: list[dict], objective: str, preference: str) -> str:
    return text([run[f"eval_{objective}_ratio_accuracy@{preference}"] for run in runs])


def between(run: dict, objective: str) -> str:
    """The name of the preference between the trained vertices, among those of an evaluation."""
    start = f"eval_{objective}_ratio_accuracy@"
    return next(name.removeprefix(start) for name in run if name.startswith(start) and "=0.5" in name)


def notes(args, data, seconds: float) -> list[str]:
    described = [f"{name}: “{words}”" for name, words in DESCRIPTIONS.items()]
    described += [f"{name}: “{words}”" for name, (_, words) in NEW.items()]
    return [
        f"Accuracy of held-out pairs relative to the untrained model, mean ± standard error over {args.seeds} seeds; "
        f"{len(data['train'])} training pairs, {len(data['test'])} held out; {args.steps} steps of {args.batch_size} "
        f"pairs, learning rate {args.learning_rate:g}, β {args.beta:g}; {seconds:.0f} CPU seconds in all.",
        "Added objectives were never trained: 0.5 is chance, and what counts is whether their own vertex is better "
        "than those of the objectives that were.",
        "Descriptions: " + "; ".join(described),
    ]


if __name__ == "__main__":
    main()
