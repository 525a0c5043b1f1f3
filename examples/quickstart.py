# SPDX-License-Identifier: Apache-2.0
"""From preference pairs to a preference slider: trains one PARM and steers a frozen language model with it.

    python examples/quickstart.py     # SmolLM2-135M-Instruct on two CPU cores, about ten minutes
    python examples/quickstart.py --model folder-or-hub-id

Writes `runs/demo/`: the adapter, the table, the Pareto figure and sample responses. What it wrote there before is
replaced, unless anything else is there too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from report import print_accuracies, write_report
from smollm2 import smollm2
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_pblora import PBLoraConfig, preference_grid
from peft_pblora.output import output_folder
from trl_parm import BASE, LM, PARM, Guided, PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.cpu import optimize_loaded
from trl_parm.decoding.methods import guidance_strength
from trl_parm.evaluation import Run, sweep
from trl_parm.evaluation.decoding import ANY
from trl_parm.rewards import conciseness, positivity


OBJECTIVES = ["positive", "concise"]
REWARDS = {"positive": positivity, "concise": conciseness}
PAIRS = Path(__file__).parent / "data" / "pairs.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bars()
    # transformers announces renamed training arguments of its version 6; TRL still uses the old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    strength = guidance_strength(args.beta)
    pairs = read_pairs(args.pairs)
    with output_folder(args.output, "quickstart.py", needed_bytes=500_000_000) as folder:
        name = args.model or smollm2()
        tokenizer = AutoTokenizer.from_pretrained(name)
        arm, accuracies = train(name, tokenizer, pairs, folder, args)
        print_accuracies(accuracies, OBJECTIVES)
        prompts = sorted({pair["prompt"][0]["content"] for pair in pairs["test"]})[:: args.every_prompt]
        table = guide(arm, tokenizer, prompts, strength, args)
        write_report(table, OBJECTIVES, reference=[0.0, -float(args.max_new_tokens)], folder=folder)
    print(f"\nAll results are in {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: SmolLM2-135M-Instruct from its wheel)")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="JSONL made by make_pairs.py")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of each objective in a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--arm-beta", type=float, default=0.05, help="β_i of the training loss")
    parser.add_argument("--beta", type=float, default=1.0, help="β of guidance; its strength is 1/β")
    parser.add_argument("--eval-pairs", type=int, default=24, help="held-out pairs of each objective")
    parser.add_argument("--every-prompt", type=int, default=2, help="decode every n-th held-out prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_pairs(path: Path) -> dict[str, list[dict]]:
    """Reads the pairs by split. Raises `ValueError` if the file is missing or is not made of pairs."""
    if not path.exists():
        raise ValueError(f"There are no pairs at {path}. Make them with `python examples/make_pairs.py`.")
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        pair = json.loads(line)
        missing = {"prompt", "chosen", "rejected", "objective", "split"} - set(pair)
        if missing:
            raise ValueError(f"Line {number} of {path} lacks {sorted(missing)}.")
        splits[pair["split"]].append(pair)
    return splits


def train(
    name: str, tokenizer: PreTrainedTokenizerBase, pairs: dict[str, list[dict]], folder: Path, args: argparse.Namespace
) -> tuple[PeftModel, dict[str, float]]:
    """Trains the reward model and returns it with its held-out metrics."""
    backbone = optimize_loaded(AutoModelForCausalLM.from_pretrained(name))
    trainer = PreferenceARMTrainer(
        backbone,
        PreferenceARMConfig(
            str(folder / "arm"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=2 * args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            beta=args.arm_beta,
            share_prompt=True,
            eval_preferences=torch.eye(len(OBJECTIVES)).tolist(),
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            seed=args.seed,
        ),
        train_dataset=by_objective(pairs["train"], tokenizer),
        eval_dataset=by_objective(pairs["test"], tokenizer, args.eval_pairs),
        processing_class=tokenizer,
        peft_config=PBLoraConfig(
            objectives=OBJECTIVES, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return trainer.model, metrics


def by_objective(pairs: list[dict], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> dict[str, Dataset]:
    """One data set for each objective; plain text instead of conversations if the tokenizer has no chat template."""
    columns = ("prompt", "chosen", "rejected")
    datasets = {}
    for objective in OBJECTIVES:
        rows = [pair for pair in pairs if pair["objective"] == objective][:most]
        data = [{column: row[column] for column in columns} for row in rows]
        if tokenizer.chat_template is None:
            data = [{column: " " + row[column][0]["content"] for column in columns} for row in data]
        datasets[objective] = Dataset.from_list(data)
    return datasets


def guide(
    arm: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    strength: float,
    args: argparse.Namespace,
) -> Dataset:
    """Decodes the prompts with the ARM's own backbone, frozen, at five preferences and with two controls.

    Multiplying by π_ARM also sharpens the distribution. The second control does the same with the untrained ARM, so
    that what remains between it and the guided rows is preference.
    """
    base = arm.get_base_model()
    arm.base_model.set_adapter([])  # the adapter acts where it guides and is not active in the base model by itself
    sharpened = Guided(base, BASE + strength * LM(arm, adapter_name="default", disable_adapter=True))
    runs = [Run("base"), Run("base, sharpened", model=lambda _: sharpened)]
    guided: Callable = lambda batch: PARM(base, arm, batch.preference, args.beta, adapter_name="default")  # noqa: E731
    grid = preference_grid(OBJECTIVES, steps=4).tolist()
    runs += [Run("PARM", preference, guided, together=ANY) for preference in grid]
    batch_size = 80  # texts: of 16 prompts at five preferences
    batches = 2 * -(-len(prompts) // batch_size) + -(-len(prompts) // (batch_size // len(grid)))
    with tqdm(total=batches, desc="Decoding", unit="batch") as bar:
        return sweep(
            base,
            tokenizer,
            prompts,
            runs,
            REWARDS,
            batch_size=batch_size,
            seed=args.seed,
            on_batch=lambda run: bar.update(),
            do_sample=True,
            top_k=50,
            max_new_tokens=args.max_new_tokens,
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
