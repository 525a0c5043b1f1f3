#!/usr/bin/env bash
# TRL: DPO with precomputed reference log probabilities takes those of an earlier run with other settings.
#
# Expected: precompute_ref_log_probs=True saves memory and changes nothing else. Where policy and reference are the same
#   model, the first loss of DPO is log 2 = 0.6931, whatever the settings, and KTO's is 0.5 with a KL of 0.
# What happens: the log probabilities are kept in a file beside the data set, under a name made of the prepared data set
#   and the reference's weights only. Truncation happens later, in the collator, and ld_alpha weighs the tokens later
#   still; neither is in the name, nor is the model's config. So a second run with another max_length and
#   truncation_mode="keep_end", with another ld_alpha and max_length=None, or with another RoPE scaling of the same
#   weights is given the first run's numbers: its losses, rewards and gradients are wrong from the first step on. No
#   warning; with datasets' caching switched off it is right. By default (max_length=1024, "keep_start") another
#   max_length or ld_alpha does no harm: prompts that are too long are filtered out first, and the name of what the
#   filter leaves holds the trainer's settings. Another config of the model does harm there too, and in KTO.
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0, accelerate 1.15.0, datasets 5.2.0.
# Output seen: first losses of DPO on one data set, a process each: no max_length 0.6931; then the last 8 tokens 1.0738,
#   without precomputing or without caching 0.6931; ld_alpha=0.5 0.9577; RoPE factor 4 0.8569. On another data set:
#   default settings 0.6931; then ld_alpha=0.5 0.6931, RoPE factor 4 0.8569. KTO with RoPE factor 4 after 1: 0.5126.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
cat > run.py <<'PYTHON'
"""First loss of a run of its own: python run.py dpo|kto FOLDER SETTINGS EXPECTED, where EXPECTED is right or wrong."""
import json
import math
import os
import random
import sys

import torch
from datasets import Dataset, disable_caching, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


method, folder, settings, expected = sys.argv[1:]
settings = json.loads(settings)
factor = settings.pop("rope_factor", 1.0)
if not settings.pop("caching", True):
    disable_caching()

words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{number}" for number in range(60)]
splitter = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
chance = random.Random(0)


def text(length):
    return " ".join(chance.choices(words[4:], k=length))


pairs = [(text(6), " " + text(chance.randint(3, 9)), " " + text(chance.randint(3, 9))) for _ in range(8)]
if method == "dpo":
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in pairs]
else:
    rows = [
        {"prompt": prompt, "completion": answer, "label": label}
        for prompt, *answers in pairs
        for answer, label in zip(answers, (True, False))
    ]
if not os.path.isdir(folder):
    Dataset.from_list(rows).save_to_disk(folder)


def made():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, rope_parameters=rope, initializer_range=0.3))


kind, config = (DPOTrainer, DPOConfig) if method == "dpo" else (KTOTrainer, KTOConfig)
config = config(
    output_dir="out",
    per_device_train_batch_size=8,
    max_steps=1,
    learning_rate=0.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    **{"precompute_ref_log_probs": True, **settings},
)
trainer = kind(
    model=made(), ref_model=made(), args=config, train_dataset=load_from_disk(folder), processing_class=tokenizer
)
trainer.remove_callback(PrinterCallback)
trainer.train()
loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
right = math.log(2) if method == "dpo" else 0.5
print(f"{method} {sys.argv[3]}: first loss {loss:.4f}, should be {right:.4f}", flush=True)
assert (abs(loss - right) < 1e-4) == (expected == "right"), f"this run is no longer {expected}"
PYTHON
run() { "$folder/venv/bin/python" run.py "$@" 2>errors || { tail -5 errors; exit 1; }; }
echo "one data set after the other, each run in a process of its own"
run dpo first '{"max_length": null}' right
run dpo first '{"max_length": 8, "truncation_mode": "keep_end"}' wrong
run dpo first '{"max_length": 8, "truncation_mode": "keep_end", "precompute_ref_log_probs": false}' right
run dpo first '{"max_length": 8, "truncation_mode": "keep_end", "caching": false}' right
run dpo first '{"max_length": null, "ld_alpha": 0.5}' wrong
run dpo first '{"max_length": null, "rope_factor": 4.0}' wrong
run dpo second '{}' right
run dpo second '{"ld_alpha": 0.5}' right
run dpo second '{"rope_factor": 4.0}' wrong
run kto third '{"max_length": null}' right
run kto third '{"max_length": null, "rope_factor": 4.0}' wrong
echo "seen: precomputed reference log probabilities outlive the settings that they were made with"
