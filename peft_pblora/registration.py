# SPDX-License-Identifier: Apache-2.0
"""Registers our tuners with PEFT through its public registries, touching nothing that PEFT installed."""

import enum
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

    Raises:
        RuntimeError: PEFT or another package already owns the method's name or prefix.
    """
    from peft import PeftType as BuiltinType
    from peft import mapping

    types: Any = mapping  # the registries are annotated with PEFT's own enum

    name, prefix = peft_type.value, model_cls.prefix
    if types.PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is config_cls:
        return
    if name in BuiltinType.__members__ or name in mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise RuntimeError(
            f"This PEFT already has a method called {name}, which takes precedence over the one of peft_pblora. "
            f"Use PEFT's own, or install a PEFT version without it."
        )
    if prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise RuntimeError(f"Another PEFT method already uses the parameter prefix {prefix!r} of {name}.")
    types.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    types.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    types.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
