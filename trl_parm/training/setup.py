# SPDX-License-Identifier: Apache-2.0
"""The model that [`PreferenceARMTrainer`] trains: loaded, with its tokenizer and its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import PeftConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_pblora import as_preference, name_preference

from .compat import create_model_from_path, get_config_model_id
from .config import PreferenceARMConfig


logger = logging.get_logger(__name__)


def check_device(args: PreferenceARMConfig) -> None:
    """Raises `ValueError` for what the device can't do."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would need torch.nn.DataParallel, which is not supported. Start one "
            "process for each, such as with `accelerate launch`."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("`activation_offloading=True` moves activations to the CPU, where this run computes already.")


def load_model(model, args: PreferenceARMConfig, quantization_config):
    """Loads a model given by id as TRL does; a loaded one is returned as it is."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("`quantization_config` needs a model id; this model is loaded already.")
        if args.model_init_kwargs:
            logger.warning("`model_init_kwargs` is not used, since the model is loaded already.")
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
        kwargs = cast(dict, args.model_init_kwargs or {})
        tokenizer = AutoTokenizer.from_pretrained(
            get_config_model_id(model.config),
            revision=kwargs.get("revision"),
            trust_remote_code=args.trust_remote_code,
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no end token, which every response must end in. Set `tokenizer.eos_token`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def adapt_model(model, args: PreferenceARMConfig, peft_config: PeftConfig | None):
    """Wraps the model in a fresh adapter if a configuration is given, and readies it for training."""
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    zero_3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"`peft_config` is a {type(peft_config).__name__}, but it must be a `PeftConfig`.")
        if is_peft_model(model):
            raise ValueError("`model` is a PeftModel already, so `peft_config` can't be used. Leave one of them out.")
        # ZeRO-3 gathers parameters in the dtype of the first one, so all must have the same (trl#6089).
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=not zero_3 or quantized)
    if is_peft_model(model) and args.gradient_checkpointing:
        if zero_3:
            # The only kind of checkpointing that works with PEFT there (trl#2514).
            kwargs = dict(cast(dict, args.gradient_checkpointing_kwargs or {}), use_reentrant=True)
            # The trainer reads the second name, TRL the first.
            args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = kwargs
        model.enable_input_require_grads()
    if quantized:
        # QLoRA trains its adapter in bfloat16 (arXiv 2305.14314, section 3).
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def name_preferences(given: list | None, objectives: list[str]) -> dict[str, torch.Tensor]:
    """Preferences by name: the given ones, or the vertices and the uniform vector."""
    if given is None:
        given = torch.eye(len(objectives)).tolist()
        if len(objectives) > 1:
            given.append([1 / len(objectives)] * len(objectives))
    return {name_preference(p, objectives): as_preference(p, objectives) for p in given}


def last_complete_checkpoint(folder: str | Path) -> str:
    """The newest checkpoint in a folder that was written to its end: the trainer's state is written last.

    Raises:
        ValueError: there is none.
    """
    found = [
        path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.split("-")[-1].isdigit() and _is_json(path / TRAINER_STATE_NAME)
    ]
    if not found:
        raise ValueError(
            f"There is no complete checkpoint in {str(folder)!r} to resume from. Train without "
            "`resume_from_checkpoint`, or name a checkpoint's folder."
        )
    return str(max(found, key=lambda path: int(path.name.split("-")[-1])))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
