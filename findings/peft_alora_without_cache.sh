#!/usr/bin/env bash
# PEFT: activated LoRA (aLoRA) generates other text without a cache, or with a prefill in chunks.
#
# Expected: generate() gives the text that the forward pass gives, asked for one token after the other;
#   use_cache=False and prefill_chunk_size are matters of speed and memory.
# What happens: the adapter is to act on everything after the last invocation tokens. PEFT finds them once, in the
#   prompt, and keeps how many tokens from the end they begin. Without a cache each step's input is longer, and the
#   adapter lets go of the invocation tokens and of the first answer tokens one by one; in chunks the count is taken
#   for each chunk's end. No warning. With the default or a static cache, and with padding, it is right.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: logits off by 1 to 4 without a cache (from the second token on) and in chunks (from the first);
#   otherwise 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 peft==0.21.2

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


torch.manual_seed(0)
torch.set_grad_enabled(False)
size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
base = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, initializer_range=0.3, eos_token_id=None))
config = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[5, 6]
)
model = get_peft_model(base, config).eval()
for name, weight in model.named_parameters():
    if "lora_B" in name:  # as if it had been trained
        weight.normal_(std=0.2)

prompt = torch.tensor([[9, 14, 22, 5, 6, 33, 41]])
tokens, expected = prompt, []
for _ in range(6):
    expected.append(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1])
    tokens = torch.cat([tokens, expected[-1].argmax(-1, keepdim=True)], dim=1)
text = tokens[0, prompt.shape[1] :].tolist()

padded = torch.nn.functional.pad(prompt, (4, 0))
static = {"cache_implementation": "static", "disable_compile": True}
for start, options, first_wrong in (
    (prompt, {}, None),
    (prompt, static, None),
    (padded, {}, None),
    (prompt, {"use_cache": False}, 1),
    (prompt, {"prefill_chunk_size": 3}, 0),
):
    found = model.generate(
        input_ids=start,
        attention_mask=(start != 0).long(),
        max_new_tokens=len(text),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, seen, start=start: [text[len(seen) - start.shape[1]]],
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **options,
    )
    gaps = [(got - logits).abs().max().item() for got, logits in zip(found.logits, expected)]
    print(start.shape[1], options, [round(gap, 4) for gap in gaps])
    wrong = [gap > 0.1 for gap in gaps]
    if first_wrong is None:
        assert not any(wrong)
    else:
        assert not any(wrong[:first_wrong]), "aLoRA behaves in another way now"
        assert all(wrong[first_wrong:]), "aLoRA behaves in another way now"
print("seen: aLoRA counts its start from the end of an input that grows")
PYTHON
