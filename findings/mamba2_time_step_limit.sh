#!/usr/bin/env bash
# Mamba2, Bamba and Nemotron-H: one token at a time, the limits of the time step are forgotten.
#
# Expected: feeding the last tokens one at a time onto a cache gives the logits of one pass over all tokens.
# What happens: a pass over several tokens clamps the time steps (Mamba2's and Bamba's time_step_limit; for Nemotron-H
#   time_step_min, 0.001 by default); the update for a single token does not. So what generate() reads while it writes
#   is another model than the one that training and scoring see. With no limits, Mamba2's default, both agree.
# Versions: transformers 5.24.0 (without mamba_ssm and causal_conv1d), torch 2.13.0. Related upstream: transformers
#   #48989 (which limit Nemotron-H takes for a pass over several tokens).
# Output seen: logits off by 1.6 (Mamba2) and 6.6 (Bamba) for limits of 0.3 and 0.6, by 0.45 (Nemotron-H) for a
#   minimum of 0.1; without limits by 3e-6 each. With Nemotron-H's default by 0.01.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)


torch.set_grad_enabled(False)
common = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def mamba2(**limits):
    layout = {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(**common, **layout, **limits))


def bamba(**limits):
    layout = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "attn_layer_indices": [1]}
    return BambaForCausalLM(BambaConfig(**common, **attention, **layout, **limits))


def nemotron(**limits):
    layout = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}
    blocks = {"layers_block_type": ["mamba", "attention"], "head_dim": 8, "expand": 2}
    shared = {name: value for name, value in common.items() if name != "num_hidden_layers"}
    return NemotronHForCausalLM(NemotronHConfig(**shared, **attention, **layout, **blocks, **limits))


def gap(make, limits):
    torch.manual_seed(0)
    model = make(**limits).eval()
    tokens = torch.randint(3, 64, (1, 12))
    at_once = model(tokens, use_cache=False).logits[:, 8:]
    cache = model(tokens[:, :8], use_cache=True).cache
    steps = []
    for at in range(8, 12):
        positions = {} if make is mamba2 else {"position_ids": torch.tensor([[at]])}
        steps.append(model(tokens[:, at : at + 1], cache=cache, use_cache=True, **positions).logits)
    return (torch.cat(steps, dim=1) - at_once).abs().max().item()


narrow = {"time_step_limit": (0.3, 0.6)}
for make, limits, wrong in (
    (mamba2, {}, False),
    (mamba2, narrow, True),
    (bamba, {}, False),
    (bamba, narrow, True),
    (nemotron, {"time_step_min": 1e-6}, False),
    (nemotron, {}, True),
    (nemotron, {"time_step_min": 0.1}, True),
):
    difference = gap(make, limits)
    print(f"{make.__name__} {limits}: largest difference {difference:.2g}")
    assert (difference > 2e-4) == wrong, "single tokens behave in another way now"
print("seen: a single token's time step is not limited")
PYTHON
