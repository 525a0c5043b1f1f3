#!/usr/bin/env bash
# transformers: padding on the left of a negative prompt changes the text of models with learned positions.
#
# Expected: padding that the mask hides changes nothing; for a prompt it is so, since generate() counts its positions
#   from the mask.
# What happens: with guidance_scale, negative_prompt_ids and negative_prompt_attention_mask, the branch of the
#   negative prompt gets the mask but no positions, so GPT-2 counts its padding as text and the negative prompt sits
#   further to the right. Padding is what a tokenizer makes of two negative prompts of different lengths. Rotary
#   models, Llama for one, do not show it: only distances matter to them.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen: GPT-2: padded prompt same text, padded negative prompt another text; Llama: the same text for both.
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def gpt2():
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    size = {"vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, **tokens, initializer_range=0.3))


def llama():
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    size = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, num_attention_heads=4, initializer_range=0.3))


def text(model, prompt, negative):
    tokens = model.generate(
        prompt,
        attention_mask=(prompt != 0).long(),
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=(negative != 0).long(),
        guidance_scale=1.5,
        max_new_tokens=12,
        do_sample=False,
    )
    return tokens[0, prompt.shape[1] :].tolist()


def padded(tokens):
    return torch.nn.functional.pad(tokens, (3, 0))


for make, changes in ((gpt2, True), (llama, False)):
    torch.manual_seed(0)
    model = make().double().eval()
    prompt, negative = torch.randint(3, 24, (1, 8)), torch.randint(3, 24, (1, 5))
    plain = text(model, prompt, negative)
    padded_prompt = text(model, padded(prompt), negative)
    padded_negative = text(model, prompt, padded(negative))
    print(make.__name__, plain, padded_prompt, padded_negative)
    assert padded_prompt == plain
    assert (padded_negative != plain) == changes, "a padded negative prompt behaves in another way now"
print("seen: GPT-2 counts the padding of a negative prompt as text")
PYTHON
