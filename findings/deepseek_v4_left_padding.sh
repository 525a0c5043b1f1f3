#!/usr/bin/env bash
# DeepSeek-V4: padding on the left changes the result, mask or not.
#
# Expected: padding that the attention mask hides changes nothing, as in other models; batches of prompts of different
#   lengths depend on it.
# What happens: layers of type "compressed_sparse_attention" and "heavily_compressed_attention" sum up blocks of
#   tokens into one key each. The blocks are cut from the first column of the batch, padding included, and blocks of
#   nothing but padding are attended to, so even padding by whole blocks changes the result. Layers of type
#   "sliding_attention" are right. generate() with a padded batch gives other text than one prompt at a time, without
#   a warning.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: last logits off by 1 to 6 for 1 to 16 columns of padding, and another token behind the mask changes
#   them too; sliding layers: by 1e-6.
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
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM


torch.set_grad_enabled(False)


def model_of(kind):
    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=[kind] * 2,
        mlp_layer_types=["moe"] * 2,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        sliding_window=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=16,
        index_head_dim=16,
        index_n_heads=2,
        index_topk=4,
        hc_mult=2,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return DeepseekV4ForCausalLM(config).eval()


def padded(tokens, columns):
    tokens = torch.nn.functional.pad(tokens, (columns, 0))
    mask = (tokens != 0).long()
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def text(model, tokens, mask):
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)
    return found[0, tokens.shape[1] :].tolist()


for kind, wrong in (
    ("sliding_attention", False),
    ("heavily_compressed_attention", True),
    ("compressed_sparse_attention", True),
):
    model = model_of(kind)
    prompt = torch.randint(3, 64, (1, 20))
    plain = model(prompt, use_cache=False).logits[:, -1]
    for columns in (1, 3, 4, 8, 16):
        tokens, mask, positions = padded(prompt, columns)
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        gap = (logits - plain).abs().max().item()
        tokens[:, :columns] = 7  # still masked
        other = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        seen = (logits - other).abs().max().item()
        print(f"{kind}, {columns} columns: off by {gap:.2g}, what is masked matters by {seen:.2g}")
        assert (gap > 0.1) == wrong, "padding behaves in another way now"
        assert (seen > 0.01) == wrong, "padding behaves in another way now"
    texts = [text(model, *padded(prompt, columns)[:2]) for columns in (0, 8)]
    print(*texts)
    assert (texts[0] != texts[1]) == wrong
print("seen: DeepSeek-V4 attends to padding")
PYTHON
