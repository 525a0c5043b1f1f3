#!/usr/bin/env bash
# Inkling: a static cache changes the text as soon as the prompt is longer than the sliding window.
#
# Expected: greedy text is the same with the default cache, with cache_implementation="static" and with none.
# What happens: for a prompt longer than sliding_window_size the static cache gives other logits from the first new
#   token on, without a warning and without compiling. A shorter prompt is right, even when the text outgrows the
#   window later. Inkling adds a bias for the distance of two tokens; it seems to be counted for other keys than those
#   that a static cache with a window hands out for a long prompt (Gemma 3 and Mistral, with the same windows but no
#   such bias, agree).
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: window 8, prompt of 4 tokens: logits off by 1e-7; of 12: by 0.09 at the first new token, by up to 0.31
#   later, and all but a few tokens of the text are others.
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
from transformers import AutoModelForCausalLM, InklingTextConfig


torch.manual_seed(0)
config = InklingTextConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=["hybrid_sliding"] * 2,
    sliding_window_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.3,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
model = AutoModelForCausalLM.from_config(config).eval()
choices = {
    "none": {"use_cache": False},
    "default": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
for length, wrong in ((4, False), (12, True)):
    prompt = torch.randint(3, 64, (1, length))
    logits = {}
    for name, choice in choices.items():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=14,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **choice,
        )
        logits[name] = torch.stack(found.logits)
        print(f"prompt of {length}, cache {name}: {found.sequences[0, length:].tolist()}")
    assert (logits["default"] - logits["none"]).abs().max() < 1e-4
    first = (logits["static"] - logits["none"])[0].abs().max().item()
    largest = (logits["static"] - logits["none"]).abs().max().item()
    print(f"static cache off by {first:.2g} at the first new token, by up to {largest:.2g}")
    assert (first > 1e-3) == wrong, "Inkling's static cache behaves in another way now"
print("seen: Inkling on a static cache takes the wrong distances for a long prompt")
PYTHON
