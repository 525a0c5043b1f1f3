#!/usr/bin/env bash
# TRL: trainers stop at the first step where single tokens of a tied model are trained.
#
# Expected: a LoRA with `trainable_token_indices`, PEFT's way to train new tokens, trains with SFT, DPO and KTO whether
#   embedding and output layer share their weights or not. Most small models share them.
# What happens: where they do, PEFT trains the tokens in the output layer too, by a wrapper around it. These trainers
#   call the output layer's parts in the model's place, look for its bias, and the wrapper has none. The first step
#   raises, without a word about tokens or ties. The check that refuses a LoRA on the output layer does not see it.
#   Transformers' own Trainer trains the same model.
# Versions: trl 1.16.0, peft 0.21.2, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0.
# Output seen: apart: SFT, DPO and KTO train; tied: "AttributeError: 'TrainableTokensWrapper' object has no attribute
#   'bias'" for each, and transformers' Trainer trains.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer


words = ["<pad>", "<eos>", "<unk>"] + [f"w{number}" for number in range(60)]
splitter = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
texts = [{"text": f"w{at % 7} w2 w3 w4"} for at in range(16)]
pairs = [{"prompt": f"w{at % 7} w2", "chosen": " w3 w4", "rejected": " w5"} for at in range(16)]
marked = [{"prompt": f"w{at % 7} w2", "completion": " w3 w4", "label": at % 2 == 0} for at in range(16)]
settings = {
    "output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none",
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def model(tied):
    torch.manual_seed(0)
    size = {"vocab_size": 63, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1)
    return LlamaForCausalLM(config)


def lora():
    return LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")


for tied in (False, True):
    for method, Config, rows in ((SFTTrainer, SFTConfig, texts), (DPOTrainer, DPOConfig, pairs),
                                 (KTOTrainer, KTOConfig, marked)):  # fmt: skip
        trainer = method(
            model(tied), args=Config(bf16=False, **settings), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=lora(),
        )  # fmt: skip
        said = "trains"
        try:
            trainer.train()
        except AttributeError as error:
            said = f"AttributeError: {error}"
        print(f"{method.__name__}, {'tied' if tied else 'apart'}: {said}")
        assert (said == "trains") == (not tied), "trainers take trainable tokens otherwise now"
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 16
    own = Trainer(get_peft_model(model(tied), lora()), TrainingArguments(**settings), train_dataset=Dataset.from_list(rows))
    own.train()
    print(f"transformers' Trainer, {'tied' if tied else 'apart'}: trains")
print("seen: TRL's trainers stop where single tokens of a tied model are trained")
PYTHON
