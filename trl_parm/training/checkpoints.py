# SPDX-License-Identifier: Apache-2.0
"""A training's output folder: who may write there, which checkpoints it has, and what they were trained with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow.compute as pc
from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from peft_pblora.loading import check_checkpoint
from peft_pblora.output import check_output, is_written_by, output_file
from peft_pblora.switch import backbone_of
from trl_parm.identity import spread
from trl_parm.jsonl import lock
from trl_parm.preference_text import FILE as PREFERENCE_TEXT
from trl_parm.records import differences, plain

from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, JointPreferenceStream
from .tokenization import COLUMNS, WEIGHT, PairReader


logger = logging.get_logger(__name__)

RECORD = "training.json"
"""In each checkpoint: what it was trained with."""
WRITER = "train"
BEGUN = "_training.id"
"""In the output folder: which training began there last."""
TRAINING = "training"
"""There, and in a checkpoint's record once it is complete: the training's id."""
TRAINED = (
    "adapter_config.json", "config.json", "generation_config.json", "*.safetensors*", "*.bin", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", TRAINER_STATE_NAME,
    "*_results.json", PREFERENCE_TEXT, BEGUN,
)  # fmt: skip
"""What a training writes at its end: the model, its tokenizer, and what it measured."""
FILES = "files"
"""In a checkpoint's record: what is in its folder."""
LOCK = "_training.lock"  # `push_to_hub` leaves out names that begin so
SETTINGS = (
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "disable_dropout",
    "optimize_for_cpu", "loss_type", "label_smoothing", "target_margin", "length_normalized", "aggregation",
    "global_weight", "concentration", "preference_per", "train_preferences", "weight_column", "append_end_token",
    "preference_template",
)  # fmt: skip
"""Arguments that must stay: those of the loss and its preferences, of the optimizer and its learning rate."""
CONFIGURATIONS = ("base", "adapter")
"""What of a record holds the fields of a configuration, which other versions of transformers and PEFT add to."""
PASSING = {
    "_name_or_path", "architectures", "auto_mapping", "base_model_name_or_path", "bos_token_id", "card",
    "default_preference", "dtype", "eos_token_id", "inference_mode", "pad_token_id", "peft_version", "revision",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Keys of the configurations of models and adapters that change nothing of a training. Special tokens are among them,
which transformers sets to the tokenizer's when a training begins."""


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from training into a folder. Raises `ValueError` if one does already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:
        lock(file, folder)
        yield


def check_folder(folder: str | Path, subfolder: str = "") -> None:
    """Raises `ValueError` if a folder holds a model, or checkpoints, that no training of ours has written.

    `subfolder` is where below it the adapter comes.
    """
    folder = Path(folder)
    places = {folder, folder / subfolder}
    for path in sorted(path for place in places for pattern in TRAINED for path in place.glob(pattern)):
        check_output(path, WRITER)
    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        # A kill before anything was noted leaves no more than an empty folder and what it was writing.
        empty = path.is_dir() and all(entry.name.endswith(".partial") for entry in path.iterdir())
        if not empty and not is_written_by(path, WRITER):
            raise ValueError(
                f"The output {folder} holds {path.name}, which was not written by {WRITER!r}. Nothing is replaced: "
                "name another output, or move that away."
            )


def last_complete_checkpoint(folder: str | Path) -> str:
    """The newest checkpoint in a folder that was written to its end, by the training that began there last.

    Where it is not known which one began there, as with checkpoints of earlier versions, it is the newest of any.

    Raises:
        ValueError: there is none.
    """
    steps = {path: path.name.rpartition("-")[2] for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = {
        int(step): str(path) for path, step in steps.items() if step.isdigit() and read_json(path / TRAINER_STATE_NAME)
    }
    begun = read_json(Path(folder) / BEGUN)
    own = {step: path for step, path in found.items() if begun is None or _training(path) == begun.get(TRAINING)}
    if not own:
        others = f": {found[max(found)]} is of another training than the one that began there last" if found else ""
        raise ValueError(
            f"There is no complete checkpoint in {str(folder)!r} to resume from{others}. Train without "
            "`resume_from_checkpoint`, or name a checkpoint's folder."
        )
    return own[max(own)]


def begin(folder: str | Path, checkpoint: str | None) -> str | None:
    """Notes in an output folder which training begins there, and gives its id: that of a checkpoint to resume from,
    `None` if an earlier version wrote it, or a new one."""
    training = _training(checkpoint) if checkpoint else uuid.uuid4().hex
    with output_file(Path(folder) / BEGUN, WRITER) as file:
        json.dump({TRAINING: training}, file)
    return training


def describe_inputs(
    model: Any, adapter: str | None, data: JointPreferenceDataset | JointPreferenceStream
) -> dict[str, Any]:
    """What a run begins with, as JSON: configurations, and short hashes of weights that don't train and of tokens."""
    config = model.config.to_dict()
    name = str(model.config._name_or_path).rstrip("/").split("/")[-1]
    frozen = _hash(_sample(p) for p in model.parameters() if not p.requires_grad)
    own = model.peft_config[adapter].to_dict() if adapter else {}
    return {
        "base": plain({"name": name, "frozen weights": frozen, **config}),
        "loaded dtype": str(backbone_of(model).dtype).removeprefix("torch."),
        "adapter": plain({"name": adapter, **own}),
        "data": describe_data(data),
    }


def describe_data(data: JointPreferenceDataset | JointPreferenceStream) -> list[str]:
    """Of each data set its size and a short hash of its tokens; of a stream of those at its start."""
    if isinstance(data, JointPreferenceDataset):
        return [f"{len(pairs)} pairs, {_hash_pairs(pairs)}" for pairs in data.datasets]
    return [f"a stream, {_hash_pairs(_beginning(*source))}" for source in data.sources]


def describe_settings(args: PreferenceARMConfig, objectives: list[str]) -> dict[str, Any]:
    """What the loss and the optimizer of a run are, as JSON."""
    by_name = {name: args.by_objective(name, objectives) for name in ("beta", "ideal_losses")}
    values = args.to_dict()
    return {"objectives": objectives, **by_name, **{name: plain(values[name]) for name in SETTINGS}}


def write_record(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Writes what [`describe_inputs`] and [`describe_settings`] have found into a checkpoint."""
    with output_file(Path(folder) / RECORD) as file:
        json.dump(run, file, indent=2, ensure_ascii=False)


def note_files(checkpoint: str | Path, training: str | None) -> None:
    """Notes in a checkpoint's record which files it has, and of which training, now that all of them are there."""
    run = read_json(Path(checkpoint) / RECORD)
    if run is not None:
        write_record(checkpoint, {**run, TRAINING: training, FILES: sorted(_files(checkpoint))})


def rotate(folder: str | Path, limit: int | None, protected: Iterable[str | None]) -> None:
    """Removes the oldest checkpoints beyond a limit, other than those that are protected, as transformers does; but
    none that holds a file of somebody's own."""
    protected = {Path(path).name for path in protected if path}
    ordered = sort_checkpoints(str(folder))
    surplus = len(ordered) - max(limit, len(protected)) if limit else 0
    for checkpoint in (Path(path) for path in ordered if Path(path).name not in protected):
        if surplus <= 0:
            return
        noted = (read_json(checkpoint / RECORD) or {}).get(FILES)  # none of a checkpoint of version 0.1.0
        own = sorted(_files(checkpoint) - set(noted)) if noted else []
        if own:
            logger.warning(f"{checkpoint} is kept, since it holds {own[0]}, which no training has written.")
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
            surplus -= 1


def check_record(checkpoint: str | Path, run: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a checkpoint of another run. One without a record, of version 0.1.0, is warned of."""
    known = read_json(Path(checkpoint) / RECORD)
    if known is None:
        logger.warning(
            f"The checkpoint {checkpoint} does not say what it was trained with. Make sure that model, data and "
            "arguments are the same."
        )
        return
    found = differences(dict(_flat(_known_to(run, known))), dict(_flat(_known_to(known, run))))
    if found:
        raise ValueError(
            f"The checkpoint {checkpoint} is of another training: {'; '.join(found)}. Resume with what it was trained "
            "with, or train anew into another `output_dir`."
        )


def check_adapter_of(checkpoint: str | Path, model: Any, adapter: str | None) -> None:
    """Raises `ValueError` for a checkpoint whose adapter is damaged; transformers would train on with what it has."""
    folder = Path(checkpoint, "" if adapter == "default" else adapter or "")  # where PEFT puts it
    saved = any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if adapter and saved and isinstance(model, PeftModel):
        check_checkpoint(model, folder, adapter)


def _known_to(other: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record another has too, whose version may have had fewer settings, or configurations fewer fields."""
    found = {key: value for key, value in run.items() if key in other}
    for name in found.keys() & CONFIGURATIONS:
        found[name] = {field: value for field, value in found[name].items() if field in other[name]}
    return found


def _training(checkpoint: str | Path) -> str | None:
    return (read_json(Path(checkpoint) / RECORD) or {}).get(TRAINING)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings, `a.b` for one in another, without those that change nothing. An empty mapping is
    none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif key not in PASSING:
            yield before + key, value


def _beginning(reader: PairReader, rows: Iterable[Any]) -> Dataset:
    pairs = [reader(row, number) for number, row in enumerate(islice(rows, 8))]
    return Dataset.from_list(pairs, features=reader.features)


def _hash_pairs(data: Dataset) -> str:
    def parts() -> Iterator[Any]:
        for table in cast(Any, data.with_format("arrow").iter(1000)):
            for column in COLUMNS:
                yield pc.list_value_length(table[column]).to_numpy()
                yield pc.list_flatten(table[column]).to_numpy()
            if WEIGHT in table.column_names:
                yield table[WEIGHT].to_numpy()

    return _hash(parts())


def _sample(parameter: nn.Parameter) -> Any:
    """Some of a weight's values; with ZeRO-3, which leaves a process all, a part or nothing of it, its shape."""
    if is_deepspeed_zero3_enabled():
        return str(tuple(getattr(parameter, "ds_shape", parameter.shape))).encode()
    return spread(parameter, 16).float().contiguous().cpu().numpy()


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _files(folder: str | Path) -> set[str]:
    """All files below a folder, by their path from there."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir()}


def read_json(path: Path) -> Any:
    """What stands in a JSON file; `None` if it is missing, or was not written to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
