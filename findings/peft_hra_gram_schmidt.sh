#!/usr/bin/env bash
# PEFT: HRA with Gram-Schmidt changes the model from the start.
#
# Expected: a new adapter is a no-op, as HRA's is by default: it starts with each reflection twice, and two equal
#   reflections cancel out.
# What happens: with apply_GS=True the second of each pair is made orthogonal to the first, of which nothing but
#   rounding is left, and that is scaled to length one. So the pair is two different reflections, the second in a
#   direction out of rounding errors, and the untrained adapter gives another model, in float64 too. No warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: logits off by 8 for ranks 2, 4 and 8 with apply_GS=True; by 1e-5 without.
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
from peft import HRAConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


torch.set_grad_enabled(False)
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
for dtype in (torch.float32, torch.float64):
    for rank in (2, 4, 8):
        for orthogonal in (False, True):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3))
            model = model.to(dtype).eval()
            before = model(tokens).logits
            config = HRAConfig(r=rank, apply_GS=orthogonal, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(model, config).eval()
            gap = (model(tokens).logits - before).abs().max().item()
            print(f"{dtype}, rank {rank}, apply_GS={orthogonal}: logits off by {gap:.2g}")
            assert (not gap < 0.1) == orthogonal, "HRA starts in another way now"
print("seen: HRA with Gram-Schmidt is no no-op at the start")
PYTHON
