#!/usr/bin/env bash
# PEFT: OLoRA takes GPT-2's weights the wrong way round.
#
# Expected: init_lora_weights="olora" splits a weight into adapter and rest, so the model computes the same before and
#   after; for GPT-2 as for others, as with "pissa" and "orthogonal". LoRA knows that GPT-2's Conv1D keeps its weights
#   transposed (fan_in_fan_out).
# What happens: OLoRA's factors are made from the weight as it lies in memory. A square one (attn.c_proj) then gets an
#   adapter that adds the transposed of what was subtracted: the model is another one from the start, without a
#   warning. Merging does not mend it. Others (c_attn, c_fc) get factors of the wrong shape, and the first forward
#   pass raises.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: logits off by 6.7 with attn.c_proj (pissa 2e-6, orthogonal 2e-6), "mat1 and mat2 shapes cannot be
#   multiplied (20x32 and 96x4)" with c_attn; a model of nn.Linear layers (Llama): below 1e-4.
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def gpt2():
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3, bos_token_id=1, eos_token_id=None))


def llama():
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3))


torch.set_grad_enabled(False)
tokens = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(3))


def changes(make, kind, targets):
    """How far the logits are from those of the model without an adapter: with it, and with it merged."""
    torch.manual_seed(0)
    model = make().eval()
    before = model(tokens).logits
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=kind)).eval()
    after = model(tokens).logits
    merged = model.merge_and_unload()(tokens).logits
    return [(logits - before).abs().max().item() for logits in (after, merged)]


for make, kind, targets, wrong in (
    (gpt2, "pissa", ["attn.c_proj"], False),
    (gpt2, "orthogonal", ["attn.c_proj"], False),
    (gpt2, "olora", ["attn.c_proj"], True),
    (gpt2, "pissa", ["c_attn"], False),
    (llama, "olora", ["o_proj"], False),
):
    gaps = changes(make, kind, targets)
    print(make.__name__, kind, targets, gaps)
    assert all((gap > 0.1) == wrong for gap in gaps), "OLoRA on Conv1D behaves in another way now"
try:
    changes(gpt2, "olora", ["c_attn"])
except RuntimeError as error:
    print("gpt2 olora ['c_attn']", error)
    assert "shapes cannot be multiplied" in str(error)
else:
    raise AssertionError("OLoRA on c_attn no longer raises")
print("seen: OLoRA changes GPT-2 instead of splitting its weights")
PYTHON
