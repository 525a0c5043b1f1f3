#!/usr/bin/env bash
# Bamba: a forward pass onto a cache counts its positions from nought again unless they are given.
#
# Expected: model(tokens[:, :10]) and then model(tokens[:, 10:], cache=...) give the logits of one pass over all
#   tokens; Llama and others work out the positions from the cache.
# What happens: Bamba numbers the new tokens 0, 1, ... whatever the cache holds, so its layers with attention turn
#   their keys by the wrong angle. No warning. With position_ids it is right, and generate() passes them, so only
#   loops of one's own are hit.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: logits off by 4.8 without position_ids and by 9e-6 with them; Llama by 1e-5 either way.
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
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM


def bamba():
    config = BambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        attn_layer_indices=[1, 3],
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_expand=2,
        mamba_d_state=8,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return BambaForCausalLM(config)


def llama():
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3, pad_token_id=0))


torch.set_grad_enabled(False)
for make, wrong in ((bamba, True), (llama, False)):
    torch.manual_seed(0)
    model = make().eval()
    tokens = torch.randint(3, 64, (1, 16))
    at_once = model(tokens, use_cache=False).logits[:, 10:]
    for given in (True, False):
        cache = model(tokens[:, :10], use_cache=True).cache
        steps = []
        for at in range(10, 16):
            positions = {"position_ids": torch.tensor([[at]])} if given else {}
            steps.append(model(tokens[:, at : at + 1], cache=cache, use_cache=True, **positions).logits)
        gap = (torch.cat(steps, dim=1) - at_once).abs().max().item()
        print(f"{make.__name__}, positions given: {given}, largest difference {gap:.2g}")
        assert (gap > 0.1) == (wrong and not given), "positions on a cache behave in another way now"
print("seen: Bamba starts at position 0 again on a cache")
PYTHON
