# SPDX-License-Identifier: Apache-2.0
"""Registers our tuners with PEFT through its public registries, touching nothing that PEFT installed."""

import enum
import warnings
from typing import Any


class PeftType(str, enum.Enum):  # noqa: UP042 - PEFT reads str(member) as "PeftType.NAME", which StrEnum lacks
    """Sibling of `peft.PeftType` for the methods of this package.

    PEFT only ever looks a type up in its registries, compares it, and reads `.value` or `str()`, so a member of our
    own str-Enum serves wherever one of PEFT's does, and can be unpickled in a process that has not imported us yet.
    """

    PBLORA = "PBLORA"
    SVDLORA = "SVDLORA"
    MOSLORA = "MOSLORA"


def register(peft_type: PeftType, config_cls: type, model_cls: Any) -> None:
    """Makes `get_peft_model`, `PeftModel.from_pretrained` and the rest know `config_cls`. Calling twice is harmless.

    Where PEFT, or another package, already owns the method's name or prefix, that one stays and a warning says so;
    [`check_registered`] then refuses our config.
    """
    from peft import PeftType as BuiltinType
    from peft import mapping

    types: Any = mapping  # the registries are annotated with PEFT's own enum
    name, prefix = peft_type.value, model_cls.prefix
    if types.PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is config_cls:
        return
    taken = name in BuiltinType.__members__ or name in types.PEFT_TYPE_TO_CONFIG_MAPPING
    if taken or prefix in types.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        warnings.warn(
            f"PEFT already has a method {name} or a parameter prefix {prefix!r}. It takes precedence; the "
            f"{config_cls.__name__} of peft_pblora can't be used beside it.",
            stacklevel=2,
        )
        return
    types.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    types.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    types.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix


def check_registered(peft_type: PeftType, config_cls: type) -> None:
    """Raises `RuntimeError` if the name of the method belongs to another config class than ours."""
    from peft import mapping

    types: Any = mapping
    owner = types.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type.value, config_cls)
    if not issubclass(config_cls, owner):
        raise RuntimeError(
            f"PEFT's method {peft_type.value} belongs to {owner.__module__}.{owner.__name__}, not to peft_pblora. "
            f"Use {owner.__name__}, or a PEFT version without a method of that name."
        )
