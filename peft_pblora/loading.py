# SPDX-License-Identifier: Apache-2.0
"""Adapters from files that may be damaged: what PEFT warns of, or does not see, is an error here."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper, load_peft_weights
from torch import nn

from .base_weights import keep_weights, weights_below, without_base
from .config import PreferenceConfig
from .switch import backbone_of, changes_below


SHARED = ("vblora_vector_bank", "prompt_encoder", ".tinylora_v.", ".unilora_theta_d.")
"""Parts of the names of weights that some methods of PEFT keep once for all layers, and so not in every place."""


def load_adapter(
    model: Any,
    folder: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Loads an adapter of any method, as `PeftModel.from_pretrained` and `load_adapter` do, but whole or not at all,
    and without its file's weights of the base model, see [`without_base`].

    Args:
        model (`PreTrainedModel`, `PeftModel` or `None`): What it is put on; `None` loads the backbone that it names.
        folder (`str` or `Path`): The adapter: a folder or an id on the Hub.
        adapter_name (`str`, *optional*, defaults to `"default"`): Its name in the model, which has none of this name.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether it shall be trained.
        config (`PeftConfig`, *optional*): In the place of that in the folder, for a model without adapters.
        **kwargs: For PEFT's loading, such as `revision`; without a model those of the backbone's, such as `dtype`.

    Returns:
        `PeftModel`: `model` itself, if it is one.

    Raises:
        ValueError: a file that can't be read or has no tensors, weights that are NaN or infinite or no floating-point
            numbers, tensors that are missing, have another shape than the configuration (such as its number of
            objectives) and the model ask for, or have no place; weights of another base model; a `config` for a model
            with adapters; without a model, an adapter that names none, or one that is not there. The model is as it
            was then.
    """
    folder = str(folder)
    names = set(getattr(model, "peft_config", None) or ()) if model is not None else set()
    if config is not None and isinstance(model, PeftModel):
        raise ValueError(
            f"`config` is given, but the model has adapters already ({', '.join(sorted(names))}), and PEFT reads the "
            "folder's own then. Leave it out, or load onto a model without adapters."
        )
    place = {key: kwargs[key] for key in ("revision", "subfolder", "token") if key in kwargs}
    tensors = check_weights(folder, **place)
    with refused(folder):
        found = config or PeftConfig.from_pretrained(folder, **place)
        check_start(found)
    if adapter_name in names:
        raise ValueError(f"The model has an adapter {adapter_name!r} already. Give another `adapter_name`.")
    with refused(folder):
        kept = {} if model is None else keep_weights(model, found, tensors)
        own = tensors if model is None else without_base(model, found, tensors)
    put_back = _remember(model, found)
    try:
        kwargs |= {"adapter_name": adapter_name, "is_trainable": is_trainable}
        if isinstance(model, PeftModel):
            with refused(folder):
                model.load_adapter(folder, **kwargs)
            loaded = model
        elif model is None:
            loaded = _on_its_base(folder, place, config=config, **kwargs)
        else:
            with refused(folder):
                loaded = PeftModel.from_pretrained(model, folder, config=config, **kwargs)
        check_loaded(loaded, folder, adapter_name, tensors, place)
    except BaseException:
        if isinstance(model, PeftModel):
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
        elif model is not None and not names:
            _take_off(model)
        put_back()
        for one in kept.values():
            one.put_back()
        raise
    for key, one in kept.items():
        if own.get(key) is not tensors[key] or one.place.weight is not one.weight:
            one.put_back(own.get(key))
    return loaded


def named_base(folder: str, config: PeftConfig, otherwise: str = "") -> str:
    """The model that an adapter was trained on, by its configuration. Raises `ValueError` if that names none: it says
    to write it there, or what else there is to do."""
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {folder!r} names no base model: `base_model_name_or_path` in its adapter_config.json is "
            "empty, as PEFT writes it of a model made in memory. Write there which model it was trained on"
            f"{otherwise}."
        )
    return config.base_model_name_or_path


def _on_its_base(folder: str, place: dict[str, Any], **kwargs: Any) -> PeftModel:
    """An adapter on the model that it names. Raises `ValueError` if it names none, or that can't be read."""
    with refused(folder):
        named = PeftConfig.from_pretrained(folder, **place)
    base = named_base(folder, named, ", or load it onto that model")
    try:
        with refused(folder):
            return cast(PeftModel, AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs))
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        reason = shorten(str(error.__cause__), 120, placeholder="…").rstrip(".")
        raise ValueError(
            f"The adapter {folder!r} was trained on {base!r}, as `base_model_name_or_path` in its adapter_config.json "
            f"says, which can't be read ({reason}). Start where that folder is, write there which model it is, or "
            "load the adapter onto that model."
        ) from error.__cause__


