# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many architectures, with guides beside them and as adapters on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import OBJECTIVES
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LogitsProcessor,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
)

from peft_pblora import PBLoraConfig, set_preference
from peft_pblora.switch import backbone_of
from trl_parm.decoding import genarm, parm


TOKENS = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MLA = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
PROMPTS = torch.tensor(
    [
        [9, 41, 5, 33, 20, 7, 62, 14, 28, 3, 50, 11, 46],
        [0, 0, 0, 0, 17, 8, 24, 8, 24, 55, 6, 8, 24],
        [0, 0, 0, 0, 0, 0, 0, 0, 31, 12, 59, 4, 38],
    ]
)
MASK = (PROMPTS != 0).long()
MODES = {
    "greedy": {},
    "several sequences": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "beam search": {"num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "one prompt": {},
    "one prompt, beams": {"num_beams": 2},
}
"""Settings of `generate`; one prompt has neither padding nor a mask."""
NO_DRAFTS = {("prompt lookup", door): "not supported with stateful models" for door in ("model", "processor")}
ON_MODULES = {(mode, door): "keeps its state on its modules" for mode in MODES for door in ("model", "processor")}
ON_MODULES |= NO_DRAFTS
del ON_MODULES["no cache", "model"]
QV = ["q_proj", "v_proj"]
QKV = ["q_proj", "k_proj", "v_proj"]


@dataclass
class Architecture:
    """A configuration, its linear layers of attention (or what it has instead), and what it can't do.

    Attributes:
        all_linear (`str` or `list[str]`): What stands for it where PEFT takes no "all-linear".
        guide (`str`, *optional*): Of another architecture, for one that can't guide itself.
        refused (`dict`): The error's message for a mode and a door.
    """

    config: PreTrainedConfig
    attention: list[str]
    all_linear: str | list[str] = "all-linear"
    guide: str | None = None
    refused: dict[tuple[str, str], str] = field(default_factory=dict)


ARCHITECTURES = {
    "Llama": Architecture(LlamaConfig(**TOKENS, **SIZES), QKV),
    "GPT-2": Architecture(GPT2Config(**TOKENS, **HEADS, n_positions=128), ["c_attn"]),
    "OPT": Architecture(OPTConfig(**TOKENS, **HEADS, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2), QKV),
    "BLOOM": Architecture(BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4), ["query_key_value"]),
    "Phi-3": Architecture(Phi3Config(**TOKENS, **SIZES, sliding_window=8), ["qkv_proj"]),
    "Gemma-3": Architecture(
        Gemma3TextConfig(
            **TOKENS, **SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        QKV,
    ),
    "Mixtral": Architecture(MixtralConfig(**TOKENS, **SIZES, num_local_experts=4), QKV),
    "Qwen2-MoE": Architecture(Qwen2MoeConfig(**TOKENS, **SIZES, **EXPERTS, shared_expert_intermediate_size=16), QKV),
    "DeepSeek-V3": Architecture(
        DeepseekV3Config(
            **TOKENS,
            **{**SIZES, **MLA},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        ["q_proj", "kv_b_proj"],
    ),  # fmt: skip
    "Qwen3-Next": Architecture(
        Qwen3NextConfig(**TOKENS, **SIZES, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16),
        QV,
        refused=NO_DRAFTS,
    ),
    "Qwen3.5": Architecture(Qwen3_5TextConfig(**TOKENS, **SIZES, **LINEAR), QV, refused=NO_DRAFTS),
    "LFM2": Architecture(Lfm2Config(**TOKENS, **SIZES, layer_types=["conv", "full_attention"]), QV),
    "Bamba": Architecture(
        BambaConfig(
            **TOKENS,
            **SIZES,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
            attn_layer_indices=[1],
        ),
        QV,
        refused=NO_DRAFTS,
    ),
    "Falcon-H1": Architecture(
        FalconH1Config(
            **TOKENS,
            **SIZES,
            head_dim=8,
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
        ),
        QV,
        ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj"],
        refused=NO_DRAFTS,
    ),
    "Mamba": Architecture(
        MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
        ["in_proj"],
        guide="Llama",
        refused=NO_DRAFTS,
    ),
    "RecurrentGemma": Architecture(
        RecurrentGemmaConfig(
            **TOKENS,
            **SIZES,
            head_dim=8,
            lru_width=32,
            attention_window_size=8,
            block_types=("recurrent", "attention"),
        ),
        QV,
        refused=ON_MODULES,
    ),
    "T5": Architecture(
        T5Config(**TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        ["q", "v"],
        guide="Llama",
    ),
}


def tiny(name: str, seed: int = 0):
    """A random model whose weights are large enough for its predictions to depend on its input."""
    config = copy.deepcopy(ARCHITECTURES[name].config)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = kind.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and 0 < parameter.std() < 0.1:
            parameter.data.mul_(0.2 / parameter.std())
    return model


FORMULAS = {
    "PBLoRA": lambda arm: parm(arm, [0.3, 0.7], beta=0.8),
    "LoRAs": lambda arm: genarm({"a": "first", "b": "second"}, [0.4, 0.6], beta=0.8, adapters_of=arm),
}


@dataclass
class Cell:
    """A base model and an ARM, beside it or on it."""

    base: Any
    arm: Any
    adapter: str

    @classmethod
    def make(cls, name: str, adapter: str, targets: str, on_base: bool) -> Cell:
        base = tiny(name)
        guide = name if on_base else ARCHITECTURES[name].guide or name
        layers = ARCHITECTURES[guide].attention if targets == "attention" else ARCHITECTURES[guide].all_linear
        return cls(base, cls.adapted(base if on_base else tiny(guide, 1), adapter, layers), adapter)

    @staticmethod
    def adapted(model, adapter: str, targets: str | list[str]):
        """A model with a PBLoRA of two objectives, or with two of PEFT's LoRAs, whose B is not zero."""
        torch.manual_seed(5)
        shared = {"target_modules": targets, "task_type": "CAUSAL_LM"}
        if adapter == "PBLoRA":
            return get_peft_model(model, PBLoraConfig(objectives=OBJECTIVES, init_weights=False, **shared)).eval()
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **shared)
        arm = get_peft_model(model, config, adapter_name="first")
        arm.add_adapter("second", copy.deepcopy(config))
        return arm.eval()

    @property
    def formula(self):
        return FORMULAS[self.adapter](self.arm)


class NaiveProcessor(LogitsProcessor):
    """The formula in float64, of whole texts without padding and without a cache: it uses no scores.

    Args:
        cell ([`Cell`]): The models.
        mask, ids (`torch.Tensor` of shape `(rows, columns)`): The prompts.
    """

    def __init__(self, cell: Cell, mask: torch.Tensor, ids: torch.Tensor) -> None:
        self.cell = copy.deepcopy(cell)
        self.prompts = [row[seen.bool()] for row, seen in zip(ids, mask)]
        self.columns = 1 if cell.base.config.is_encoder_decoder else ids.shape[1]
        for model in (self.cell.base, self.cell.arm):
            model.double()
            if hasattr(backbone_of(model), "set_experts_implementation"):
                backbone_of(model).set_experts_implementation("eager")

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        arm, adapter = self.cell.arm, self.cell.adapter
        with arm.disable_adapter():
            total = self.log_probs(self.cell.base, input_ids)
        if adapter == "PBLoRA":
            set_preference(arm, [0.3, 0.7])
            total = total + self.log_probs(arm, input_ids, guides=True) / 0.8
        for name, weight in (("first", 0.4), ("second", 0.6)) if adapter == "LoRAs" else ():
            arm.set_adapter(name)
            total = total + weight / 0.8 * self.log_probs(arm, input_ids, guides=True)
        return torch.log_softmax(total, -1).float()

    def log_probs(self, model: Any, ids: torch.Tensor, guides: bool = False) -> torch.Tensor:
        repeats = len(ids) // len(self.prompts)
        found = []
        for row, written in enumerate(ids):
            prompt, inputs = self.prompts[row // repeats], {}
            text = torch.cat([prompt, written[self.columns :]])
            if self.cell.base.config.is_encoder_decoder and not guides:
                text, inputs = prompt, {"decoder_input_ids": written[None]}
            found.append(model(input_ids=text[None], use_cache=False, **inputs).logits[0, -1])
        return torch.log_softmax(torch.stack(found), -1)
