#!/usr/bin/env bash
# transformers: guidance_scale with prompt lookup or an assistant model generates another text.
#
# Expected: assisted decoding is a matter of speed: greedy text is the same with prompt_lookup_num_tokens or with an
#   assistant model as without.
# What happens: with classifier-free guidance on, both give another text, without a warning. The logits processor that
#   guides has a memory: each call is taken for one more token of the text. Assisted decoding calls it for positions
#   that are thrown away later, and lends the same processor to the assistant, so the unguided branch reads tokens
#   twice or tokens that are not part of the text. Without guidance all three agree, and plain greedy decoding with
#   guidance agrees with the formula.
# Versions: transformers 5.24.0, torch 2.13.0. Related upstream: transformers #48390 (processors in assisted
#   decoding).
# Output seen: formula and greedy [8, 2, 22, 9, 2, ...], prompt lookup [9, 2, 19, 5, 19, ...], the model as its own
#   assistant [6, 10, 20, 19, 9, ...].
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


torch.manual_seed(0)
torch.set_grad_enabled(False)
config = LlamaConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.25,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
model = LlamaForCausalLM(config).double().eval()
prompt = torch.randint(3, 24, (1, 8))
negative = torch.randint(3, 24, (1, 5))


def log_probs(start, text):
    tokens = torch.cat([start, torch.tensor([text], dtype=torch.long)], dim=1)
    return model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)


def formula(scale, length=12):
    text = []
    for _ in range(length):
        with_prompt, without = log_probs(prompt, text), log_probs(negative, text)
        text.append((without + scale * (with_prompt - without)).argmax().item())
    return text


def generated(scale, **options):
    guidance = {} if scale == 1 else {"guidance_scale": scale, "negative_prompt_ids": negative}
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, **guidance, **options
    )
    return tokens[0, 8:].tolist()


for scale in (1, 1.5):
    texts = {
        "formula": formula(scale),
        "greedy": generated(scale),
        "prompt lookup": generated(scale, prompt_lookup_num_tokens=3),
        "assistant": generated(scale, assistant_model=model),
    }
    for name, text in texts.items():
        print(f"scale {scale}, {name}: {text}")
    assert texts["greedy"] == texts["formula"]
    for name in ("prompt lookup", "assistant"):
        assert (texts[name] == texts["formula"]) == (scale == 1), f"{name} behaves in another way now"
print("seen: assisted decoding changes guided text")
PYTHON