def check_start(config: PeftConfig) -> None:
    """Raises `ValueError` for an adapter that is loaded onto another model than it was trained on: PiSSA by a random
    SVD puts other residuals into the weights each time."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        raise ValueError(
            f"`init_lora_weights={start!r}` draws its SVD anew where the adapter is loaded, which is another model "
            "then. Use 'pissa', or save it as a plain LoRA with PEFT's `path_initial_model_for_weight_conversion`"
        )


def check_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default", **place: Any) -> None:
    """Checks an adapter that was loaded from a folder, and has not been trained since: its weights are set once more.

    `place` is what it was loaded with of `revision`, `subfolder` and `token`.

    Raises:
        ValueError: as of [`load_adapter`].
    """
    check_loaded(model, str(folder), adapter_name, check_weights(folder, **place), place)


def check_loaded(
    model: PeftModel, folder: str, adapter_name: str, tensors: dict[str, torch.Tensor], place: dict[str, Any]
) -> None:
    """As [`check_adapter`], of tensors that were read before; where a model has other names for them, once more."""
    config = cast(Any, model.peft_config[adapter_name])
    if mapping := getattr(model.get_base_model(), "_checkpoint_conversion_mapping", None):
        tensors = check_weights(folder, key_mapping=mapping, **place)
    if isinstance(config, PreferenceConfig | LoraConfig):
        _refuse(folder, "no floating-point numbers", (k for k, v in tensors.items() if not v.is_floating_point()))
    if config.is_prompt_learning:
        return
    with refused(folder):
        base = weights_below(model, config, tensors)
        beside = {key: tensor for key, tensor in tensors.items() if key not in base}
        result = set_peft_model_state_dict(model, beside, adapter_name=adapter_name)
    prefix = cast(Any, PEFT_TYPE_TO_PREFIX_MAPPING).get(config.peft_type, "")
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Trained biases have neither prefix nor name.
    missing = [k for k in result.missing_keys if k in own or (prefix in k and adapter_name in k.split("."))]
    _refuse(folder, "missing", (key for key in missing if not any(part in key for part in SHARED)))
    _refuse(folder, "for another model: nothing here is called so", result.unexpected_keys)


def check_checkpoint(model: PeftModel, folder: str | Path, adapter_name: str) -> None:
    """Checks the file of an adapter that the same adapter of a model has been saved to, before it is loaded again.

    Raises:
        ValueError: as of [`load_adapter`].
    """
    folder, tensors = str(folder), check_weights(folder)
    own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _refuse(folder, "missing", own.keys() - tensors.keys())
    shared = own.keys() & tensors.keys()
    _refuse(folder, "of another type", (k for k in shared if not tensors[k].is_floating_point()))
    here = (key for key in shared if own[key].numel())  # other processes may have the rest
    _refuse(folder, "of another shape", (key for key in here if own[key].shape != tensors[key].shape))


def check_weights(folder: str | Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file, on the CPU. Raises `ValueError` if it can't be read, has none, or has some
    that are not finite."""
    folder = str(folder)
    if Path(folder).is_dir() and _file(folder) == folder and "subfolder" not in kwargs:
        raise ValueError(f"The adapter {folder!r} has no {SAFETENSORS_WEIGHTS_NAME}. Save it anew, or get it again.")
    with refused(folder):
        tensors = load_peft_weights(folder, device="cpu", **kwargs)
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"The adapter {_file(folder)!r} has no tensors. Save it anew, or get the file again.")
    numbers = {k: v for k, v in tensors.items() if v.is_floating_point() or v.is_complex()}
    _refuse(folder, "NaN or infinite", (k for k, v in numbers.items() if not torch.isfinite(v.float()).all()))
    return tensors


@contextmanager
def refused(folder: str) -> Iterator[None]:
    """Makes one `ValueError` of what PEFT raises where an adapter can't be read or does not fit."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("size mismatch")), " ".join(lines))
        reason = f"there is no {reason}" if isinstance(error, KeyError) else reason or type(error).__name__
        reason = shorten(reason, 300, placeholder="…").rstrip(".")
        raise ValueError(
            f"The adapter {_file(folder)!r} can't be loaded: {reason}. Get the file again, or name the model and the "
            "configuration, such as its number of objectives, that it was saved with."
        ) from error


def _refuse(folder: str, fault: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(
            f"The adapter {_file(folder)!r} is damaged: {len(found)} of its tensors are {fault} ({some}). Save it "
            "anew, or get the file again."
        )


def _file(folder: str) -> str:
    """The file with an adapter's weights, or its name on the Hub."""
    paths = (Path(folder, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    return next((str(path) for path in paths if path.is_file()), folder)


def _remember(model: nn.Module | None, config: PeftConfig) -> Callable[[], None]:
    """What puts a model back as it is now, when an adapter was taken off: what of it trains, its mode, and its weights
    if PEFT changes them below such an adapter."""
    if model is None:
        return lambda: None
    modes = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    changes = changes_below(config, backbone_of(model)) or ""
    only = ".bias" if changes.startswith("bias=") else ""
    kept = [one for name, one in model.named_parameters() if changes and name.endswith(only) and not one.is_meta]
    weights = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in kept]

    def put_back() -> None:
        for module, training in modes:
            module.training = training
        for parameter, required in trains:
            parameter.requires_grad_(required)
        for parameter, weight in weights:
            parameter.data.copy_(weight)

    return put_back


def _take_off(model: nn.Module) -> None:
    """Takes the layers of a broken adapter off a model that had none before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            below = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            model.set_submodule(name, cast(nn.Module, below))
    vars(model).pop("peft_config", None)
