#!/usr/bin/env bash
# transformers: guidance_scale with beam search mixes up the beams' histories.
#
# Expected: with classifier-free guidance a beam's score is the sum of the guided scores of its own tokens; or the two
#   options refuse each other. And with a negative prompt each beam is guided by it.
# What happens:
#   1. Without a negative prompt it runs, and the scores are wrong. What the unguided branch has read is kept by the
#      logits processor, one row for each beam, and nobody tells it which beam each row comes from after a step. It is
#      so with and without a cache.
#   2. With a negative prompt it raises a message about sizes of tensors, and so does num_return_sequences=2 with
#      sampling: the rows of the negative prompt are not repeated as those of the prompt are.
# Versions: transformers 5.24.0, torch 2.13.0.
# Output seen:
#   1. The best beam says -1.23, the guided scores of its tokens add up to -3.48; greedy decoding agrees to 1e-6.
#   2. "Sizes of tensors must match except in dimension 1. Expected size 1 but got size 3 for tensor number 1 in the
#      list."
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
scale = 1.5


def log_probs(tokens):
    return model(tokens[None], use_cache=False).logits[0, -1].log_softmax(-1)


def guided(tokens):
    """The sum of the guided scores of all tokens after the prompt, from the formula, one step at a time."""
    total = 0.0
    for end in range(8, len(tokens)):
        with_prompt = log_probs(tokens[:end])
        without = log_probs(tokens[7:end])  # the unguided branch starts with the prompt's last token
        total += (without + scale * (with_prompt - without))[tokens[end]].item()
    return total


def beams(count, **options):
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        guidance_scale=scale,
        max_new_tokens=6,
        do_sample=False,
        num_beams=count,
        num_return_sequences=count,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


for use_cache in (True, False):
    found = beams(3, use_cache=use_cache)
    for tokens, score in zip(found.sequences, found.sequences_scores.tolist()):
        print(f"use_cache={use_cache} {tokens[8:].tolist()} says {score:.4f}, is {guided(tokens):.4f}")
    assert abs(found.sequences_scores[0].item() - guided(found.sequences[0])) > 0.5, "the scores are right now"

greedy = beams(1)
steps = zip(greedy.scores, greedy.sequences[0, 8:])
assert abs(sum(scores[0, token].item() for scores, token in steps) - guided(greedy.sequences[0])) < 1e-6

for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
    try:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            negative_prompt_ids=negative,
            guidance_scale=scale,
            max_new_tokens=6,
            **options,
        )
    except RuntimeError as error:
        print(options, error)
        assert "Sizes of tensors must match" in str(error)
    else:
        raise AssertionError(f"{options} no longer raises with a negative prompt")
print("seen: guided beams are scored with other beams' histories")
PYTHON
