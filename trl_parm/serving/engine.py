# SPDX-License-Identifier: Apache-2.0
"""What this package asks of an engine, checked before anything runs, and its room for whole families.

vLLM schedules requests, not families, and the one at the edge of its room would come apart. So a family is admitted
only if the engine can run all of it, to its longest, together with all that is running.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


INSTALL = (
    "This part of trl_parm.serving runs on vLLM, which is not installed here. Install it where the engine runs: "
    "pip install 'vllm>=0.32'."
)


SCORES = "processed_logits"
"""The `logprobs_mode` of an engine whose requests tell what our processor writes into their rows."""
LORAS = 8
"""Slots for LoRAs of an engine that is started here, if no `max_loras` is given."""
OURS = ("model", "enable_lora", "max_lora_rank", "logits_processors")
"""Arguments of an engine that are set here."""


def engine_arguments(model: str, rank: int, given: Mapping[str, Any] | None, ours: Iterable[str] = ()) -> dict:
    """The arguments of an engine that runs coupled requests, those that were given among them.

    Args:
        model (`str`): The base model.
        rank (`int`): Of the LoRAs.
        given (`Mapping`, *optional*): Further arguments.
        ours (`Iterable[str]`): Further ones than [`OURS`] that are set here.

    Raises:
        ValueError: one that is set here, or no slots for LoRAs.
    """
    slots = lora_slots(given, ours)
    return {
        **(given or {}), "max_loras": slots, "model": model, "enable_lora": True, "max_lora_rank": rank,
        "logits_processors": [f"trl_parm.serving:CoupledLogitsProcessor{'V1' if _runs_v1() else 'V2'}"],
    }  # fmt: skip


def lora_slots(given: Mapping[str, Any] | None, ours: Iterable[str] = ()) -> int:
    """The slots for LoRAs that an engine with these arguments has. Raises `ValueError` as [`engine_arguments`]."""
    given = given or {}
    if wrong := [name for name in given if name.replace("-", "_") in {*OURS, *ours}]:
        raise ValueError(f"`engine_args` has {', '.join(wrong)}, which is set here. Leave it out.")
    slots = given.get("max_loras", LORAS)
    if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
        raise ValueError(f"`max_loras` is {slots!r}, but it must be 1 or larger: guides are LoRAs, which need slots.")
    return slots


def usable_slots(slots: int) -> int:
    """How many LoRAs may be in so many slots at a time, see [`check_lora_slots`]."""
    return slots - 1 if _last_slot_leaks() else slots


def _runs_v1() -> bool:
    """Whether this vLLM runs models by its V1 runner."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    return current_platform.is_cpu() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"


def check_speculation(config: Any) -> None:
    """Raises `ValueError` if the engine drafts tokens: the requests of a family would accept different numbers."""
    if config.speculative_config is not None:
        raise ValueError("Coupled requests can't be guided under speculative decoding. Start the engine without it.")


def check_engine(config: Any) -> None:
    """Raises `ValueError` unless the engine of a `VllmConfig` can run coupled requests: with our logits processor and
    LoRA, in one replica, and without drafts or prompts that it cuts."""
    check_speculation(config)
    processors = config.model_config.logits_processors or ()
    names = [p.__name__ if isinstance(p, type) else str(p).rpartition(":")[2] for p in processors]
    if not any(name.startswith("CoupledLogitsProcessor") for name in names):
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
    if config.scheduler_config.long_prefill_token_threshold:
        raise ValueError(
            "The engine cuts long prompts (long_prefill_token_threshold). Start it without, for coupled requests."
        )


def check_lora_slots(config: Any, loras: set[int]) -> None:
    """Raises `ValueError` if one of all LoRAs that an engine will have loaded, by their numbers, will sit in the slot
    that the CPU's kernels also apply to requests without LoRA.

    Those have the slot −1, which vLLM 0.32's kernels for CPUs take as the last one (vllm-project/vllm#48421): the base
    model would be the ARM, silently, as soon as all slots are in use.
    """
    slots, used = config.lora_config.max_loras, len(loras)
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


@dataclass
class Need:
    """What a family takes of the engine: requests, tokens of all their prompts, blocks of keys and values if they
    write as much as they may, and LoRAs by their numbers.

    Once its prompts are read, it takes one token for each request a step instead.
    """

    requests: int
    prompt_tokens: int
    blocks: int
    loras: frozenset[int]
    prompt_read: bool = False


class Capacity:
    """The room of an engine, by its `VllmConfig` after its start and the LoRAs that it has, and what it lends."""

    def __init__(self, config: Any, loras: Iterable[int] = ()) -> None:
        check_engine(config)
        self._config, self._known_loras = config, set(loras)
        scheduler, cache = config.scheduler_config, config.cache_config
        self._length = config.model_config.max_model_len
        self._seqs = scheduler.max_num_active_seqs or scheduler.max_num_seqs
        self._tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        # One block is the engine's own.
        self._blocks = cache.num_gpu_blocks - 1 - int(scheduler.watermark * cache.num_gpu_blocks)
        self._block_size = cache.block_size
        self._loras = config.lora_config.max_loras
        self._taken: dict[str, Need] = {}

    def need(self, prompt_length: int, max_tokens: int | None, loras: Sequence[int | None], texts: int = 1) -> Need:
        """What a family of one base request and a guide for each LoRA takes (`None`: a guide without one), or so many
        texts without guides. Raises `ValueError` for a prompt that leaves no room to write, or a family that this
        engine can never run together."""
        if not 0 < prompt_length < self._length:
            raise ValueError(f"A prompt has {prompt_length} tokens, but the engine takes 1 to {self._length - 1}.")
        requests = texts * (1 + len(loras))
        longest = min(prompt_length + (max_tokens or self._length), self._length)
        blocks = requests * math.ceil(longest / self._block_size)
        used = frozenset(lora for lora in loras if lora is not None)
        need = Need(requests, requests * prompt_length, blocks, used)
        if lacking := self._lacking([need]):
            raise ValueError(
                f"A prompt of {prompt_length} tokens with {len(loras)} guides can't run in this engine together: "
                f"{lacking}. Start the engine with more of it."
            )
        check_lora_slots(self._config, self._known_loras | need.loras)
        self._known_loras |= need.loras
        return need

    def take(self, name: str, need: Need) -> bool:
        """Takes the room of a family if there is room for it beside all that runs."""
        if self._lacking([*self._taken.values(), need]):
            return False
        self._taken[name] = need
        return True

    def prompt_read(self, name: str) -> None:
        """Notes that a family's prompts have been read."""
        self._taken[name].prompt_read = True

    def give_back(self, name: str) -> None:
        """Gives the room of a family back, if it has any."""
        self._taken.pop(name, None)

    def _lacking(self, needs: list[Need]) -> str:
        """What these families together lack; an empty text if nothing."""
        tokens = sum(need.requests if need.prompt_read else need.prompt_tokens for need in needs)
        loras = len(frozenset().union(*(need.loras for need in needs)))
        for name, needed, room in (
            ("requests at once (max_num_seqs)", sum(need.requests for need in needs), self._seqs),
            ("tokens in a step (max_num_batched_tokens)", tokens, self._tokens),
            ("blocks of keys and values (kv_cache_memory_bytes)", sum(need.blocks for need in needs), self._blocks),
            ("LoRAs at once (max_loras)", loras, self._loras),
        ):
            if needed > room:
                return f"it needs {needed} {name}, and there are {room}"
        return ""
