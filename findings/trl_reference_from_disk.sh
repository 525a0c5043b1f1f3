#!/usr/bin/env bash
# TRL: DPO compares with the weights on disk, not with the model that it is given.
#
# Expected: with ref_model=None the reference is "the model state before DPO training starts", as the documentation of
#   the argument says. So the first loss of DPO is log 2 = 0.6931, whatever the model.
# What happens: the reference is loaded anew from where the model's config says that it came from. If the weights have
#   been changed in memory since, by training, by merging an adapter or by hand, policy and reference differ from the
#   start. No warning. KTO has the same lines. A model that was never on disk fails with a message about the id of a
#   repository.
# Versions: trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0.
# Output seen: first losses of DPO 0.6931 for the model as loaded, 0.5690 for the changed one, 0.6931 for the changed
#   one after it was saved and loaded. In memory only: "Repo id must use alphanumeric chars ...: ''".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import math
import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


words = ["<pad>", "<eos>", "<unk>"] + [f"w{number}" for number in range(60)]
splitter = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
chance = random.Random(0)


def sentence():
    return " ".join(chance.choices(words[3:], k=4)) + " "


rows = [{"prompt": sentence(), "chosen": sentence(), "rejected": sentence()} for _ in range(4)]


def first_loss(model):
    config = DPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def changed(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():  # as merging an adapter would
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.add_(torch.randn_like(layer.mlp.up_proj.weight), alpha=1.0)
    return model


torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
tokens = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
fresh = LlamaForCausalLM(LlamaConfig(**size, **tokens, initializer_range=0.3))
fresh.save_pretrained("first")
changed("first").save_pretrained("second")

losses = {
    "as loaded": first_loss(LlamaForCausalLM.from_pretrained("first")),
    "changed in memory": first_loss(changed("first")),
    "changed, saved and loaded": first_loss(LlamaForCausalLM.from_pretrained("second")),
}
print(losses)
for name, loss in losses.items():
    assert (abs(loss - math.log(2)) > 0.01) == (name == "changed in memory"), "the reference is another one now"
try:
    first_loss(fresh)
except OSError as error:
    print("in memory only:", str(error).splitlines()[0])
    assert "Repo id" in str(error)
else:
    raise AssertionError("a model that was never on disk is taken now")
print("seen: the reference is what lies on disk")
PYTHON
