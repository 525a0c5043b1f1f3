# SPDX-License-Identifier: Apache-2.0
"""The tuners: which modules of a model get a preference-conditioned layer, and how PEFT comes to know a method."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, mapping
from peft import PeftType as BuiltinType
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .base_weights import without_base
from .condition import Condition, staying_aside
from .config import PeftType, PreferenceConfig
from .layer import PreferenceLinear, preference_layers
from .rows import through_tuner


class PreferenceTuner(BaseTuner):
    """Puts a [`PreferenceLinear`] in the place of each targeted module. [`register`] derives one for each method."""

    tuner_layer_cls: ClassVar[type[PreferenceLinear]]
    conditions: dict[str, Condition]
    families: list[dict[str, Condition]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. All layers of an adapter share one [`Condition`], all of the method one dict of them, and all of
        the model one list of these dicts."""
        former: list[Any] = preference_layers(model)
        own = [layer for layer in former if isinstance(layer, self.tuner_layer_cls)]
        self.conditions = own[0].conditions if own else {}
        self.families = former[0].families if former else []
        for conditions in (self.conditions, *(layer.conditions for layer in former)):
            if not any(conditions is known for known in self.families):
                self.families.append(conditions)
        config: Any = self.peft_config[adapter_name]
        self._new_condition = Condition(config.objectives, config.initial_preference)
        asked = config.target_modules
        _maybe_include_all_linear_layers(config, model)
        if asked != config.target_modules:  # it was "all-linear", which means linear layers alone here
            linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
            config.target_modules -= {
                name for name, module in linear if not is_linear(module) or _never_acts(model, name, module)
            }
        with staying_aside(self.conditions.values()):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.conditions[adapter_name] = self._new_condition

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, see [`Condition`]."""
        with through_tuner(torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's. What a processor guides, `reads_apart` being true, is the model without what guides it."""
        with nullcontext() if _reads_apart(args, kwargs) else through_tuner(gradients=False):
            return self.model.generate(*args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Raises `ValueError` for a layer whose weight is tied: merging would change two layers."""
        self._check_untied(adapter_names)
        super().merge_adapter(adapter_names, *args, **kwargs)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if merge:
            self._check_untied(adapter_names)
        return super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)

    def _check_untied(self, adapter_names: list[str] | None) -> None:
        owners = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        for name, layer in self.model.named_modules():
            if not isinstance(layer, PreferenceLinear) or owners[id(layer.get_base_layer().weight)] < 2:
                continue
            merged = layer.active_adapters if adapter_names is None else adapter_names
            if not set(merged).isdisjoint(layer.adapters):
                raise ValueError(
                    f"The weight of {name} is another module's too, such as the embedding's, so that merging would "
                    "change both. Leave the adapter unmerged, or load the model with `tie_word_embeddings=False`."
                )

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, **_: Any) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config, self._new_condition)
            return
        if reason := _never_acts(self.model, target_name, target):
            raise ValueError(reason)
        kwargs = {"condition": self._new_condition, **get_quantization_kwargs(self)}
        layer: Any = self._create_new_module(config, adapter_name, target, **kwargs)
        layer.conditions, layer.families = self.conditions, self.families
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _create_new_module(
        cls, config: PreferenceConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> PreferenceLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.Linear | Conv1D):
            if not is_linear(base):
                raise TypeError(
                    f"Target module {base} does not give the output of a linear layer, or not that alone. Leave it "
                    "out by `exclude_modules`."
                )
            transposed = isinstance(base, Conv1D)
            if config.fan_in_fan_out != transposed:
                warnings.warn(
                    f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is "
                    f"`{'Conv1D' if transposed else 'torch.nn.Linear'}`. Setting fan_in_fan_out to {transposed}.",
                    stacklevel=2,
                )
                config.fan_in_fan_out = transposed
        else:
            backend = resolve_quantization_backend(base)
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally "
                    "quantized) and `transformers.pytorch_utils.Conv1D` are supported."
                )
        return cls.tuner_layer_cls(target, adapter_name, config=config, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """For the time of a call of a `PeftModel`, which without a task calls the model below at once: it is through
        the tuner all the same."""
        acting = nullcontext() if _reads_apart(args, kwargs) else through_tuner(torch.is_grad_enabled())
        with acting, self._handing_on(kwargs):
            yield

    @contextmanager
    def _handing_on(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Hands `adapter_names`, one name for each row of the batch, to every layer for the time of a call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.conditions) - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        expanded = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        model: Any = self.model
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        # An encoder runs before beams are expanded.
        in_encoder = set() if encoder is None or encoder is model else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, adapter_names=adapter_names if module in in_encoder else expanded),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, self.tuner_layer_cls | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".{cls.prefix}adapter."
        return key.replace(f"{container}{adapter_name}.", container, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        tensors = without_base(model, config, cast(PreferenceConfig, config).rename_tensors(state_dict))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)


def _add_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _reads_apart(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a logits processor of a call of `generate`, by its name or position, reads the model without what guides
    it."""
    given = [kwargs.get("logits_processor") or (), *(value for value in args if isinstance(value, list | tuple))]
    return any(getattr(processor, "reads_apart", False) for processors in given for processor in processors)


def _never_acts(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why an adapter of a module would not act: the model reads its weight without calling it. Else `None`.

    PEFT knows such modules for LoRA, by the model's type and their own last name.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            f"Module {name!r} is the output of an `nn.MultiheadAttention`, which reads its weight and never calls it, "
            "so that an adapter would not act. Leave it out of `target_modules`, or by `exclude_modules`."
        )
    kind, own = getattr(getattr(model, "config", None), "model_type", None), name.rpartition(".")[2]
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, own)
    except ValueError as error:
        return str(error)
    if own == "dt_proj" and kind in ("falcon_mamba", "jamba", "mamba"):
        return (
            f"Module {own!r} of a model of type {kind!r} is never called: the model reads its weight, so that an "
            "adapter would not act. Leave it out of `target_modules`."
        )
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module, an `nn.Linear` or `Conv1D` by its class, maps `(..., n)` to `(..., m)` and no more.

    Some inherit from one and do more, such as routers that return a tuple. Where it has a forward of its own that is
    asked for shapes, without computing or hooks. A quantised layer need not answer.
    """
    kind: Any = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or resolve_quantization_backend(module) is not None:
        return True
    weight, (inputs, outputs) = cast(torch.Tensor, module.weight), _get_in_out_features(module)
    try:
        # Compiled code would take the fake tensors' memory for real.
        with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x = torch.empty(1, 2, cast(int, inputs), dtype=weight.dtype, device=weight.device)
            output = kind.forward(module, x)
    except Exception:
        return type(weight) is not nn.Parameter or weight.dtype.itemsize < 2
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, outputs)


def register(name: str, config_cls: type[PreferenceConfig]) -> type[PreferenceTuner]:
    """Makes a method of a configuration: `get_peft_model`, `PeftModel.from_pretrained` and the rest then know it.

    All else that PEFT wants of a method, its type, a prefix for names of parameters, a layer and a tuner, is derived.
    Calling twice is harmless. Where PEFT, or another package, already owns the name or the prefix, that one stays and
    a warning says so; the configuration then refuses to be made. Nothing that PEFT installed is touched.

    Args:
        name (`str`): The method's name in PEFT, in capitals, such as `"PBLORA"`; `ValueError` is raised for others.
        config_cls (`type`): Its configuration, which builds the core; it gets `method` and `tuner_cls`.

    Returns:
        `type`: The tuner, also found as `config_cls.tuner_cls`.
    """
    if not (name.isidentifier() and name.isupper()):
        raise ValueError(f"`name` is {name!r}, but PEFT's methods have names in capitals, such as 'PBLORA'.")
    registries: Any = mapping  # annotated with PEFT's own enum
    if registries.PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is config_cls:
        return config_cls.tuner_cls
    method, prefix = PeftType(name), f"{name.lower()}_"
    if vars(config_cls).get("method") != method:
        layer = _derive(PreferenceLinear, config_cls, "Linear", "tuner_cls.tuner_layer_cls", prefix=prefix)
        tuner = _derive(PreferenceTuner, config_cls, "Model", "tuner_cls", prefix=prefix, tuner_layer_cls=layer)
        config_cls.method, config_cls.tuner_cls = method, tuner
    taken = name in BuiltinType.__members__ or name in registries.PEFT_TYPE_TO_CONFIG_MAPPING
    if taken or prefix in registries.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        warnings.warn(
            f"PEFT already has a method {name} or a parameter prefix {prefix!r}. It takes precedence; the "
            f"{config_cls.__name__} of {config_cls.__module__} can't be used beside it.",
            stacklevel=2,
        )
    else:
        registries.PEFT_TYPE_TO_CONFIG_MAPPING[method] = config_cls
        registries.PEFT_TYPE_TO_TUNER_MAPPING[method] = config_cls.tuner_cls
        registries.PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix
    return config_cls.tuner_cls


def _derive(base: type, config_cls: type, suffix: str, place: str, **members: Any) -> Any:
    """A subclass that pickle finds through the configuration, which has to be found anyway."""
    members |= {
        "__module__": config_cls.__module__,
        "__qualname__": f"{config_cls.__qualname__}.{place}",
        "__doc__": f"{base.__doc__} Here, of [`{config_cls.__name__}`].",
    }
    return type(base)(config_cls.__name__.removesuffix("Config") + suffix, (base,), members)
