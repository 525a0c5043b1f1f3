#!/usr/bin/env bash
# PEFT: hotswap_adapter forgets rank_pattern and alpha_pattern.
#
# Expected: after `hotswap_adapter` the model is the one that the new adapter is by itself. Adapters that can't be
#   swapped are refused; `alpha_pattern` has to be the same in both, and other ranks are allowed.
# What happens: each layer's scale is looked up in the patterns by the name of a weight, which ends in
#   "lora_A.default.weight", while patterns are matched with the end of a layer's name. So none ever matches, and
#   layers get the scale of `r` and `lora_alpha`, even where an adapter is swapped for one of equal configuration. No
#   warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: outputs after a swap differ from those of the adapter that is loaded by itself by 0 without patterns,
#   by 0.88 with a rank_pattern, and by 1.2 with an alpha_pattern; the scale of that layer is 2 in the place of 4 and
#   of 8.
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
from peft.utils.hotswap import hotswap_adapter


torch.set_grad_enabled(False)
INPUTS = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))


def train(folder, seed, **patterns):
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"], r=4, **patterns))
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:  # as if it had been trained
            weight += 0.3 * torch.randn(weight.shape)
    model.save_pretrained(folder)


def load(folder):
    return PeftModel.from_pretrained(base(), folder).eval()


def swap(**patterns):
    """How far the model after a swap is from the new adapter, and the scale of layer 0 in both."""
    for seed, name in enumerate(("old", "new")):
        train(name, seed, **patterns)
    expected, model = load("new"), load("old")
    hotswap_adapter(model, "new", adapter_name="default")
    distance = (model(INPUTS) - expected(INPUTS)).abs().max().item()
    return distance, *(one.base_model.model[0].scaling["default"] for one in (model, expected))


found = {
    "no pattern": swap(),
    "rank_pattern": swap(rank_pattern={"0": 2}),
    "alpha_pattern": swap(alpha_pattern={"0": 32}),
}
for name, (distance, scale, expected) in found.items():
    print(f"{name}: outputs differ by {distance:.2g}, the scale is {scale:g} in the place of {expected:g}")
assert found["no pattern"][0] < 1e-5
assert found["rank_pattern"][0] > 0.01, "a swap heeds rank_pattern now"
assert found["alpha_pattern"][0] > 0.01, "a swap heeds alpha_pattern now"
print("seen: hotswap_adapter forgets the patterns")
PYTHON
