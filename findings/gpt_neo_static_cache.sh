#!/usr/bin/env bash
# GPT-Neo: a static cache changes the text.
#
# Expected: the kind of cache is a matter of speed; greedy text is the same with the default cache, with
#   cache_implementation="static" and with none.
# What happens: as soon as the static cache is longer than a local layer's window, the text is another one, without a
#   warning. Without compiling and with a single prompt, so neither padding nor torch.compile is to blame.
# Why: the attention cuts its window out of a fixed triangle by counting back from the number of keys. A static cache
#   always has as many keys as it has room, so a query is taken for the last position of the whole cache, and what a
#   local layer may see there is mostly slots that nothing has been written to yet.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: window 256: same text; windows 8 and 4: another text from the second new token on.
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
from transformers import GPTNeoConfig, GPTNeoForCausalLM


def texts(window):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=window,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = GPTNeoForCausalLM(config).double().eval()
    prompt = torch.randint(3, 64, (1, 10))
    choices = {
        "none": {"use_cache": False},
        "default": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }
    return {
        name: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, **choice
        )[0, 10:].tolist()
        for name, choice in choices.items()
    }


for window, changes in ((256, False), (8, True), (4, True)):
    text = texts(window)
    print("window", window, text)
    assert text["default"] == text["none"]
    assert (text["static"] != text["none"]) == changes, "the static cache behaves in another way now"
print("seen: GPT-Neo's local layers look at the wrong slots of a static cache")
PYTHON
