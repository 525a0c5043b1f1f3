#!/usr/bin/env bash
# MiniMax: beam search with the cache reports scores that its sequences do not have.
#
# Expected: a beam's score is the sum of its tokens' log probabilities (length_penalty=0), with the cache or without.
# What happens: with the cache, the default, the scores and the sequences are wrong. After each step the beams are
#   sorted anew and the cache is told so by reorder_cache. MiniMax's own cache passes that on to the layers with
#   attention only; the states of its linear layers stay where they are, so a beam goes on with another beam's state.
# Versions: transformers 5.24.0, torch 2.13.0. Known of other models: transformers #46612.
# Output seen: best beam says -8.9 and is -22.1; without the cache the best beam says -7.7 and is -7.7.
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
from transformers import MiniMaxConfig, MiniMaxForCausalLM


torch.manual_seed(0)
torch.set_grad_enabled(False)
config = MiniMaxConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention"] * 2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=2,
    block_size=16,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
model = MiniMaxForCausalLM(config).eval()
prompt = torch.randint(3, 24, (1, 8))


def log_probability(tokens):
    steps = model(tokens[None], use_cache=False).logits[0, 7:-1].log_softmax(-1)
    return steps.gather(1, tokens[8:, None]).sum().item()


gaps = {}
for use_cache in (True, False):
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
    said, true = found.sequences_scores.tolist(), [log_probability(tokens) for tokens in found.sequences]
    print(f"use_cache={use_cache} says {said}, is {true}")
    gaps[use_cache] = max(abs(a - b) for a, b in zip(said, true))
assert gaps[False] < 1e-3
assert gaps[True] > 1, "beam search with the cache is right now"
print("seen: MiniMax's beams go on with other beams' states")
PYTHON
