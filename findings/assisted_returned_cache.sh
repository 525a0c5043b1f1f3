#!/usr/bin/env bash
# transformers: prompt lookup and an assistant write another text where they go on from a cache that `generate` returned.
#
# Expected: generate(ids, cache=...), with the sequences of the call before and further tokens, reads what the cache
#   lacks, whether a token at a time is written or several are guessed: greedy text is that of a call without the cache.
# What happens: without guesses it is. With prompt_lookup_num_tokens or assistant_model the first step hands the model
#   all of the sequence again, although the cache has its beginning: nothing is raised, and the text is another one.
# Versions: transformers 5.24.0, torch 2.13.0 on a CPU.
# Output seen: of 20 random prompts that go on with two more tokens all 20 plain calls are right, and all 20 with prompt
#   lookup and all 20 with an assistant write another text.
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
from transformers import LlamaConfig, LlamaForCausalLM


def new_model(seed):
    torch.manual_seed(seed)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, initializer_range=0.3, eos_token_id=None)).eval()


def call(ids, **options):
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8, "return_dict_in_generate": True} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


model = new_model(0)
ways = {
    "no guesses": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant_model": new_model(1)},
}
others = dict.fromkeys(ways, 0)
for seed in range(20):
    prompt = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(seed))
    for name, way in ways.items():
        before = call(prompt)
        ids = torch.cat([before.sequences, torch.tensor([[7, 9]])], 1)
        whole = call(ids).sequences
        assert torch.equal(call(ids, **way).sequences, whole), f"{name} is wrong without a cache too"
        others[name] += not torch.equal(call(ids, cache=before.past_key_values, **way).sequences, whole)
print("another text, of 20:", others)
assert others["no guesses"] == 0, "going on from a cache is wrong without guesses too"
assert others["prompt lookup"] and others["an assistant"], "guesses go on from a returned cache now"
print("seen: guesses that go on from a returned cache write another text, and nothing is raised")
PYTHON
