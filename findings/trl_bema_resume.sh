#!/usr/bin/env bash
# TRL: BEMA's average begins anew where a training is resumed, and takes no model of which a part is frozen.
#
# Expected: a training that is resumed from a checkpoint ends as one that was not stopped, as far as the checkpoint
#   can say; what BEMACallback writes at the end is the average over the whole training. With frozen parameters, as in
#   every LoRA, the average is that of the others.
# What happens: the average and the start that it is corrected by are kept nowhere. A resumed training takes the
#   checkpoint's weights for both, with the decay of its step, and writes another average, with equal weights of the
#   model itself, with update_after and without. No warning. Where a parameter is frozen the first update raises, by
#   default after 400 steps of training.
# Versions: trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0.
# Output seen: weights of the resumed training off by 0, BEMA's by 0.027, as far as they are from the weights (0.033).
#   A frozen embedding: RuntimeError: The size of tensor a (32) must match the size of tensor b (16) ...
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
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import BEMACallback


def model():
    torch.manual_seed(0)
    size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))


rows = [{"input_ids": list(range(at % 8, at % 8 + 8)), "labels": list(range(8))} for at in range(64)]
rows = Dataset.from_list(rows)


def train(folder, net, steps, resume=None, **settings):
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=6, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True,
        per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    callback = BEMACallback(**{"update_freq": 1, **settings})
    trainer = Trainer(net, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    average = LlamaForCausalLM.from_pretrained(f"{folder}/bema")
    return [torch.cat([value.flatten() for value in one.state_dict().values()]) for one in (net, average)]


def off(one, other):
    return (one - other).abs().max().item()


for settings in ({}, {"update_after": 3}):
    name = f"runs-{len(settings)}"
    weights, average = train(f"{name}/whole", model(), 12, **settings)
    train(f"{name}/parts", model(), 6, **settings)
    again, resumed = train(f"{name}/parts", model(), 12, f"{name}/parts/checkpoint-6", **settings)
    print(
        f"{settings}: weights of the resumed training off by {off(weights, again):.2g}, BEMA's by "
        f"{off(average, resumed):.2g}; BEMA is {off(average, weights):.2g} from the weights"
    )
    assert off(weights, again) < 1e-6, "a resumed training trains otherwise"
    assert off(average, resumed) > 1e-3, "BEMA goes on where it was now"

frozen = model()
frozen.model.embed_tokens.requires_grad_(False)
try:
    train("runs-frozen", frozen, 6)
except (ValueError, RuntimeError) as error:
    print(f"a frozen embedding: {type(error).__name__}: {error}")
else:
    raise SystemExit("BEMA takes frozen parameters now")
print("seen: BEMA's average begins anew where a training is resumed")
PYTHON
