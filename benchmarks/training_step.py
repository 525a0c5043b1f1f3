# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of a training step on pairs with two labels, beside naive and other ways to the same loss.

    python benchmarks/training_step.py [--model "Llama 7B" --checkpointing] [--repeats 5] [--no-dpo] [--targets]

A random Llama with a vocabulary of 32,000, forward and backward, no optimizer. The first five rows compute one and
the same loss on the same weights, which is checked in float32, and printed where bfloat16 rounds the logits. TRL's
DPOTrainer, with precomputed reference log-probabilities and PEFT LoRA, has another loss on the same tokens; its fused
head is made for CUDA. Each variant is compared with the naive one, step by step.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import weakref
from collections.abc import Callable

import torch
from adapter_overhead import DenseDelta
from common import argument_parser, device, interleave, paired_ratio, report, rounds_for, verdict
from datasets import Dataset, disable_progress_bars
from models import ATTENTION, SHAPES, load, shared_copy
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_pblora import PBLoraConfig, set_preference
from trl_parm import PreferenceARMConfig
from trl_parm.training.data import PreferenceCollator
from trl_parm.training.log_probs import Responses, separate_rows
from trl_parm.training.losses import count_labels


OBJECTIVES = ["helpful", "harmless"]
PREFERENCE = [0.3, 0.7]
VOCABULARY = 32_000
SHAPES["Llama 52M"] = (512, 6, 8, 1408, VOCABULARY)
OURS = "ours", "ours, shared prompt"
MOST_TIME, MOST_MEMORY = 0.8, 0.35
"""Targets for ours beside naive on an H100 or H200, at 7B."""


class Shape:
    """What a step is made of: a small model for CPUs, one of 1.1 billion parameters for GPUs, unless others are given.

    All variants train adapters of their own on the same frozen weights.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        cuda = torch.cuda.is_available()
        self.name = args.model or ("Llama 1.1B" if cuda else "Llama 52M")
        self.dtype = torch.bfloat16 if cuda else torch.float32
        sizes = zip((args.pairs, args.prompt, args.response), (8, 256, 256) if cuda else (2, 192, 192))
        self.pairs, self.prompt, self.response = (given or default for given, default in sizes)
        self.checkpointing = args.checkpointing
        self._frozen = load(self.name, self.dtype, device())

    def model(self) -> LlamaForCausalLM:
        return shared_copy(self._frozen)

    def training(self, model: nn.Module) -> nn.Module:
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def pair_ids(self) -> list[dict]:
        torch.manual_seed(1)
        lengths = {"prompt_ids": self.prompt, "first_ids": self.response, "second_ids": self.response}
        labels = [[1, -1], [-1, 1], [1, 1], [-1, -1]]
        return [
            {name: torch.randint(2, VOCABULARY, (n,)).tolist() for name, n in lengths.items()}
            | {"labels": labels[i % 4], "pair_id": i}
            for i in range(self.pairs)
        ]

    def batch(self, share_prompt: bool) -> dict[str, torch.Tensor]:
        batch = PreferenceCollator(0, share_prompt=share_prompt)([{"pairs": self.pair_ids()}])
        return {name: tensor.to(device()) for name, tensor in batch.items()}


def adapted(shape: Shape) -> nn.Module:
    model = get_peft_model(shape.model(), PBLoraConfig(objectives=OBJECTIVES, target_modules=ATTENTION))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    set_preference(model, PREFERENCE)
    return shape.training(model)


def with_dense_deltas(shape: Shape) -> nn.Module:
    """The same weights, but ΔW multiplied out in every forward, as the authors' layer does."""
    model, ours = shape.model().requires_grad_(False), dict(adapted(shape).named_modules())
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] not in ATTENTION:
            continue
        dense, adapter = DenseDelta(module, torch.float32), ours[f"base_model.model.{name}"].adapter("default")
        dense.A, dense.B, dense.W1, dense.W2 = adapter.A.weight, adapter.B.weight, adapter.core.W1, adapter.core.W2
        dense.preference = torch.tensor(PREFERENCE, device=device())
        setattr(model.get_submodule(name.rpartition(".")[0]), name.split(".")[-1], dense)
    return shape.training(model)


