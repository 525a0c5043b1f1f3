# SPDX-License-Identifier: Apache-2.0
"""`trl-parm train`: trains an autoregressive reward model, on one CPU or, with `accelerate launch -m trl_parm`, on a
cluster."""

from __future__ import annotations

import ast
import sys
from dataclasses import asdict
from pathlib import Path

from trl_parm.arguments import parse

from .common import say


def main(argv: list[str]) -> None:
    """Trains, evaluates and saves a reward model, with its card and the resolved arguments beside it.

    With `resume` it goes on from the last complete checkpoint, or starts where there is none yet.
    """
    if {"-h", "--help"} & set(argv):
        print(describe())
        return
    from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
    from trl_parm.records import write_run
    from trl_parm.training.card import data_facts, run_yaml
    from trl_parm.training.checkpoints import check_folder
    from trl_parm.training.config import ARMArguments

    arguments, config = parse("train", (ARMArguments, PreferenceARMConfig), argv)
    if not sys.stderr.isatty():
        config.disable_tqdm = True
    folder = Path(str(config.output_dir))
    check_folder(folder)
    data = arguments.load(arguments.train_data)
    trainer = PreferenceARMTrainer(
        arguments.model_name_or_path,
        config,
        train_dataset=data,
        eval_dataset=arguments.load(arguments.eval_data),
        quantization_config=arguments.quantization_config(),
        peft_config=arguments.peft_config(config.label_columns),  # pyright: ignore[reportArgumentType]
    )
    trainer.card |= data_facts(trainer, list(data or ()), [entry.path for entry in arguments.train_data])
    trainer.card["run"] = "# trl-parm train --config this.yaml\n" + run_yaml(arguments, config)
    with trainer.claim_output(_checkpoint(folder) if arguments.resume else None) as checkpoint:
        if trainer.is_world_process_zero():
            write_run(folder / "run.yaml", "train", asdict(arguments) | config.to_dict())
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
        trainer.save_state()
        trainer.save_model(config.output_dir)
        trainer.create_model_card()
        if config.push_to_hub:
            trainer.push_to_hub()
    # Without this a process may end while another still talks to it, and be counted as failed.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def describe() -> str:
    """The help: the documentation of the arguments, read from the source, since importing it takes seconds."""
    source = Path(__file__).parents[1] / "training" / "config.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    texts = ["usage: trl-parm train [--config FILE.yaml] [--KEY VALUE ...]", __doc__ or ""]
    texts += [f"{name}: {found[name]}" for name in ("PairData", "ARMArguments", "PreferenceARMConfig")]
    return "\n\n".join([*texts, "All arguments of transformers.TrainingArguments are keys too."])


def _checkpoint(folder: Path) -> str | None:
    from trl_parm.training.checkpoints import last_complete_checkpoint

    try:
        return last_complete_checkpoint(str(folder))
    except ValueError:
        say(f"There is no complete checkpoint in {folder} yet: starting anew.")
        return None
