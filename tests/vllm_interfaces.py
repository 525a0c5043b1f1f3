# SPDX-License-Identifier: Apache-2.0
"""What vLLM's interfaces look like, as far as we use them or `fake_vllm` pretends them: names, and what is optional.

    python tests/vllm_interfaces.py      # where vLLM is installed: renews the snapshot; `make test-vllm` does it first

`test_serving` holds the doubles against the snapshot, so that they can't drift from what vLLM was.
"""

import dataclasses
import enum
import importlib
import inspect
import json
from pathlib import Path


SNAPSHOT = Path(__file__).with_name("vllm_interfaces.json")
V1, V2 = "vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"
CALLS = {
    f"{V1}:LogitsProcessor": ["__init__", "validate_params", "apply", "is_argmax_invariant", "update_state"],
    f"{V2}:LogitsProcessor": ["__init__", "validate_params", "add_request", "apply"],
    "vllm.v1.engine.llm_engine:LLMEngine": [
        "add_request", "abort_request", "step", "sleep", "wake_up", "list_loras",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM": ["add_request", "abort", "sleep", "wake_up"],
    "vllm.inputs:tokens_input": [],
    "vllm.lora.ops.torch_ops:bgmv_shrink": [],
}  # fmt: skip
"""Classes with the methods that are called, or functions."""
NAMES = {
    f"{V1}.interface:BatchUpdate": None,
    f"{V1}.interface:MoveDirectionality": None,
    f"{V2}:LogitsContext": None,
    f"{V2}:LogitsProcRequestState": None,
    "vllm.sampling_params:RequestOutputKind": None,
    "vllm:SamplingParams": [
        "n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs", "logit_bias", "structured_outputs",
        "detokenize", "output_kind", "extra_args",
    ],
    "vllm.config:SchedulerConfig": [
        "max_num_seqs", "max_num_batched_tokens", "max_num_active_seqs", "max_num_scheduled_tokens", "watermark",
        "long_prefill_token_threshold",
    ],
    "vllm.config:CacheConfig": ["num_gpu_blocks", "block_size"],
    "vllm.config:ModelConfig": ["max_model_len", "logits_processors", "logprobs_mode"],
    "vllm.config:LoRAConfig": ["max_loras"],
    "vllm.config:ParallelConfig": ["data_parallel_size"],
    "vllm.config:VllmConfig": [
        "scheduler_config", "cache_config", "model_config", "lora_config", "parallel_config", "speculative_config",
    ],
}  # fmt: skip
"""Data classes and enumerations with the names that matter; all of them for `None`."""


def parameters(function) -> list[str]:
    """The names of a function's parameters, without `self` and `cls`; those that may be left out end in "=?"."""
    found = inspect.signature(function).parameters.values()
    return [
        f"{p.name}{'' if p.default is p.empty else '=?'}"
        for p in found
        if p.name not in ("self", "cls") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def names(kind) -> list[str]:
    """The names of a data class's fields, of an enumeration's members, or of a structure's."""
    if isinstance(kind, enum.EnumType):
        return [member.name for member in kind]
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind.__struct_fields__)


def looked_up(name: str):
    module, _, qualified = name.partition(":")
    return getattr(importlib.import_module(module), qualified)


def interfaces() -> dict[str, list[str]]:
    """The interfaces of the vLLM that is installed."""
    found = {}
    for name, methods in CALLS.items():
        owner = looked_up(name)
        found |= {f"{name}.{method}": parameters(getattr(owner, method)) for method in methods}
        if not methods:
            found[name] = parameters(owner)
    for name, wanted in NAMES.items():
        known = names(looked_up(name))
        found[name] = [one for one in known if wanted is None or one in wanted]
    return found


if __name__ == "__main__":
    import vllm

    SNAPSHOT.write_text(json.dumps({"vllm": vllm.__version__, **interfaces()}, indent=1) + "\n")
