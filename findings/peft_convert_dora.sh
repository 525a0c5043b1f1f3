#!/usr/bin/env bash
# PEFT: convert_to_lora takes DoRA and LoRA with biases, and leaves the magnitude and the biases out.
#
# Expected: `convert_to_lora` and `save_as_lora` are for adapters that a LoRA can be equal to if its rank is high enough;
#   others are refused, and `supports_lora_conversion` says which. DoRA scales the outputs of a layer, and
#   `lora_bias=True` adds a bias; a LoRA has neither. For the bias the code has an error.
# What happens: both are said to be supported and are converted. Of DoRA the magnitude is left out, so that the result at
#   full rank is another model. The error for biases never comes: the check looks at `bias`, which every LoraConfig has,
#   and at `lora_bias` only where there is no `bias`. The one warning says that what is a LoRA need not be converted.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: at full rank the outputs of a trained adapter and of its conversion differ by 5e-7 for LoRA and 2e-5 for
#   GraLoRA, and by 0.97 for DoRA and 1 for LoRA with biases.
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
from peft import GraloraConfig, LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict


torch.set_grad_enabled(False)
INPUTS = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))


def change(config):
    """How far a trained adapter is from what it is converted to, at full rank."""
    model = get_peft_model(base(), config).eval()
    for weight in model.parameters():
        if weight.requires_grad:  # as if it had been trained
            weight += 0.2 * torch.randn(weight.shape)
    assert model.supports_lora_conversion()
    lora, weights = convert_to_lora(model, rank=16)
    converted = get_peft_model(base(), lora).eval()
    set_peft_model_state_dict(converted, weights)
    return (converted(INPUTS) - model(INPUTS)).abs().max().item()


layers = {"target_modules": ["0", "2"], "r": 4}
found = {
    "LoRA": change(LoraConfig(**layers)),
    "GraLoRA": change(GraloraConfig(**layers)),
    "DoRA": change(LoraConfig(**layers, use_dora=True)),
    "LoRA with biases": change(LoraConfig(**layers, lora_bias=True)),
}
print("converting moves the outputs by", {name: f"{distance:.2g}" for name, distance in found.items()})
assert max(found["LoRA"], found["GraLoRA"]) < 1e-4
assert found["DoRA"] > 0.01, "DoRA is converted with its magnitude now"
assert found["LoRA with biases"] > 0.01, "biases are converted now"
print("seen: DoRA's magnitude and LoRA's biases are left out")
PYTHON
