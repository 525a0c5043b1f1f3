# SPDX-License-Identifier: Apache-2.0
"""Registers our tuners with PEFT through its public registries, touching nothing that PEFT installed."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftType as BuiltinType
from peft import mapping

from .config import PeftType, PreferenceConfig
from .layer import PreferenceLinear
from .model import PreferenceTuner


def register(name: str, config_cls: type[PreferenceConfig]) -> type[PreferenceTuner]:
    """Makes a method of a configuration: `get_peft_model`, `PeftModel.from_pretrained` and the rest then know it.

    All else that PEFT wants of a method, its type, a prefix for names of parameters, a layer and a tuner, is derived.
    Calling twice is harmless. Where PEFT, or another package, already owns the name or the prefix, that one stays and
    a warning says so; the configuration then refuses to be made.

    Args:
        name (`str`): The method's name in PEFT, in capitals, such as `"PBLORA"`.
        config_cls (`type`): Its configuration, which builds the core; it gets `method` and `tuner_cls`.

    Returns:
        `type`: The tuner, also found as `config_cls.tuner_cls`.

    Raises:
        ValueError: a name that is not in capitals.
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
