# SPDX-License-Identifier: Apache-2.0
"""A training's output folder: who may write there, which checkpoints it has, and what they were trained with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
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
from trl_parm.identity import spread
from trl_parm.preference_text import FILE as PREFERENCE_TEXT
from trl_parm.records import differences, lock, plain

from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, JointPreferenceStream
from .tokenization import COLUMNS, WEIGHT, PairReader


logger = logging.get_logger(__name__)

RECORD = "training.json"
"""In each checkpoint: what it was trained with."""
WRITER = "train"
TRAINED = (
    "adapter_config.json", "config.json", "generation_config.json", "*.safetensors*", "*.bin", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", TRAINER_STATE_NAME,
    "*_results.json", PREFERENCE_TEXT,
)  # fmt: skip
"""What a training writes at its end: the model, its tokenizer, and what it measured."""
FILES = "files"
"""In a checkpoint's record: what is in its folder."""
LOCK = "_training.lock"  # `push_to_hub` leaves out names that begin so
SETTINGS = (
    "seed", "data_seed", "learning_rate", "optim", "weight_decay", "disable_dropout", "loss_type", "label_smoothing",
    "target_margin", "length_normalized", "aggregation", "global_weight", "concentration", "preference_per",
    "train_preferences", "weight_column", "append_end_token", "preference_template",
)  # fmt: skip
"""Arguments that must stay: those of the loss and its preferences, and those that an optimizer's state holds."""
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
    """The newest checkpoint in a folder that was written to its end: the trainer's state is written last.

    Raises:
        ValueError: there is none.
    """
    steps = {path: path.name.rpartition("-")[2] for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = {
        int(step): str(path) for path, step in steps.items() if step.isdigit() and read_json(path / TRAINER_STATE_NAME)
    }
    if not found:
        raise ValueError(
            f"There is no complete checkpoint in {str(folder)!r} to resume from. Train without "
            "`resume_from_checkpoint`, or name a checkpoint's folder."
        )
    return found[max(found)]


def describe_inputs(
    model: Any, adapter: str | None, data: JointPreferenceDataset | JointPreferenceStream
) -> dict[str, Any]:
    """What a run begins with, as JSON: configurations, and short hashes of weights that don't train and of tokens."""
    config = model.config.to_dict()
    name = str(model.config._name_or_path).rstrip("/").split("/")[-1]
    frozen = _hash(_sample(p) for p in model.parameters() if not p.requires_grad)
    own = model.peft_config[adapter].to_dict() if adapter else {}
    if isinstance(data, JointPreferenceDataset):
        described = [f"{len(pairs)} pairs, {_hash_pairs(pairs)}" for pairs in data.datasets]
    else:
        described = [f"a stream, {_hash_pairs(_beginning(*source))}" for source in data.sources]
    return {
        "base": plain({"name": name, "frozen weights": frozen, **config}),
        "adapter": plain({"name": adapter, **own}),
        "data": described,
    }


def describe_settings(args: PreferenceARMConfig, objectives: list[str]) -> dict[str, Any]:
    """What the loss and the optimizer of a run are, as JSON."""
    by_name = {name: args.by_objective(name, objectives) for name in ("beta", "ideal_losses")}
    return {"objectives": objectives, **by_name, **{name: plain(getattr(args, name)) for name in SETTINGS}}


def write_record(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Writes what [`describe_inputs`] and [`describe_settings`] have found into a checkpoint."""
    with output_file(Path(folder) / RECORD) as file:
        json.dump(run, file, indent=2, ensure_ascii=False)


def note_files(checkpoint: str | Path) -> None:
    """Notes in a checkpoint's record which files it has, now that all of them are there."""
    run = read_json(Path(checkpoint) / RECORD)
    if run is not None:
        write_record(checkpoint, {**run, FILES: sorted(_files(checkpoint))})


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
    old, new = dict(_flat(known)), dict(_flat(run))
    common = old.keys() & new.keys()
    found = differences({key: old[key] for key in common}, {key: new[key] for key in common})
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


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings, `a.b` for one in another, without those that change nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
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
