#!/usr/bin/env bash
# PEFT: beside another adapter, convert_to_lora takes the other's saved modules.
#
# Expected: `convert_to_lora(model, rank, adapter_name=...)` converts that adapter of a model that holds several.
# What happens: of `modules_to_save` it goes through those of all adapters and writes each under the same key, so that
#   the last adapter's module goes into every conversion. No warning. Where another adapter has a layer that this one has
#   not, it raises an AttributeError about a ParameterDict.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: with rank to spare the outputs of a LoHa and of its conversion differ by 2e-7 alone, and by 1.4 beside a
#   second one, those of a MiSS by 0 and 1; the second one's own conversion is right. Of adapters on two different layers
#   neither is converted.
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
from peft import LoHaConfig, MissConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict


torch.set_grad_enabled(False)
INPUTS = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16) for _ in range(3)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


def train(model):
    """Moves the adapter that is set, as training would."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.2 * torch.randn(weight.shape)


def change(model, name):
    """How far an adapter's conversion is from it, or what is raised."""
    model.set_adapter(name)
    expected = model(INPUTS)
    try:
        lora, weights = convert_to_lora(model, rank=16, adapter_name=name)
    except AttributeError as error:
        return str(error)
    converted = get_peft_model(base(), lora).eval()
    set_peft_model_state_dict(converted, weights)
    return (converted(INPUTS) - expected).abs().max().item()


for kind in (LoHaConfig, MissConfig):
    model = get_peft_model(base(), kind(target_modules=["0"], r=4, modules_to_save=["4"]), "first").eval()
    train(model)
    alone = change(model, "first")
    model.add_adapter("second", kind(target_modules=["0"], r=4, modules_to_save=["4"]))
    model.set_adapter("second")
    train(model)
    beside, second = change(model, "first"), change(model, "second")
    print(f"{kind.__name__}: alone {alone:.2g}, beside a second one {beside:.2g}, the second one {second:.2g}")
    assert max(alone, second) < 1e-4
    assert beside > 0.01, "the saved module is its own now"

    model = get_peft_model(base(), kind(target_modules=["0"], r=4), "first").eval()
    model.add_adapter("second", kind(target_modules=["2"], r=4))
    found = [change(model, name) for name in ("first", "second")]
    print(f"{kind.__name__} on two layers: {found}")
    assert all("has no attribute" in str(each) for each in found), "adapters on two layers are converted now"
print("seen: another adapter's saved module is written, and other layers stop the conversion")
PYTHON
