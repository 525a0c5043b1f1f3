# SPDX-License-Identifier: Apache-2.0
"""The logits processor for vLLM's Model Runner V2, its default on GPUs.

Interface: `vllm.v1.worker.gpu.sample.logits_processor` of vLLM 0.32 and 0.33 (vllm-project/vllm#56497). A request has
a slot for its life; each step tells which slot the rows of the logits belong to, and how many tokens they see.
"""

from __future__ import annotations

from typing import Any

import torch

from .engine import INSTALL, check_speculation
from .families import Member
from .rows import REMEDY, Row, join


try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(INSTALL) from error


class CoupledLogitsProcessorV2(LogitsProcessor):
    """Joins the rows of coupled requests: `LLM(..., logits_processors=["trl_parm.serving:CoupledLogitsProcessorV2"])`.

    Prompts that are still incomplete write nothing in this step and are left alone. Reading the last tokens back, to
    see that a family is in step, waits for the device once a step.

    Raises:
        ValueError: speculative decoding.
        RuntimeError: in a step in which a coupled request's partner is missing or out of step; the engine stops.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        check_speculation(vllm_config)
        self._states = req_states
        self._members: dict[int, Member] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        Member.of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._members.pop(req_idx, None)
        if member := Member.of(sampling_params):
            self._members[req_idx] = member
        return member is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.idx_mapping_np.tolist()
        coupled = [row for row, slot in enumerate(slots) if slot in self._members]
        if not coupled:
            return logits
        if len(logits) != len(slots):
            raise RuntimeError(
                f"This step has {len(logits)} rows of logits for {len(slots)} requests, and coupled requests have one "
                f"each. {REMEDY}"
            )
        last = ctx.input_ids.tolist()
        rows = []
        for row in coupled:
            slot, seen = slots[row], int(ctx.seq_lens_upper_bound_np[row])
            if seen >= self._states.prefill_len.np[slot]:
                written = seen - int(self._states.prompt_len.np[slot])
                rows.append(Row(row, self._members[slot], written, last[row] if written else None))
        return join(logits, rows)
