# SPDX-License-Identifier: Apache-2.0
"""Training on other architectures, whose dropout is on by their configuration: random models of two layers."""

import copy

import pytest
import torch
from pair_data import OBJECTIVES, labelled, pairs
from training_runs import trainer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from peft_pblora import PBLoraConfig


TOKENS = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
TINY = {
    "Llama": LlamaConfig(**TOKENS, **SIZES, attention_dropout=0.2),
    "GPT-2": GPT2Config(**TOKENS, **HEADS),
    "OPT": OPTConfig(**TOKENS, **HEADS, ffn_dim=48, word_embed_proj_dim=32, dropout=0.2, layerdrop=0.2),
    "BLOOM": BloomConfig(**TOKENS, **HEADS, hidden_dropout=0.2, attention_dropout=0.2),
    "Falcon": FalconConfig(**TOKENS, **HEADS, hidden_dropout=0.2, attention_dropout=0.2),
    "GPT-NeoX": GPTNeoXConfig(**TOKENS, **HEADS, intermediate_size=48, attention_dropout=0.2),
    "Phi-3": Phi3Config(**TOKENS, **SIZES, resid_pdrop=0.2, attention_dropout=0.2),
    "Gemma-3": Gemma3TextConfig(**TOKENS, **SIZES, head_dim=8, sliding_window=4, attention_dropout=0.2),
    "Mixtral": MixtralConfig(**TOKENS, **SIZES, num_local_experts=4, attention_dropout=0.2),
    "Qwen2-MoE": Qwen2MoeConfig(**TOKENS, **SIZES, **EXPERTS, attention_dropout=0.2),
    "Qwen3-Next": Qwen3NextConfig(**TOKENS, **SIZES, **EXPERTS, **LINEAR, attention_dropout=0.2),
    "Mamba": MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "LFM2": Lfm2Config(**TOKENS, **SIZES, layer_types=["conv", "full_attention"]),
}
every_architecture = pytest.mark.parametrize("name", TINY)


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(TINY[name]))


@every_architecture
def test_gradient_accumulation_equals_the_big_batch(tmp_path, tokenizer, name):
    """Also where micro-batches have other numbers of labels and of tokens, and experts get other tokens."""

    def moved(**changes) -> tuple[list[float], torch.Tensor]:
        run = trainer(
            tmp_path, tokenizer, tiny(name), labelled(8, helpful=lambda i: [0, None, -1, 1][i % 4]),
            peft_config=PBLoraConfig(objectives=OBJECTIVES, target_modules="all-linear", task_type="CAUSAL_LM"),
            max_steps=2, optim="sgd", beta=1.0, max_grad_norm=0.0, **changes,
        )  # fmt: skip
        weights = [p for p in run.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in weights]
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        return losses, torch.cat([(p - old).flatten() for p, old in zip(weights, before)])

    big = moved(per_device_train_batch_size=4)
    small = moved(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert small[0] == pytest.approx(big[0], rel=1e-5)
    assert big[1].norm() > 1e-3
    assert (small[1] - big[1]).norm() < 1e-4 * big[1].norm()


@every_architecture
def test_dropout_is_off_wherever_its_probability_stands(tmp_path, tokenizer, name):
    """In modules, in attributes that functions are given, or in the configuration alone; and on if that is asked."""

    def losses(disable_dropout: bool) -> list[float]:
        run = trainer(tmp_path, tokenizer, tiny(name), pairs(4), peft_config=None, disable_dropout=disable_dropout)
        model, batch = run.model.train(), next(iter(run.get_train_dataloader()))
        return [run.compute_loss(model, batch).item() for _ in range(3)]

    assert len(set(losses(disable_dropout=True))) == 1
    assert name in ("Mamba", "LFM2") or len(set(losses(disable_dropout=False))) > 1
