# SPDX-License-Identifier: Apache-2.0
"""What [`PreferenceARMTrainer`] does before its first step: checks, model, tokenizer, adapter, objectives, data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_pblora import as_preference, get_objectives, name_preference
from peft_pblora.control import has_preference

from .compat import create_model_from_path, get_config_model_id
from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, tokenize_pairs


PairDatasets = Mapping[str, Dataset]


def check_datasets(train: PairDatasets | None, evaluation: PairDatasets | None) -> PairDatasets:
    """Returns the training data, or raises unless both are mappings with the same objectives."""
    if train is None:
        raise ValueError("`train_dataset` is required: a mapping from objective name to preference data set.")
    for name, data in (("train_dataset", train), ("eval_dataset", evaluation)):
        if data is not None and not isinstance(data, Mapping):
            raise TypeError(
                f"`{name}` is a {type(data).__name__}. Give a mapping such as {{'helpful': dataset, ...}} with one "
                "preference data set for each objective."
            )
    if evaluation is not None and set(evaluation) != set(train):
        raise ValueError(
            f"`eval_dataset` has the objectives {sorted(evaluation)}, but `train_dataset` has {sorted(train)}."
        )
    return train


def load_model(model, args: PreferenceARMConfig, quantization_config):
    """Loads a model given by id as TRL does; a loaded one is returned as it is."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("`quantization_config` needs a model id; this model is loaded already.")
        return model
    kwargs: dict[str, Any] = dict(cast(dict, args.model_init_kwargs or {}))
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if cast(PartialState, args.distributed_state).distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **kwargs)


def load_tokenizer(model, tokenizer, args: PreferenceARMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token that tokenizer and model agree on."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            get_config_model_id(model.config), trust_remote_code=args.trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither a pad token nor an end token. Set `tokenizer.pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def adapt_model(model, args: PreferenceARMConfig, peft_config: PeftConfig | None):
    """Wraps the model in a fresh adapter if a configuration is given."""
    if peft_config is not None:
        if is_peft_model(model):
            raise ValueError("`model` is a PeftModel already, so `peft_config` can't be used. Leave one of them out.")
        model = get_peft_model(model, peft_config)
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def match_objectives(model, datasets: PairDatasets) -> list[str]:
    """The objectives in the adapter's order. Raises `ValueError` if data and adapter differ."""
    if has_preference(model):
        objectives = get_objectives(model)
        if set(objectives) != set(datasets):
            raise ValueError(
                f"`train_dataset` has the objectives {sorted(datasets)}, but the adapter was made for {objectives}. "
                "Give `PBLoraConfig(objectives=...)` the names of the data sets."
            )
        return objectives
    if len(datasets) > 1:
        raise ValueError(
            f"The model has no preference-conditioned adapter, but there are {len(datasets)} objectives "
            f"({', '.join(datasets)}). Pass `peft_config=PBLoraConfig(objectives=[...])`, or train on one objective."
        )
    return list(datasets)


def name_preferences(given: list | None, objectives: list[str]) -> dict[str, torch.Tensor]:
    """The evaluation preferences by name: the given ones, or the vertices and the uniform vector."""
    if given is None:
        given = torch.eye(len(objectives)).tolist()
        if len(objectives) > 1:
            given.append([1 / len(objectives)] * len(objectives))
    return {name_preference(p, objectives): as_preference(p, objectives) for p in given}


def join_datasets(
    datasets: PairDatasets | None, tokenizer, args: PreferenceARMConfig, once: bool = False
) -> JointPreferenceDataset | None:
    """Tokenizes the data sets of all objectives and zips them."""
    if datasets is None:
        return None
    with args.main_process_first(desc="tokenizing"):
        return JointPreferenceDataset(
            {name: tokenize_pairs(data, name, tokenizer, args.max_length) for name, data in datasets.items()},
            once,
        )
