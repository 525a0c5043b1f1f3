#!/usr/bin/env bash
# PEFT: merging after layer_replication goes through and gives another model.
#
# Expected: layers made by layer_replication share their weights with the layers that they repeat and have adapters of
#   their own, so they cannot be merged; the code says so and has an error for it ("Cannot merge LORA layers when base
#   model layers are replicated", added after peft #1707).
# What happens: the error never comes. The check looks "layer_replication" up among the names of the adapters, not in
#   their configs. merge_and_unload adds all adapters of a weight to that one weight and returns a model that computes
#   something else. No warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: logits off by 1.7 after merging; without layer_replication by 4e-6.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 peft==0.21.2

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


torch.set_grad_enabled(False)
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))


def change(**options):
    """How far merging moves the logits."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3)).eval()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # as if it had been trained
            weight.normal_(std=0.2)
    before = model(tokens).logits
    return (model.merge_and_unload()(tokens).logits - before).abs().max().item()


plain, replicated = change(), change(layer_replication=[[0, 2], [1, 3]])
print(f"merging moves the logits by {plain:.2g}, with replicated layers by {replicated:.2g}")
assert plain < 1e-3
assert replicated > 0.1, "merging replicated layers is right now"
print("seen: merging replicated layers gives another model")
PYTHON
