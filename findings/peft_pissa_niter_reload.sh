#!/usr/bin/env bash
# PEFT: a LoRA that started with "pissa_niter_4" is another model after it was saved and loaded.
#
# Expected: what `save_pretrained` writes, loaded onto the same base model with `PeftModel.from_pretrained`, computes
#   what was saved. With init_lora_weights="pissa", "olora" and "orthogonal" it does.
# What happens: PiSSA subtracts the adapter's start from the base weight. The file holds the adapter, not the start;
#   loading makes the start anew from the base weight. "pissa_niter_[n]" computes it by a randomised SVD, so another
#   start is subtracted, and base plus adapter is another model. No warning. With the random state of the first time
#   set again before loading the difference is gone.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: logits of size 6 off by 5.2 (pissa_niter_4) and 3.0 (pissa_niter_16); pissa, olora, orthogonal 0.0;
#   pissa_niter_4 with the same random state 0.0.
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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def llama():
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3)).eval()


torch.set_grad_enabled(False)
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))


def changes_by_loading(kind, seed):
    """How far the logits move when an adapter is saved and loaded, with this random state."""
    base = llama()
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=kind)).eval()
    trained = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight += 0.1 * torch.randn(weight.shape, generator=trained)
    before = model(tokens).logits
    model.save_pretrained("adapter")
    base = llama()
    torch.manual_seed(seed)
    return (PeftModel.from_pretrained(base, "adapter").eval()(tokens).logits - before).abs().max().item()


for kind, seed, wrong in (
    ("pissa", 2, False),
    ("olora", 2, False),
    ("orthogonal", 2, False),
    ("pissa_niter_4", 1, False),
    ("pissa_niter_4", 2, True),
    ("pissa_niter_16", 2, True),
):
    change = changes_by_loading(kind, seed)
    print(kind, "random state", seed, change)
    assert (change > 0.1) == wrong, "loading after PiSSA behaves in another way now"
print("seen: an adapter that began with a randomised SVD is another model when it is loaded")
PYTHON
