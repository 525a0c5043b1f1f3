# SPDX-License-Identifier: Apache-2.0
"""Guidance on vLLM, unchanged: each sample is a family of coupled requests of one engine, whose rows are joined.

The base model's request runs without LoRA and each guide's with the LoRA that `peft_pblora.save_as_lora` writes; a
logits processor writes the guided distribution into all their rows, so that all of them write the same text. `combine`
needs torch alone; names load on first use, and those of the engine raise an `ImportError` where vLLM is missing.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .async_client import AsyncGuidance
    from .client import guided_generate
    from .distribution import combine
    from .guidance import Guidance
    from .v1_runner import CoupledLogitsProcessorV1
    from .v2_runner import CoupledLogitsProcessorV2

_HOMES = {
    "AsyncGuidance": "async_client",
    "CoupledLogitsProcessorV1": "v1_runner",
    "CoupledLogitsProcessorV2": "v2_runner",
    "Guidance": "guidance",
    "combine": "distribution",
    "guided_generate": "client",
}

__all__ = [
    "AsyncGuidance",
    "CoupledLogitsProcessorV1",
    "CoupledLogitsProcessorV2",
    "Guidance",
    "combine",
    "guided_generate",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
