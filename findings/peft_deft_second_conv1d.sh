#!/usr/bin/env bash
# PEFT: a second DEFT adapter on GPT-2's layers breaks the first one's merge.
#
# Expected: an adapter that is added beside another one works as it would alone, and leaves the other as it was. GPT-2's
#   layers hold their weights the other way round (Conv1D); PEFT sees that by itself and sets fan_in_fan_out.
# What happens: DEFT sees it for the first adapter only. The second one's setting, False, is then taken for the layer's.
#   Where the weight is square this goes through: the new adapter, which is to change nothing at the start, changes the
#   model, and from then on merging either adapter, the first one too, gives another model than the one that ran. Where
#   it is not square the second adapter raises about shapes, of TinyLoRA too. No warning.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: alone, a new adapter moves the logits by 2e-6, and merging it, once trained, by 4e-6. Beside another a new
#   one moves them by 0.035, and merging the first one by 6.5. On c_attn, of DEFT and TinyLoRA: RuntimeError "mat1 and
#   mat2 shapes cannot be multiplied".
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
from peft import DeftConfig, TinyLoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


torch.set_grad_enabled(False)
TOKENS = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))


def gpt2():
    torch.manual_seed(0)
    size = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).eval()


def adapted(kind, layer):
    return get_peft_model(gpt2(), kind(target_modules=[layer], r=4), "first").eval()


def distance(one, other):
    return (one(TOKENS).logits - other(TOKENS).logits).abs().max().item()


def merged(model):
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    return distance(merged, model)


def train(model):
    """Moves the weights of the adapter that is set, as training would."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.2 * torch.randn(weight.shape)


model = adapted(DeftConfig, "attn.c_proj")
alone = distance(model, gpt2())
train(model)
merge_alone = merged(model)
model.add_adapter("second", DeftConfig(target_modules=["attn.c_proj"], r=4))
model.set_adapter("second")
beside = distance(model, gpt2())
model.set_adapter("first")
merge_beside = merged(model)
print(f"a new adapter moves the logits by {alone:.2g}, merging it by {merge_alone:.2g}")
print(f"beside another a new one moves them by {beside:.2g}, and merging the first one by {merge_beside:.2g}")


def second(kind):
    """What is said to a second adapter on a layer that is not square."""
    model = adapted(kind, "c_attn")
    try:
        model.add_adapter("second", kind(target_modules=["c_attn"], r=4))
        model.set_adapter("second")
        model(TOKENS)
    except RuntimeError as error:
        return str(error)
    return None


raised = {kind.__name__: second(kind) for kind in (DeftConfig, TinyLoraConfig)}
print("a second one on c_attn:", raised)
assert max(alone, merge_alone) < 1e-4
assert beside > 1e-3, "a second adapter changes nothing at the start now"
assert merge_beside > 0.1, "the first adapter merges right beside a second one now"
assert None not in raised.values(), "a second adapter can be added to c_attn now"
print("seen: a second DEFT adapter breaks the first one's merge")
PYTHON
