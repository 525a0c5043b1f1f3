#!/usr/bin/env bash
# transformers: a DoRA adapter that PEFT saved loses its magnitudes in load_adapter and from_pretrained.
#
# Expected: a LoRA in a folder is the same model by `PeftModel.from_pretrained(base, folder)`, by `load_adapter` of a
#   transformers model, and by `AutoModelForCausalLM.from_pretrained(folder)`, with `use_dora=True` too.
# What happens: PEFT's file holds a magnitude as "....lora_magnitude_vector", where the module has one more part,
#   "....weight", which `PeftModel` adds. transformers does not: it reports the vectors of the file as unexpected,
#   those of the model as missing and newly initialized, and goes on with them. These are the norms that DoRA starts
#   with, so that what the magnitudes have learned is gone. A report is logged, nothing is raised: `add_adapter`,
#   `set_adapter`, `disable_adapters` and `save_pretrained` refuse this PEFT, which pip installs beside it, and ask
#   for 0.22.0; loading does not.
# Versions: transformers 5.24.0, peft 0.21.2, torch 2.13.0.
# Output seen: logits are off by 4.3 with DoRA, in both ways; by 0 with LoRA, rsLoRA and LoRA with biases.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


torch.set_grad_enabled(False)
TOKENS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.3)).save_pretrained("base")


def base():
    return AutoModelForCausalLM.from_pretrained("base").eval()


def loaded(folder):
    model = base()
    model.load_adapter(folder)
    return model.eval()


def distances(name, **options):
    """How far the logits of a saved adapter are off in the three ways to load it."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, **options)
    config.base_model_name_or_path = "base"
    model = get_peft_model(base(), config).eval()
    for weight in model.parameters():
        if weight.requires_grad:  # as if it had been trained
            weight += 0.2 * torch.randn(weight.shape)
    model.save_pretrained(name)
    ways = [PeftModel.from_pretrained(base(), name), loaded(name), AutoModelForCausalLM.from_pretrained(name)]
    return [(way.eval()(TOKENS).logits - model(TOKENS).logits).abs().max().item() for way in ways]


found = {
    "lora": distances("lora"),
    "rslora": distances("rslora", use_rslora=True),
    "biases": distances("biases", lora_bias=True),
    "dora": distances("dora", use_dora=True),
}
for name, (own, adapter, auto) in found.items():
    print(f"{name}: PeftModel {own:.2g}, load_adapter {adapter:.2g}, AutoModel {auto:.2g}")
assert max(distance for name in ("lora", "rslora", "biases") for distance in found[name]) < 1e-4
assert found["dora"][0] < 1e-4
assert min(found["dora"][1:]) > 0.1, "transformers reads DoRA's magnitudes now"


def refusal():
    """What another method of adapters says to this PEFT."""
    try:
        loaded("lora").disable_adapters()
    except ValueError as error:
        return str(error)
    return None


refused = refusal()
print("disable_adapters:", refused)
assert "0.22.0" in str(refused), "adapters can be switched off now"
print("seen: transformers loses DoRA's magnitudes")
PYTHON
