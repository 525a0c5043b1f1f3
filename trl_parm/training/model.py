# SPDX-License-Identifier: Apache-2.0
"""The model that [`PreferenceARMTrainer`] trains: loaded, with its tokenizer and its adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model, parse_flag_from_env
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

from peft_pblora import MoSLoraConfig, PreferenceConfig, embed_objectives
from peft_pblora.loading import check_start
from trl_parm.cpu import optimize_loaded
from trl_parm.loading import load_whole

from .config import PreferenceARMConfig


logger = logging.get_logger(__name__)


class Limits(NamedTuple):
    """What a model can read: tokens that it has embeddings for, and places in a text; `None` for any. Of the places
    some are reserved for what comes to a prompt while it trains."""

    vocabulary: int | None = None
    positions: int | None = None
    reserved: int = 0


def limits_of(model: Any) -> Limits:
    """The limits of a model's embeddings, and of the positions that its configuration names."""
    embeddings, config = getattr(model.get_input_embeddings(), "num_embeddings", None), model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT's
    return Limits(embeddings, next((n for name in names if (n := getattr(config, name, None))), None))


def check_causal(model: Any) -> None:
    """Raises `ValueError` for a model that does not write a text from left to right."""
    base = model.get_base_model() if is_peft_model(model) else model
    encoder = getattr(base.config, "is_encoder_decoder", False)
    if encoder or not base.can_generate():
        kind = "an encoder-decoder" if encoder else "no language model that writes"
        raise ValueError(
            f"The model {type(base).__name__} is {kind}, but a reward model must be a causal language model: it "
            "judges each token by those before it. Load one with `AutoModelForCausalLM`."
        )


def check_device(args: PreferenceARMConfig) -> None:
    """Raises `ValueError` for what the device can't do."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would need torch.nn.DataParallel, which is not supported. Start one "
            "process for each, such as with `accelerate launch`."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError("`activation_offloading=True` moves activations to the CPU, where this run computes already.")


def load_model(model: Any, args: PreferenceARMConfig, quantization_config: Any) -> Any:
    """Loads a model given by id as TRL does; a loaded one is returned as it is."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("`quantization_config` needs a model id; this model is loaded already.")
        if args.model_init_kwargs:
            logger.warning("`model_init_kwargs` is not used, since the model is loaded already.")
        return model
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **cast(dict, args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if cast(PartialState, args.distributed_state).distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    model = load_whole(create_model_from_path, model, **kwargs)
    if args.optimize_for_cpu and not is_sharded(args) and args.device.type == "cpu":
        optimize_loaded(model, str(kwargs.get("dtype", "auto")).removeprefix("torch."))
    return model


def is_sharded(args: PreferenceARMConfig) -> bool:
    """Whether weights are spread over processes, and come and go: with FSDP, and with DeepSpeed's ZeRO 3. The
    `distributed_type` does not say so before there is an accelerator."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled()


def load_tokenizer(model, tokenizer, args: PreferenceARMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token that tokenizer and model agree on."""
    if tokenizer is None:
        name, revision = get_config_model_id(model.config), cast(dict, args.model_init_kwargs or {}).get("revision")
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` is a {type(tokenizer).__name__}, but only texts are trained on. Give a tokenizer, "
            "such as the `tokenizer` of a processor."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no end token, which every response must end in. Set `tokenizer.eos_token`."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    known = limits_of(model).vocabulary
    if known is not None and cast(int, tokenizer.pad_token_id) >= known:
        raise ValueError(
            f"The pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but the model has embeddings "
            f"for {known} tokens. Set `tokenizer.pad_token` to a token that it has, such as the end token, or call "
            "`model.resize_token_embeddings(len(tokenizer))`."
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def adapt_model(model, args: PreferenceARMConfig, peft_config: PeftConfig | None, tokenizer: Any = None):
    """Wraps the model in a fresh adapter if a configuration is given, and readies it for training.

    Descriptions of objectives that have no embeddings yet get them, from the model and the tokenizer.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    zero_3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"`peft_config` is a {type(peft_config).__name__}, but it must be a `PeftConfig`.")
        if is_peft_model(model):
            raise ValueError("`model` is a PeftModel already, so `peft_config` can't be used. Leave one of them out.")
        peft_config = copy.deepcopy(peft_config)  # PEFT fills in what it finds, and a run its card
        check_start(peft_config)
        if isinstance(peft_config, MoSLoraConfig) and peft_config.lacks_embeddings:
            peft_config = embed_objectives(peft_config, model, tokenizer)
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


def check_unconditioned(adapter: PeftConfig | None) -> None:
    """Raises `ValueError` for an adapter that has a preference, in the place of prompts with one."""
    if isinstance(adapter, PreferenceConfig):
        raise ValueError(
            "`preference_template` writes preferences into prompts, but the model has a preference-conditioned "
            "adapter. Leave the template out, or use a plain `LoraConfig`."
        )


def trained_adapter(model) -> str | None:
    """The name of the adapter that trains, which is the active one; `None` for a model without adapters.

    Raises:
        ValueError: several adapters are active, the active one is tuned by prompt learning, or nothing of it, or of
            the whole model, trains.
    """
    active = model.active_adapters if is_peft_model(model) else []
    if getattr(model, "_hf_peft_config_loaded", False):
        active = model.active_adapters()
    if len(active) > 1:
        raise ValueError(
            f"The adapters {active} are active, but one trains at a time. Call `set_adapter` with its name."
        )
    name = active[0] if active else None
    if name is not None and model.peft_config[name].is_prompt_learning:
        raise ValueError(
            f"The adapter {name!r} is tuned by prompt learning, whose tokens or cache no guide can have. Use a method "
            "that adapts layers, such as `LoraConfig`."
        )
    if any(p.requires_grad for path, p in model.named_parameters() if name is None or name in path.split(".")):
        return name
    if name is None:
        raise ValueError("No weight of the model trains. Call `model.requires_grad_()`, or give a `peft_config`.")
    raise ValueError(
        f"No weight of the active adapter {name!r} trains. Load it with `PeftModel.from_pretrained(..., "
        "is_trainable=True)`."
    )


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(model: nn.Module) -> None:
    """Sets all dropout to 0: of modules, and the probabilities that modules and configurations keep for functions.

    The name of such a probability has "drop" in it, in the models of transformers; [`without_noise`] finds others.
    """
    disable_dropout_in_model(model)
    modules = list(model.modules())
    configs = [m.config for m in modules if isinstance(getattr(m, "config", None), PreTrainedConfig)]
    for holder in (*modules, *configs):
        for name, value in vars(holder).items():
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)


def without_noise(forward: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """The result of a forward, after making sure that it makes nothing of the random numbers it draws, if it does.

    Raises:
        ValueError: its results scatter from seed to seed by more than they do at one.
    """
    before = _random_states(device)
    result = forward()
    if all(map(torch.equal, before, _random_states(device))):
        return result
    found = []
    for seed in (0, 0, 1):
        with torch.no_grad(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(seed)
            found.append(forward())
    if (found[0] - found[2]).abs().max() > 10 * (found[0] - found[1]).abs().max():
        raise ValueError(
            f"`disable_dropout=True`, but log-probabilities scatter from forward to forward, {found[0].tolist()} and "
            f"{found[2].tolist()}: the model has noise that could not be found. Switch it off in the model's "
            "configuration, or set `disable_dropout=False`."
        )
    return result


def _random_states(device: torch.device) -> list[torch.Tensor]:
    on_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *on_device]
