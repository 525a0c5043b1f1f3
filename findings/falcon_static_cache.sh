#!/usr/bin/env bash
# Falcon: two layouts raise on a static cache, with messages that name neither layout nor cache.
#
# Expected: what Falcon generates with the default cache it also generates with cache_implementation="static"; or it
#   says that it cannot.
# What happens:
#   1. alibi=True (Falcon-RW): raises on the first step, since the bias is as long as the prompt and the mask as
#      long as the cache (sdpa), or since a mask of four dimensions is taken apart as if it had two (eager).
#   2. One key head for all query heads (Falcon-7B): a static cache alone is right, and so is
#      prefill_chunk_size alone; together they raise, since the cache is then laid out ahead of the first step with as
#      many key heads as there are query heads.
#   new_decoder_architecture=True (Falcon-40B) does all of it.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen:
#   1. sdpa: "The size of tensor a (17) must match the size of tensor b (10) at non-singleton dimension 3",
#      eager: "too many values to unpack (expected 2)"
#   2. "index_copy_(): Source/destination tensor must have same slice shapes. Destination slice shape: 1 4 8 ..."
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import FalconConfig, FalconForCausalLM


def falcon(attention, **layout):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": None}
    return FalconForCausalLM(
        FalconConfig(**size, **tokens, initializer_range=0.3, attn_implementation=attention, **layout)
    )


def outcome(layout, attention, **choice):
    torch.manual_seed(0)
    model = falcon(attention, **layout).eval()
    prompt = torch.randint(3, 64, (1, 10))
    mask = torch.ones_like(prompt)
    try:
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, **choice)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return text[0, 10:].tolist()


static = {"cache_implementation": "static", "disable_compile": True}
chunks = {"prefill_chunk_size": 4}
alibi = {"alibi": True}
multi_query = {"multi_query": True}
newer = {"new_decoder_architecture": True}
for layout, attention, choice, expected in (
    (alibi, "sdpa", chunks, "same"),
    (alibi, "sdpa", static, "RuntimeError: The size of tensor a (17) must match"),
    (alibi, "eager", static, "ValueError: too many values to unpack"),
    (multi_query, "sdpa", static, "same"),
    (multi_query, "sdpa", chunks, "same"),
    (multi_query, "sdpa", static | chunks, "RuntimeError: index_copy_()"),
    (newer, "sdpa", static | chunks, "same"),
):
    usual = outcome(layout, attention)
    assert isinstance(usual, list), usual
    got = outcome(layout, attention, **choice)
    print(layout, attention, sorted(choice), "->", got)
    if expected == "same":
        assert got == usual, "another text than with the default cache"
    else:
        assert isinstance(got, str) and got.startswith(expected), "the static cache behaves in another way now"
print("seen: on a static cache ALiBi raises, and so does one key head with a prefill in chunks")
PYTHON
