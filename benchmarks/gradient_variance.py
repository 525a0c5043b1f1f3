# SPDX-License-Identifier: Apache-2.0
"""How much the gradient of a step scatters with one preference for the step, and with one for each pair.

    python benchmarks/gradient_variance.py --model FOLDER --pairs FILE.jsonl \
        --labels positive=pos_better brief=brev_better

The model is trained for some steps first. Then its weights stand still, and gradients are drawn as training would draw
them: for one and the same batch, where only preferences differ, and for a new batch each time. The scatter is
E‖g − Eg‖² / ‖Eg‖². Data as for `held_out_accuracy.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import report
from datasets import Dataset, disable_progress_bars
from held_out_accuracy import read
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from peft_pblora import PBLoraConfig
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    labels = dict(entry.split("=") for entry in args.labels)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for steps in args.steps:
            trainer = make_trainer(folder, args, steps, labels, read(args.pairs, "train"))
            trainer.train()
            rows += measure(trainer, args.draws)
            print(*rows[-2:], sep="\n", flush=True)
    report("gradient_variance", rows, [f"{args.draws} draws of {args.batch_size} pairs with two labels."])


def measure(trainer: PreferenceARMTrainer, draws: int) -> list[dict[str, object]]:
    """Scatter for one batch and for new ones, with both ways to draw preferences."""
    steps = trainer.state.global_step
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(draws), strict=False)]
    rows = []
    for kind, drawn in (("one batch", batches[:1] * draws), ("new batches", batches)):
        means, scatter = [], []
        for way in ("step", "pair"):
            trainer.args.preference_per = way
            gradients = torch.stack([gradient(trainer, batch, draw) for draw, batch in enumerate(drawn)])
            means.append(gradients.mean(0))
            scatter.append((((gradients - means[-1]) ** 2).sum(1).mean() / means[-1].norm() ** 2).item())
        rows.append(
            {
                "after": f"{steps} steps",
                "": kind,
                "one α a step": f"{scatter[0]:.3g}",
                "one α a pair": f"{scatter[1]:.3g}",
                "pair / step": f"{scatter[1] / scatter[0]:.2f}",
                "cosine of the means": f"{torch.cosine_similarity(*means, dim=0).item():.3f}",
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--labels", nargs=2, required=True, metavar="OBJECTIVE=COLUMN")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 50, 200], help="steps of training before")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def make_trainer(
    folder: str, args: argparse.Namespace, steps: int, labels: dict[str, str], data: Dataset
) -> PreferenceARMTrainer:
    return PreferenceARMTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        PreferenceARMConfig(
            folder, max_steps=steps, per_device_train_batch_size=args.batch_size, learning_rate=5e-3, beta=0.1,
            label_columns=labels, use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=PBLoraConfig(objectives=list(labels), target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def gradient(trainer: PreferenceARMTrainer, batch: dict[str, torch.Tensor], draw: int) -> torch.Tensor:
    """The gradient of one step's loss as one vector."""
    trainer.model.zero_grad()
    trainer.state.global_step = 10_000 + draw
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


if __name__ == "__main__":
    main()
