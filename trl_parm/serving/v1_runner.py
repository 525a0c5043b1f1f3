# SPDX-License-Identifier: Apache-2.0
"""The logits processor for vLLM's V1 model runner (CPU, and `VLLM_USE_V2_MODEL_RUNNER=0`).

Interface: `vllm.v1.sample.logits_processor.LogitsProcessor` of vLLM 0.32 and 0.33. A row of the logits is a place in
the engine's batch; what changes there is told as requests removed, added and moved, in this order.
"""

from __future__ import annotations

from typing import Any

import torch

from .engine import INSTALL, check_speculation
from .families import Member
from .rows import Row, join


try:
    from vllm.v1.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(INSTALL) from error


class CoupledLogitsProcessorV1(LogitsProcessor):
    """Joins the rows of coupled requests: `LLM(..., logits_processors=["trl_parm.serving:CoupledLogitsProcessorV1"])`.

    The runner does not tell which prompts are still incomplete. Where it cuts a prompt into chunks and a family comes
    apart by it, that shows one step later, when the requests have written different numbers of tokens.

    Raises:
        ValueError: speculative decoding.
        RuntimeError: in a step in which a coupled request's partner is missing or out of step; the engine stops.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        check_speculation(vllm_config)
        # Place in the batch → the request and the list that the engine appends its tokens to.
        self._requests: dict[int, tuple[Member, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        Member.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._requests.pop(place, None)
        for place, params, _, written in batch_update.added:
            self._requests.pop(place, None)
            if member := Member.of(params):
                self._requests[place] = member, written
        for source, target, direction in batch_update.moved:
            moved, replaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved:
                self._requests[target] = moved
            if replaced and direction.name == "SWAP":
                self._requests[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        requests = self._requests.items()
        rows = [Row(place, member, len(text), text[-1] if text else None) for place, (member, text) in requests]
        return join(logits, rows)
