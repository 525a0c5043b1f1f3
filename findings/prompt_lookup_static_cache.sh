#!/usr/bin/env bash
# transformers: prompt lookup with a static cache raises near the end of some texts.
#
# Expected: prompt_lookup_num_tokens with cache_implementation="static" gives the text of greedy decoding; or the two
#   refuse each other.
# What happens: it depends on the text. The cache that generate() lays out holds max_length - 1 tokens, which is
#   enough for one token at a time. Where the last step still guesses a token, it writes one more than fits and raises
#   "index_copy_(): index 23 is out of bounds for dimension 2 with size 23". Texts whose last step guesses nothing are
#   right, so is an assistant model, and so is a StaticCache of one's own with room to spare.
# Versions: transformers 5.24.0, torch 2.13.0 on a CPU.
# Output seen: of eight random prompts five raise for 12 new tokens and one for 8; all other texts are those of greedy
#   decoding.
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
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache


def new_model():
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, initializer_range=0.3, eos_token_id=None)).eval()


def text(model, prompt, count, **options):
    mask = torch.ones_like(prompt)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": count} | options
    return model.generate(prompt, attention_mask=mask, **options)[0, prompt.shape[1] :].tolist()


static = {"cache_implementation": "static", "disable_compile": True}
lookup = {"prompt_lookup_num_tokens": 3}
outcomes = []
for seed in range(8):
    prompt = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(seed))
    for count in (8, 12):
        greedy = text(new_model(), prompt, count)
        model = new_model()
        assert text(model, prompt, count, **lookup) == greedy
        roomy = StaticCache(config=model.config, max_cache_len=64)
        assert text(model, prompt, count, **lookup, cache=roomy) == greedy
        try:
            outcome = "same" if text(new_model(), prompt, count, **lookup, **static) == greedy else "another text"
        except IndexError as error:
            outcome = str(error)
        print(f"prompt {seed}, {count} new tokens: {outcome}")
        outcomes.append(outcome)
assert "same" in outcomes, "prompt lookup on a static cache behaves in another way now"
assert any("out of bounds" in outcome for outcome in outcomes), "prompt lookup on a static cache no longer raises"
print("seen: the last guess of prompt lookup does not fit into the static cache")
PYTHON
