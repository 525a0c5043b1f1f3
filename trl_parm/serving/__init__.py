# SPDX-License-Identifier: Apache-2.0
"""Guidance on vLLM, unchanged: each sample is a family of coupled requests of one engine, whose rows are joined.

The base model's request runs without LoRA and each guide's with the LoRA that `peft_pblora.save_as_lora` writes; a
logits processor writes the guided distribution into all their rows, so that all of them write the same text. `combine`
needs torch alone; names load on first use, and those of the engine raise an `ImportError` where vLLM is missing.
"""

from typing import TYPE_CHECKING

from trl_parm.lazy import lazy_names


if TYPE_CHECKING:
    from .client import AsyncGuidance, guided_generate
    from .guidance import Guidance, Mixture
    from .rows import combine
    from .v1_runner import CoupledLogitsProcessorV1
    from .v2_runner import CoupledLogitsProcessorV2

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "client": ("AsyncGuidance", "guided_generate"),
        "guidance": ("Guidance", "Mixture"),
        "rows": ("combine",),
        "v1_runner": ("CoupledLogitsProcessorV1",),
        "v2_runner": ("CoupledLogitsProcessorV2",),
    },
)
