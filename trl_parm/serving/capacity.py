# SPDX-License-Identifier: Apache-2.0
"""Room for whole families: how many may run at once so that the engine never runs one without its partner.

vLLM schedules requests, not families. It runs those that wait, in their order, as long as the step has room: places
(`max_num_seqs`), tokens (`max_num_batched_tokens`), memory for their keys and values, and slots for LoRAs. The family
at the edge would come apart, and one would come apart later if memory ran out and the newest request were preempted.
So a family is admitted only if the engine can run all of it, to its longest, together with all that is running.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Need:
    """What a family takes of the engine."""

    requests: int
    prompt_tokens: int
    """Of all its requests."""
    blocks: int
    """Of keys and values, if all its requests write as much as they may."""
    loras: frozenset[int]
    """The numbers of its LoRAs."""
    prompt_read: bool = False
    """Whether it writes already, one token of each request a step."""


class Capacity:
    """The room of an engine, and what is taken of it.

    Args:
        config (`vllm.config.VllmConfig`): Of the engine, after its start.
    """

    def __init__(self, config: Any) -> None:
        scheduler, cache = config.scheduler_config, config.cache_config
        self._length = config.model_config.max_model_len
        self._seqs = scheduler.max_num_active_seqs or scheduler.max_num_seqs
        self._tokens = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        self._longest_chunk = scheduler.long_prefill_token_threshold
        # One block is the engine's own.
        self._blocks = cache.num_gpu_blocks - 1 - int(scheduler.watermark * cache.num_gpu_blocks)
        self._block_size = cache.block_size
        self._loras = config.lora_config.max_loras
        self._taken: dict[str, Need] = {}

    def need(self, prompt_length: int, max_tokens: int | None, loras: Iterable[int]) -> Need:
        """What a family of one base request and a guide for each LoRA takes.

        Raises:
            ValueError: a prompt that leaves no room to write, or a family that this engine can never run together.
        """
        loras = list(loras)
        requests = 1 + len(loras)
        if not 0 < prompt_length < self._length:
            raise ValueError(f"A prompt has {prompt_length} tokens, but the engine takes 1 to {self._length - 1}.")
        longest = min(prompt_length + (max_tokens or self._length), self._length)
        blocks = requests * math.ceil(longest / self._block_size)
        need = Need(requests, requests * prompt_length, blocks, frozenset(loras))
        if self._longest_chunk:
            raise ValueError(
                "The engine cuts long prompts (long_prefill_token_threshold). Start it without, for coupled requests."
            )
        if lacking := self._lacking([need]):
            raise ValueError(
                f"A prompt of {prompt_length} tokens with {len(loras)} guides can't run in this engine together: "
                f"{lacking}. Start the engine with more of it."
            )
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
