#!/usr/bin/env bash
# PEFT: two OFT adapters are merged in the other order than they run.
#
# Expected: several adapters of a model may be active, and merging them makes one weight of what the forward pass
#   does. Of adapters that rotate the order matters; HRA keeps it.
# What happens: OFT's forward pass turns the input by the first adapter's rotation and then by the second's. Merging
#   multiplies the weight by them one after the other, so that the second one comes first: the merged model is that
#   whose adapters were set the other way round. No warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: merging two adapters of a layer moves its output by 1.1, by 3e-16 if they are merged in the other
#   order; of HRA by 4e-16.
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
import copy

import torch
from peft import HRAConfig, OFTConfig, get_peft_model


torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
BOTH = ["first", "second"]


def trained(config):
    """A layer with two adapters, as if both had been trained, and both active."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config(), "first").eval()
    model.add_adapter("second", config())
    for name in BOTH:
        model.set_adapter(name)
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape)
    model.base_model.set_adapter(BOTH)
    return model


def moved(model, order):
    """How far merging moves what a model says."""
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    merged = copy.deepcopy(model)
    merged.merge_adapter(order)
    return (merged(inputs) - model(inputs)).abs().max().item()


every = {
    "OFT": lambda: OFTConfig(target_modules=["0"], oft_block_size=8),
    "HRA": lambda: HRAConfig(target_modules=["0"], r=4),
}
found = {name: moved(trained(config), BOTH) for name, config in every.items()}
print("merging both adapters moves the output by", {name: f"{distance:.2g}" for name, distance in found.items()})
turned = moved(trained(every["OFT"]), BOTH[::-1])
print(f"merging OFT's in the other order by {turned:.2g}")
assert max(found["HRA"], turned) < 1e-9
assert found["OFT"] > 0.1, "OFT merges in the order in which it runs now"
print("seen: OFT merges two adapters in the other order")
PYTHON
