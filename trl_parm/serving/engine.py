# SPDX-License-Identifier: Apache-2.0
"""What this package asks of an engine, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


INSTALL = (
    "This part of trl_parm.serving runs on vLLM, which is not installed here. Install it where the engine runs: "
    "pip install 'vllm>=0.32'."
)


def check_speculation(config: Any) -> None:
    """Raises `ValueError` if the engine drafts tokens: the requests of a family would accept different numbers."""
    if config.speculative_config is not None:
        raise ValueError("Coupled requests can't be guided under speculative decoding. Start the engine without it.")


def check_engine(config: Any) -> None:
    """Checks that an engine can run coupled requests.

    Args:
        config (`vllm.config.VllmConfig`): Of the engine.

    Raises:
        ValueError: an engine without our logits processor or without LoRA, with several data-parallel replicas, or
            that drafts tokens.
    """
    check_speculation(config)
    named = [_class_name(entry) for entry in config.model_config.logits_processors or ()]
    if not any(name.startswith("CoupledLogitsProcessor") for name in named):
        raise ValueError(
            "The engine has no logits processor that joins coupled requests, so the text would not be guided. Start "
            'it with logits_processors=["trl_parm.serving:CoupledLogitsProcessorV2"] (Model Runner V2, the default '
            'on GPUs) or "trl_parm.serving:CoupledLogitsProcessorV1" (the V1 runner: CPU, VLLM_USE_V2_MODEL_RUNNER=0).'
        )
    if config.lora_config is None:
        raise ValueError("The engine serves no LoRA, and guides are LoRAs. Start it with enable_lora=True.")
    replicas = config.parallel_config.data_parallel_size
    if replicas > 1:
        raise ValueError(
            f"The engine has {replicas} data-parallel replicas, and the requests of a family could land on different "
            "ones. Start one engine for each."
        )


def check_lora_slots(config: Any, loras: Iterable[int]) -> None:
    """Checks that no LoRA will sit in the slot that the CPU's kernels also apply to requests without LoRA.

    Requests without LoRA have the slot −1, which vLLM 0.32's kernels for CPUs take as the last one
    (vllm-project/vllm#48421): the base model would be the ARM, silently, as soon as all slots are in use.

    Args:
        config (`vllm.config.VllmConfig`): Of the engine.
        loras (`Iterable[int]`): The numbers of all LoRAs that it has loaded or will.

    Raises:
        ValueError: too many of them for this engine.
    """
    slots, used = config.lora_config.max_loras, len(set(loras))
    if used >= slots and _last_slot_leaks():
        raise ValueError(
            f"This engine has {slots} slots for LoRAs (max_loras), and {used} LoRAs are in use. On CPUs this vLLM "
            "applies the LoRA in the last slot to the base model's requests too (vllm-project/vllm#48421). Start "
            "the engine with max_loras above the number of LoRAs that it will ever load."
        )


def _last_slot_leaks() -> bool:
    """Whether the kernels of this platform read the slot −1 as the last one."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if not current_platform.is_cpu():
        return False
    from vllm.lora.ops.torch_ops import bgmv_shrink  # pyright: ignore[reportMissingImports]

    output = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1), output, torch.tensor([-1]), 1.0)
    return bool(output.any())


def _class_name(entry: Any) -> str:
    return entry.__name__ if isinstance(entry, type) else str(entry).rpartition(":")[2]
