#!/usr/bin/env bash
# Youtu: from_pretrained() overwrites the saved embedding of the padding token with zeros.
#
# Expected: a model that is saved and loaded is the same model.
# What happens: if pad_token_id is set, the row of that token is zero after loading, whatever the file holds, and with
#   tied weights so is its row of lm_head. No warning, no missing keys. Loading initialises what the file did not
#   bring and leaves alone what it brought; the row is set through weight.data, which hides that mark. It matters as
#   soon as the row is not zero: when the padding token is a token that texts hold, or after the output side of tied
#   weights was trained. DeepSeek-V3, of the same build, keeps the row.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: Youtu: row 0 differs after loading and is all zeros, other rows equal; DeepSeek-V3: all rows equal.
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
import tempfile

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, YoutuConfig, YoutuForCausalLM


torch.set_grad_enabled(False)
size = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
dense = {"first_k_dense_replace": 2}  # no mixture of experts
for model_class, config, lost in (
    (YoutuForCausalLM, YoutuConfig(**size), True),
    (DeepseekV3ForCausalLM, DeepseekV3Config(**size, **dense), False),
):
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.get_input_embeddings().weight[0].normal_()  # as if it had been trained
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = model_class.from_pretrained(folder).eval()
    before, after = model.get_input_embeddings().weight, again.get_input_embeddings().weight
    rows = (before != after).any(dim=1).nonzero().flatten().tolist()
    tokens = torch.arange(3, 12)[None]
    gap = (model(tokens).logits - again(tokens).logits)[..., 0].abs().max().item()
    print(f"{model_class.__name__}: rows that differ {rows}, logit of token 0 off by {gap:.2g}")
    assert rows == ([0] if lost else []), "loading behaves in another way now"
    assert (gap > 0.1) == lost
    assert not lost or not after[0].any()
print("seen: Youtu's padding row is lost on loading")
PYTHON
