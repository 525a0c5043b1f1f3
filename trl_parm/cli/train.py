# SPDX-License-Identifier: Apache-2.0
"""`trl-parm train`: trains an autoregressive reward model, on one CPU or, with `accelerate launch -m trl_parm`, on a
cluster."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trl_parm.arguments import parse, required

from .common import say


if TYPE_CHECKING:
    from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
    from trl_parm.training.config import ARMArguments


UNKNOWN = (
    "Whether it has learned, and follows α, was not measured: that takes held-out pairs, `eval_data`, and the "
    "vertices among `eval_preferences`, whose default has them."
)


def main(argv: list[str]) -> None:
    """Trains, evaluates and saves a reward model, with its card and the resolved arguments beside it.

    With `resume` it goes on from the last complete checkpoint, or starts where there is none yet.
    """
    if {"-h", "--help"} & set(argv):
        print(describe())
        return
    from trl_parm import PreferenceARMConfig
    from trl_parm.training.config import ARMArguments, with_lines

    arguments, config = parse("train", (ARMArguments, PreferenceARMConfig), argv)
    with with_lines([*arguments.train_data, *arguments.eval_data]):
        _train(arguments, config)


def _train(arguments: ARMArguments, config: PreferenceARMConfig) -> None:
    from transformers import ProgressCallback

    from trl_parm import PreferenceARMTrainer
    from trl_parm.evaluation.models import is_readable
    from trl_parm.records import write_run
    from trl_parm.training.card import data_facts, measured, run_yaml
    from trl_parm.training.checkpoints import check_folder

    from .steps import Steps

    required(config, "output_dir")
    required(arguments, "model_name_or_path")
    if arguments.objectives and arguments.adapter == "lora" and not config.preference_template:
        raise ValueError(
            f"`objectives` is {arguments.objectives}, but a plain LoRA has no preference and trains for the objective "
            "of its data. Leave it out: a data set names it as its `objective`, or `label_columns` names a column."
        )
    folder = Path(str(config.output_dir))
    check_folder(folder)
    required(arguments, "train_data")
    data = arguments.load(arguments.train_data)
    if not (config.label_columns or arguments.objectives):
        config.label_columns = found = find_labels(data or {}, _columns_in_use(arguments, config))
        if found and config.process_index == 0:
            say(f"Objectives, by the columns with labels: {', '.join(found)}. `label_columns` names others.")
        unnamed = [entry.path for entry in arguments.train_data if not entry.objective]
        if unnamed and not config.label_columns and arguments.adapter != "lora":
            raise ValueError(f"The data {unnamed[0]!r} name no `objective`, which chosen and rejected are for.")
    if config.preference_template and arguments.objectives and not config.label_columns:
        config.label_columns = {objective: objective for objective in arguments.objectives}
    adapter = arguments.peft_config(cast(dict, config.label_columns))
    if not is_readable(arguments.model_name_or_path):
        raise ValueError(
            f"There is no model to read at {arguments.model_name_or_path!r}: neither in a folder of this name nor on "
            "the Hub, as far as it can be reached."
        )
    trainer = PreferenceARMTrainer(
        arguments.model_name_or_path,
        config,
        train_dataset=data,
        eval_dataset=arguments.load(arguments.eval_data, "test"),
        quantization_config=arguments.quantization_config(),
        peft_config=adapter,  # pyright: ignore[reportArgumentType]
    )
    if config.process_index == 0:
        _say_if_trained_on(trainer, arguments)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Steps())
    trainer.card |= data_facts(trainer, list(data or ()), [entry.path for entry in arguments.train_data])
    trainer.card["run"] = "# trl-parm train --config this.yaml\n" + run_yaml(arguments, config)
    with trainer.claim_output(_checkpoint(folder) if arguments.resume else None) as checkpoint:
        if trainer.is_world_process_zero():
            write_run(folder / "run.yaml", "train", asdict(arguments) | config.to_dict())
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.eval_dataset is not None:
            trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_state()
        trainer.save_model(config.output_dir)
        trainer.create_model_card()
        if config.push_to_hub:
            trainer.push_to_hub()
        if trainer.is_world_process_zero():
            facts = measured(trainer)
            say(_outcome(folder, facts.get("accuracies"), facts.get("diagnosis")))
    # Without this a process may end while another still talks to it, and be counted as failed.
    trainer.accelerator.wait_for_everyone()
    # DDP before the process group: the last to hold that one waits for Gloo's threads, and DDP would wait with the
    # interpreter's lock, which such a thread may need in order to end.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def _say_if_trained_on(trainer: PreferenceARMTrainer, arguments: ARMArguments) -> None:
    """Names the data sets for evaluation that are one to train on, pair by pair."""
    from trl_parm.training.checkpoints import describe_data

    given: Any = trainer.eval_dataset or {}
    joined = given.values() if isinstance(given, dict) else [given]
    found = [data for one in joined for data in describe_data(one)]
    trained = set(describe_data(cast(Any, trainer.train_dataset))) if found else set()
    for entry, data in zip(arguments.eval_data, found, strict=True):
        if data in trained:
            say(
                f"Warning: the evaluation pairs of {entry.path!r} are pairs that it trains on, so that none is held "
                "out. Name others as `eval_data`, or another `split`."
            )


def _columns_in_use(arguments: ARMArguments, config: PreferenceARMConfig) -> set[str | None]:
    """The columns that are named for something else than labels; one that is renamed has its new name for that."""
    kept = {column for entry in arguments.train_data for column in set(entry.where or ()) - set(entry.columns or ())}
    return {config.weight_column, *kept}


def find_labels(data: Mapping[str, Any], in_use: Collection[str | None] = ()) -> dict[str, str] | None:
    """Objective → column for labelled data sets whose columns nobody named: those with no other numbers than -1, 0 and
    1 that are not in use, nor named after one of the responses, nor scores as `trl-parm relabel` writes them.

    Raises:
        ValueError: a labelled data set without such a column.
    """
    from trl_parm.training.config import called
    from trl_parm.training.tokenization import LABELLED

    found: dict[str, str] = {}
    for name, pairs in data.items():
        values = _first_values(pairs)
        if not set(LABELLED) <= set(values):
            continue
        others = {*in_use, *(f"{column}_score_{i}" for column in values for i in (0, 1))}
        labels = [column for column, seen in values.items() if column not in others and _are_labels(seen)]
        own = [column for column in labels if not any(response in column for response in LABELLED)]
        if not own:
            raise ValueError(
                f"The labelled {called(name)} has no column of labels, which are 0, 1 or -1; it has "
                f"{', '.join(values)}. Name them with `label_columns`, such as {{helpful: better_response_id}}."
            )
        found |= {column: column for column in own}
    return found or None


def _first_values(pairs: Any) -> dict[str, list[Any]]:
    """The columns of a data set, each with its values if they are numbers; of a stream with those at its start."""
    if not hasattr(pairs, "unique"):
        rows = list(pairs.take(1000))
        return {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
    kinds = {column: str(getattr(kind, "dtype", "")) for column, kind in pairs.features.items()}
    return {c: pairs.unique(c) if kind.startswith(("int", "uint", "float")) else [] for c, kind in kinds.items()}


def _are_labels(values: Iterable[Any]) -> bool:
    """Whether there are labels, -1, 0 or 1, and nothing else; missing ones are NaN where a file has no whole numbers
    without them."""
    known = [value for value in values if value is not None and value == value]
    return bool(known) and all(type(value) in (int, float) and value in (-1, 0, 1) for value in known)


def _outcome(folder: Path, accuracies: Sequence[Sequence[Any]] | None, diagnosis: str | None) -> str:
    """How often the model ranks held-out pairs rightly and whether it follows α, as in its card, and where it is."""
    from trl_parm.evaluation.measures import markdown

    head, *rows = accuracies or [[]]
    table = markdown([dict(zip(head, row)) for row in rows])
    parts = [f"Share of held-out pairs that it ranks rightly (relative to the untrained model):\n\n{table}"]
    parts = parts if rows else []
    parts.append(diagnosis or UNKNOWN)
    return "\n\n".join([*parts, f"The model is in {folder}; its card, README.md, shows how to use it."])


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
        say(f"There is no complete checkpoint of this training in {folder} yet: starting anew.")
        return None
