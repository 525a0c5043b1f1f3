#!/usr/bin/env bash
# transformers: with dynamic NTK scaling a text's logits depend on which texts the model has read before.
#
# Expected: a forward without a cache is a function of the text. Dynamic NTK (rope_type "dynamic") turns keys by factors
#   that follow from the text's length once it is beyond max_position_embeddings.
# What happens: the factors are kept on the module and made anew for a longer text only, or by one below
#   max_position_embeddings, which sets them back. So a text beyond that length is turned by the factors of the longest
#   one that was read since the last short one. The same call gives other logits, and greedy decoding other texts,
#   depending on what the model was used for before, without a word.
# Versions: transformers 5.24.0, torch 2.13.0 on a CPU; max_position_embeddings 16, texts of 20 and 40 tokens.
# Output seen: the logits of eight texts of 20 tokens change by 24 to 69 % after 40 other tokens were read, and all
#   eight greedy texts are others; after a text of 5 tokens the logits are as at first, bit by bit.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None}
rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
model = LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=16, rope_parameters=rope)).eval()


def tokens(length, seed):
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(ids):
    return model(ids, use_cache=False).logits[0, -1]


def text(ids):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 20:].tolist()


short, long = tokens(5, 100), tokens(40, 101)
different = 0
for seed in range(8):
    ids = tokens(20, seed)
    logits(short)
    first = logits(ids)
    assert torch.equal(logits(ids), first)
    logits(short)
    written = text(ids)
    logits(long)
    change = float((logits(ids) - first).norm() / first.norm())
    different += text(ids) != written
    logits(short)
    assert torch.equal(logits(ids), first)  # a short text sets the factors back
    print(f"text {seed}: logits change by {change:.0%} after a longer text")
    assert change > 0.01, "logits no longer depend on what was read before"
print(f"{different} of 8 greedy texts are others after a longer text was read")
assert different > 0, "greedy texts no longer depend on what was read before"
print("seen: with dynamic NTK a text's logits depend on which texts the model has read before")
PYTHON
