# SPDX-License-Identifier: Apache-2.0
"""The models that the decoding benchmarks run: SmolLM2-135M, and Llama shapes with random weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_pblora import PBLoraConfig


sys.path.append(str(Path(__file__).parent.parent / "examples"))
ATTENTION = ["q_proj", "k_proj", "v_proj"]
SHAPES = {
    "SmolLM2-135M": None,
    "Llama 271M": (1024, 16, 16, 2816, 32000),
    "Llama 68M": (512, 8, 8, 1408, 32000),
    "Llama 17M": (256, 4, 4, 704, 32000),
    "Llama 4M": (64, 2, 4, 128, 32000),
    "Llama 7B": (4096, 32, 32, 11008, 32000),
    "Llama 1.1B": (2048, 22, 32, 5632, 32000),
}
"""Hidden size, layers, heads, intermediate size and vocabulary."""


def load(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model of one of the `SHAPES`, made where it is to be and in its dtype, or from a folder."""
    torch.manual_seed(seed)
    if name not in SHAPES or SHAPES[name] is None:
        from smollm2 import smollm2

        folder = smollm2() if name == "SmolLM2-135M" else name
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    hidden, layers, heads, intermediate, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        vocab_size=vocabulary, pad_token_id=0, eos_token_id=None, bos_token_id=None, dtype=dtype,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def shared_copy(model):
    """A model of the same weights, so that several adapted ones fit into memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def caches(backend: str = "inductor") -> dict[str, dict[str, object]]:
    """Kind of cache → what `generate` takes for it. On CUDA compiled forwards are CUDA graphs."""
    mode = "reduce-overhead" if torch.cuda.is_available() and backend == "inductor" else "default"
    config = CompileConfig(backend=backend, mode=mode, dynamic=False)
    config._compile_all_devices = True
    return {
        "default cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "compiled": {"cache_implementation": "static", "compile_config": config},
    }


def with_arm(model: PreTrainedModel, objectives: int = 2) -> PeftModel:
    """PARM's adapter with PARM's ranks on the attention's projections, its B random so that it does something."""
    config = PBLoraConfig(
        objectives=[f"objective {i + 1}" for i in range(objectives)], target_modules=ATTENTION, r1=4, r2=4,
        task_type="CAUSAL_LM", init_weights=False,
    )  # fmt: skip
    return get_peft_model(model, config).eval()


def with_loras(model: PreTrainedModel, names: list[str]) -> PeftModel:
    """LoRAs of GenARM's rank on the attention's projections, one for each name."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def prompts(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(10, 30000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def cache_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """What the keys and values of so many rows and tokens take."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * heads * size * length * model.dtype.itemsize
