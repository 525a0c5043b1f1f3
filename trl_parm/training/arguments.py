# SPDX-License-Identifier: Apache-2.0
"""What a training script needs beside [`PreferenceARMConfig`], for TrlParser: model, adapter and data from YAML."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, PeftConfig
from transformers import BitsAndBytesConfig

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig


FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ADAPTERS = ("pblora", "svdlora", "moslora", "lora")


@dataclass
class PairData:
    """One data set of preference pairs.

    Args:
        path (`str`): A JSON, CSV or Parquet file, a folder, or an id on the Hub.
        objective (`str`, *optional*): Its objective; not given for a data set with labels for several.
        name (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`): The split, slices such as `train[:1000]` included.
        streaming (`bool`, *optional*, defaults to `False`): Read it as a stream.
        columns (`dict[str, str]`, *optional*): Its column → the column that is expected.
        where (`dict[str, Any]`, *optional*): Keep the rows with these values in these columns.
    """

    path: str
    objective: str | None = None
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    columns: dict[str, str] | None = None
    where: dict[str, Any] | None = None

    def load(self) -> Dataset | IterableDataset:
        """Loads the pairs. Raises `ValueError` if the file is missing or columns are."""
        kind = FILE_KINDS.get(Path(self.path).suffix)
        if kind and not Path(self.path).exists():
            raise ValueError(f"There is no data at {self.path!r}. Give an existing file, or an id on the Hub.")
        source: dict[str, Any] = {"path": kind, "data_files": self.path} if kind else {"path": self.path}
        data: Any = load_dataset(**source, name=self.name, split=self.split, streaming=cast(Any, self.streaming))
        wanted = {*(self.columns or {}), *(self.where or {})}
        if data.column_names and not wanted <= set(data.column_names):
            raise ValueError(
                f"The data at {self.path!r} lacks the columns {sorted(wanted - set(data.column_names))}; it has "
                f"{sorted(data.column_names)}."
            )
        if self.where:
            conditions = self.where.items()
            data = data.filter(lambda row: all(row[column] == value for column, value in conditions))
        return data.rename_columns(self.columns) if self.columns else data


@dataclass
class ARMArguments:
    """Model, adapter and data of a training run.

    Args:
        model_name_or_path (`str`): The ARM's backbone.
        train_data (`list[PairData]`): The data sets, each as a mapping in YAML; see [`PairData`].
        eval_data (`list[PairData]`, *optional*): The same for evaluation.
        objectives (`list[str]`, *optional*): Names and order of the objectives; those of the data if not given.
        adapter (`str`, *optional*, defaults to `"pblora"`): `"pblora"`, `"svdlora"`, `"moslora"` or `"lora"`.
        adapter_kwargs (`dict`, *optional*): Further arguments of its configuration, such as `{r1: 4, r2: 4}`.
        target_modules (`list[str]`, *optional*): The modules to adapt; chosen by architecture if not given.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Quantize the backbone with bitsandbytes (QLoRA).
        resume (`bool`, *optional*, defaults to `False`): Go on from the last complete checkpoint.
    """

    model_name_or_path: str = field(metadata={"help": "The ARM's backbone."})
    train_data: list[PairData] = field(default_factory=list, metadata={"help": "Data sets, given in YAML."})
    eval_data: list[PairData] = field(default_factory=list, metadata={"help": "Data sets for evaluation."})
    objectives: list[str] | None = field(default=None, metadata={"help": "Names and order of the objectives."})
    adapter: str = field(default="pblora", metadata={"help": "pblora, svdlora, moslora or lora."})
    adapter_kwargs: dict | str | None = field(default=None, metadata={"help": "Of the adapter's configuration."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "The modules to adapt."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the backbone (QLoRA)."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})

    def __post_init__(self) -> None:
        if isinstance(self.adapter_kwargs, str):
            self.adapter_kwargs = cast(dict, json.loads(self.adapter_kwargs))
        self.train_data = [_as_pair_data(entry) for entry in self.train_data]
        self.eval_data = [_as_pair_data(entry) for entry in self.eval_data]
        if self.adapter not in ADAPTERS:
            raise ValueError(f"`adapter` is {self.adapter!r}, but it must be one of {', '.join(ADAPTERS)}.")

    def load(self, data: list[PairData]) -> dict[str, Dataset | IterableDataset] | None:
        """The data sets by objective, those with labels under a name of their own; `None` if there is none."""
        loaded = {entry.objective or f"pairs_{i}": entry.load() for i, entry in enumerate(data)}
        if len(loaded) < len(data):
            raise ValueError("Two data sets have the same objective. Join them into one file or data set first.")
        return loaded or None

    def peft_config(self, label_columns: dict[str, str] | None) -> PeftConfig:
        """The adapter's configuration, for the objectives given, or those of the data."""
        settings = {"target_modules": self.target_modules, "task_type": "CAUSAL_LM"}
        settings |= cast(dict, self.adapter_kwargs or {})
        if self.adapter == "lora":
            return LoraConfig(**settings)
        named = [entry.objective for entry in self.train_data if entry.objective]
        objectives = self.objectives or list(dict.fromkeys([*(label_columns or {}), *named]))
        config = {"pblora": PBLoraConfig, "svdlora": SVDLoraConfig, "moslora": MoSLoraConfig}[self.adapter]
        return config(objectives=objectives, **settings)

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """For a backbone in 4 bits (NF4, double quantization, computing in bfloat16)."""
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )


def _as_pair_data(entry: PairData | dict[str, Any]) -> PairData:
    if isinstance(entry, PairData):
        return entry
    unknown = sorted(set(entry) - set(PairData.__dataclass_fields__))
    if unknown or "path" not in entry:
        raise ValueError(
            f"A data set is given as {entry}, but it needs `path`, and may have "
            f"{', '.join(f for f in PairData.__dataclass_fields__ if f != 'path')}."
        )
    return PairData(**entry)