def full_log_softmax(model: nn.Module, batch: dict[str, torch.Tensor], copies: bool) -> torch.Tensor:
    """log π of all responses from float32 logits of all tokens; with the copies that the authors' loss makes."""
    inputs, _ = separate_rows(batch)
    logits = model(**inputs, use_cache=False).logits.float()
    mask, targets = batch["segments"][:, 1:] > 0, inputs["input_ids"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    if copies:
        # Chosen and rejected logits are picked by label, for each objective, and returned beside the loss.
        halves = [logits[: len(logits) // 2], logits[len(logits) // 2 :]]
        signs = batch["pair_labels"].T[:, :, None, None]
        picked = [torch.where(sign > 0, *order) for sign in signs for order in (halves, halves[::-1])]
        assert len(picked) == 2 * len(OBJECTIVES)
    return (log_probs * mask).sum(-1)


def step(model: nn.Module, log_probs: Callable[[], tuple[torch.Tensor, torch.Tensor]], labels: torch.Tensor):
    loss = PreferenceARMConfig("unused", beta=0.1, bf16=False, report_to="none").arm_loss(OBJECTIVES)
    preference, counts = torch.tensor(PREFERENCE, device=labels.device), count_labels(labels)

    def run() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        first, second = log_probs()
        value = loss(first - second, labels, preference, counts)[0]
        value.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return value.item(), torch.stack(norms).norm().item()

    return run


def variants(shape: Shape) -> dict[str, Callable[[], object]]:
    batch = shape.batch(False)
    labels = batch["pair_labels"]
    found: dict[str, Callable[[], object]] = {}
    for name, model, copies in (
        ("naive: log-softmax of all logits", adapted(shape), False),
        ("twin of the authors' loss and layer", with_dense_deltas(shape), True),
    ):
        found[name] = step(model, lambda m=model, c=copies: full_log_softmax(m, batch, c).chunk(2), labels)
    for name, share, chunked in (
        ("ours, from logits of the responses", False, False),
        ("ours", False, True),
        ("ours, shared prompt", True, True),
    ):
        model = adapted(shape)
        responses = Responses(model, PreferenceARMConfig("unused", share_prompt=share, bf16=False, report_to="none"))
        if not chunked:
            responses._sums.head = None
        given = shape.batch(share)
        found[name] = step(model, lambda m=model, r=responses, b=given: r.log_probs(m, b), labels)
    return found


def dpo_step(shape: Shape, folder: str) -> Callable[[], object]:
    """A step of TRL's DPOTrainer on the same tokens."""
    from trl import DPOConfig, DPOTrainer

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w3")
    text = lambda ids: "".join(f" w{i}" for i in ids)  # noqa: E731
    rows = [
        {"prompt": text(p["prompt_ids"]), "chosen": text(p["first_ids"][:-1]), "rejected": text(p["second_ids"][:-1])}
        for p in shape.pair_ids()
    ]
    trainer = DPOTrainer(
        shape.model(),
        args=DPOConfig(
            folder, per_device_train_batch_size=shape.pairs, precompute_ref_log_probs=True, report_to="none",
            gradient_checkpointing=shape.checkpointing, bf16=False, max_length=None, use_cpu=device().type == "cpu",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=ATTENTION),
    )  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        trainer.compute_loss(model, batch).backward()

    return run


class PeakMemory(TorchDispatchMode):
    """Largest sum of bytes of the tensors that operations make and that live at one time; weights do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        alive = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
        self._known = {tensor.untyped_storage().data_ptr(): 0 for tensor in alive}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address and address not in self._known:
            self._known[address] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.now -= self._known.pop(address, 0)


def peak_bytes(run: Callable[[], object]) -> int:
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak


def check(shape: Shape, values: dict[str, tuple[float, float]]) -> None:
    """Raises `AssertionError` unless all variants have the same loss and gradients, as far as float32 can tell."""
    first = next(iter(values.values()))
    for name, found in values.items():
        print(f"{name}: loss {found[0]:.6f}, gradient norm {found[1]:.6f}", flush=True)
        if shape.dtype == torch.float32:
            assert all(abs(ours / theirs - 1) < 1e-4 for ours, theirs in zip(found, first)), name


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", choices=[name for name in SHAPES if SHAPES[name]])
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--prompt", type=int, help="tokens")
    parser.add_argument("--response", type=int, help="tokens")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, as the trainer has it")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--repeats", type=int, help="so many rounds, and not as many as take a while")
    parser.add_argument("--no-dpo", dest="dpo", action="store_false", help="without TRL's DPOTrainer")
    parser.add_argument("--targets", action="store_true", help="say beside figures whether a GPU's targets were met")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    disable_progress_bars()
    shape = Shape(args)
    runs = variants(shape)
    values = {name: run() for name, run in runs.items()}
    check(shape, values)
    with tempfile.TemporaryDirectory() as folder:
        if args.dpo:
            runs["TRL DPOTrainer, PEFT LoRA"] = dpo_step(shape, folder)
            runs["TRL DPOTrainer, PEFT LoRA"]()
        memory = {name: peak_bytes(run) for name, run in runs.items()}
        if args.repeats:
            times = interleave(runs, args.repeats, warmup=0)
        else:
            times = interleave(runs, rounds_for(runs, 20 if args.quick else 200, least=5))
    rows = [row(name, times, memory, values, args) for name in runs]
    how = ", gradient checkpointing" if shape.checkpointing else ""
    hidden, layers = SHAPES[shape.name][:2]
    note = (
        f"Llama of {layers} layers of {hidden}, vocabulary {VOCABULARY:,}, {shape.dtype}{how}; {shape.pairs} "
        f"pairs with a prompt of {shape.prompt} and responses of {shape.response} tokens, two objectives. Time: "
        "median [quartiles] of paired rounds. Peak memory: tensors that live at one time beside the model's own."
    )
    report("training_step", rows, [note], args.results, args.table)


def row(name: str, times, memory: dict[str, int], values, args: argparse.Namespace) -> dict[str, object]:
    naive, authors = list(values)[:2]
    time, share = paired_ratio(times, name, naive), memory[name] / memory[naive]
    found: dict[str, object] = {"": name, "time / naive": "{:.2f} [{:.2f}, {:.2f}]".format(*time)}
    found["peak memory / naive"] = f"{share:.2f}"
    if args.targets:
        ours = name in OURS
        found["target, time"] = verdict(time[0], MOST_TIME) if ours else ""
        found["target, memory"] = verdict(share, MOST_MEMORY) if ours else ""
        found["loss"], found["gradient norm"] = (f"{value:.4f}" for value in values.get(name, (torch.nan,) * 2))
    return found | {
        "peak memory, MiB": f"{memory[name] / 2**20:.0f}",
        "speed / authors' twin": f"{paired_ratio(times, authors, name)[0]:.2f}",
        "memory / authors' twin": f"{memory[name] / memory[authors]:.2f}",
    }


if __name__ == "__main__":
    main()
