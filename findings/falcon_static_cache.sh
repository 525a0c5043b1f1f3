#!/usr/bin/env bash
# Falcon and GPT-BigCode: some layouts raise on a static cache, with messages that name neither layout nor cache.
#
# Expected: what these models generate with the default cache they also generate with cache_implementation="static"; or
#   they say that they cannot.
# What happens:
#   1. Falcon, alibi=True (Falcon-RW): raises on the first step, since the bias is as long as the prompt and the mask as
#      long as the cache (sdpa), or since a mask of four dimensions is taken apart as if it had two (eager).
#   2. One key head for all query heads (Falcon-7B, StarCoder): a static cache alone is right, and so is
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
install() { "$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import FalconConfig, FalconForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM


def falcon(attention, **layout):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": None}
    return FalconForCausalLM(
        FalconConfig(**size, **tokens, initializer_range=0.3, attn_implementation=attention, **layout)
    )


def starcoder(attention):
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": None}
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(**size, **tokens, initializer_range=0.3, attn_implementation=attention, multi_query=True)
    )


def outcome(make, layout, attention, **choice):
    torch.manual_seed(0)
    model = make(attention, **layout).eval()
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
for make, layout, attention, choice, expected in (
    (falcon, alibi, "sdpa", chunks, "same"),
    (falcon, alibi, "sdpa", static, "RuntimeError: The size of tensor a (17) must match"),
    (falcon, alibi, "eager", static, "ValueError: too many values to unpack"),
    (falcon, multi_query, "sdpa", static, "same"),
    (falcon, multi_query, "sdpa", chunks, "same"),
    (falcon, multi_query, "sdpa", static | chunks, "RuntimeError: index_copy_()"),
    (falcon, newer, "sdpa", static | chunks, "same"),
    (starcoder, {}, "sdpa", static, "same"),
    (starcoder, {}, "sdpa", chunks, "same"),
    (starcoder, {}, "sdpa", static | chunks, "RuntimeError: index_copy_()"),
):
    usual = outcome(make, layout, attention)
    assert isinstance(usual, list), usual
    got = outcome(make, layout, attention, **choice)
    print(make.__name__, layout, attention, sorted(choice), "->", got)
    if expected == "same":
        assert got == usual, "another text than with the default cache"
    else:
        assert isinstance(got, str) and got.startswith(expected), "the static cache behaves in another way now"
print("seen: on a static cache ALiBi raises, and so does one key head with a prefill in chunks")
PYTHON
