#!/usr/bin/env bash
# transformers: Phi-3 writes another text where one that outgrows its original length is read in parts.
#
# Expected: Phi-3's long variants turn all keys by other factors once a text is longer than
#   original_max_position_embeddings (LongRoPE; 4,096 of Phi-3-mini-128k). Plain generate() knows that: at this length
#   it reads the text anew. So the other ways of greedy decoding should write the same, or refuse.
# What happens: a prefill in chunks keeps the keys of the first chunks turned by the short factors. Prompt lookup asks
#   for the distribution after texts on both sides of the length at once, and gets all of them by the long factors.
#   Continuous batching (generate_batch) never reads anew, and a text that is short is turned by the long factors while
#   a long one is in its batch. All three write another text, without a word; texts that stay below the length, or are
#   beyond it from the start, are right with prompt lookup and continuous batching.
# Versions: transformers 5.24.0, torch 2.13.0 on a CPU.
# Output seen: of eight random prompts all are written otherwise by a prefill in chunks, four by prompt lookup and all by
#   continuous batching; beside a long text a short one changes too.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 psutil==7.2.2

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

LENGTH, NEW = 16, 8


def new_model():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
    rope |= {"factor": 4.0, "original_max_position_embeddings": LENGTH}
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}
    own = {"rope_parameters": rope, "original_max_position_embeddings": LENGTH}
    return Phi3ForCausalLM(Phi3Config(**size, **heads, **tokens, **own)).eval()


def prompt_of(length, seed):
    return torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def text(prompt, **options):
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW} | options
    return new_model().generate(ids, **options)[0, len(prompt) :].tolist()


def batched(prompts):
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = new_model().generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    answers = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
    return [answers[tuple(prompt)] for prompt in prompts]


counts = dict.fromkeys(("chunks", "lookup", "batch", "lookup beyond", "batch beyond", "batch below"), 0)
for seed in range(8):
    across, beyond, below = prompt_of(13, seed), prompt_of(20, seed), prompt_of(5, seed)
    for prompt in (across, beyond, below):
        assert text(prompt) == text(prompt, use_cache=False)  # what is right
    counts["chunks"] += text(beyond, prefill_chunk_size=6) != text(beyond)
    counts["lookup"] += text(across, prompt_lookup_num_tokens=3) != text(across)
    counts["lookup beyond"] += text(beyond, prompt_lookup_num_tokens=3) != text(beyond)
    counts["batch"] += batched([across])[0] != text(across)
    counts["batch beyond"] += batched([beyond])[0] != text(beyond)
    counts["batch below"] += batched([below])[0] != text(below)
print("texts of eight that differ from plain generate():", counts)
short, long = prompt_of(5, 0), prompt_of(20, 0)
beside = batched([short, long])[0] != text(short)
print("a short text differs beside a long one in continuous batching:", beside)
wrong = all(counts[name] > 0 for name in ("chunks", "lookup", "batch")) and beside
right = not any(counts[name] for name in ("lookup beyond", "batch beyond", "batch below"))
assert wrong and right, "Phi-3's texts in parts are otherwise now"
print("seen: Phi-3 writes another text where it is read in parts across its original length")
PYTHON
