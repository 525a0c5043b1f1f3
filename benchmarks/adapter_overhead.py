# SPDX-License-Identifier: Apache-2.0
"""What a PBLoRA layer costs beside the frozen linear alone, PEFT's LoRA, and a dense-delta twin (the authors' way).

    python benchmarks/adapter_overhead.py [--quick]

Five questions: (a) one token, (b) training with 2,048 tokens in 4 rows, (c) a preference for each row, there and with
one token in each of 8 rows, (d) switching the preference, and (e) memory saved for backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import argument_parser, device, interleave, paired_ratio, report, rounds_for
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pblora import PBLoraConfig, set_preference


OBJECTIVES = ["helpful", "harmless"]
R1 = R2 = 4
SIZES = [512, 1024, 2048, 4096]
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
          "bf16 + fp32 adapter": (torch.bfloat16, torch.float32)}  # fmt: skip


class One(nn.Module):
    """A model of a single linear layer."""

    def __init__(self, n: int, m: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(n, m, bias=False, dtype=dtype, device=device()).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class DenseDelta(nn.Module):
    """The straightforward layer: ΔW(α) multiplied out to m×n in every forward."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, r = base, R1 + R2
        new = lambda *shape: nn.Parameter(0.02 * torch.randn(*shape, dtype=dtype, device=device()))  # noqa: E731
        self.A, self.B = new(r, base.in_features), new(base.out_features, r)
        self.W1, self.W2 = new(R1, R1), new(len(OBJECTIVES), R2 * R2)
        self.preference = torch.tensor([0.3, 0.7], dtype=dtype, device=device())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        aware = (self.preference @ self.W2).view(R2, R2)
        delta = self.B[:, :R1] @ self.W1 @ self.A[:R1] + self.B[:, R1:] @ aware @ self.A[R1:]
        return self.base(x) + (F.linear(x.to(delta.dtype), delta) * 2.0).to(x.dtype)


def build(n: int, m: int, base_dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, nn.Module]:
    """The variants on one and the same frozen weight."""
    torch.manual_seed(0)
    frozen = One(n, m, base_dtype)
    settings = {"target_modules": ["linear"]}

    def with_frozen(config) -> nn.Module:
        model = One(n, m, base_dtype)
        model.linear.weight = frozen.linear.weight
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = (0.02 * torch.randn_like(parameter)).to(adapter_dtype)
        return model.base_model.model

    pblora = PBLoraConfig(objectives=OBJECTIVES, r1=R1, r2=R2, **settings)
    variants = {
        "frozen": frozen,
        "PEFT LoRA r=8": with_frozen(LoraConfig(r=8, lora_alpha=16, **settings)),
        "dense delta": DenseDelta(frozen.linear, adapter_dtype),
        "PBLoRA": with_frozen(pblora),
        "PBLoRA, α a row": with_frozen(pblora),
    }
    set_preference(variants["PBLoRA"], [0.3, 0.7])
    return variants


def decode(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def train(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.train()

    def run() -> None:
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()

    return run


def layer_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    shapes = [(n, m) for n in args.sizes for m in ((n, 256) if n == 2048 else (n,))]
    shapes = shapes[::2] if args.quick else shapes
    seconds = args.seconds or (2 if args.quick else 10)
    for what, tokens in (("one token", 1), ("one token in 8 rows", 8), ("training", 2048)):
        for n, m in shapes:
            for label, dtypes in DTYPES.items():
                row = layer_row(what, tokens, n, m, label, dtypes, seconds)
                print(row, flush=True)
                yield row


def layer_row(what, tokens, n, m, label, dtypes, seconds) -> dict[str, object]:
    variants = build(n, m, *dtypes)
    batch = {1: 1, 8: 8}.get(tokens, 4)
    x = torch.randn(batch, tokens // batch, n, dtype=dtypes[0], device=device())
    set_preference(variants["PBLoRA, α a row"], torch.full((batch, 2), 0.5))
    if what == "training":
        x.requires_grad_()
    runs = {name: (train if what == "training" else decode)(model, x) for name, model in variants.items()}
    # The dense twin sweeps the caches and would slow down whatever comes after it: it meets the frozen layer alone.
    dense = {name: runs.pop(name) if name == "dense delta" else runs[name] for name in ("frozen", "dense delta")}
    times = interleave(runs, rounds_for(runs, seconds))
    dense_times = interleave(dense, rounds_for(dense, seconds / 2))
    row = {"": what, "dtype": label, "shape": f"{n}→{m}"}
    for name in list(variants)[1:]:
        middle, low, high = paired_ratio(dense_times if name in dense else times, name, "frozen")
        row[name] = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    row["row / one α"] = f"{paired_ratio(times, 'PBLoRA, α a row', 'PBLoRA')[0]:.2f}"
    return row


def switching(quick: bool, layers: int) -> str:
    """(d): a new preference, with the fold it costs, beside one decoding step of a model of some layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    with torch.device(device()):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(
        model, PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "k_proj", "v_proj"]),
        autocast_adapter_dtype=False,
    ).eval()  # fmt: skip
    ids = torch.ones(1, 1, dtype=torch.long, device=device())
    weights = iter(torch.rand(10_000).tolist())
    step = decode(model, ids)

    def switched() -> None:
        weight = next(weights)
        set_preference(model, [weight, 1 - weight])
        step()

    times = interleave({"step": step, "switched step": switched}, 20 if quick else 100)
    middle, low, high = paired_ratio(times, "switched step", "step")
    ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    return f"(d) A step after a new preference takes {ratio} of a step, {layers} layers of 1024."


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps from a forward, each storage once, the parameters and the input left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(kept.values())


def memory(size: int) -> str:
    variants = build(size, size, torch.float32, torch.float32)
    x = torch.randn(1, 512, size, device=device(), requires_grad=True)
    sizes = {name: saved_bytes(variants[name].train(), x) for name in ("dense delta", "PEFT LoRA r=8", "PBLoRA")}
    text = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in sizes.items())
    ratio = sizes["dense delta"] / sizes["PBLoRA"]
    return f"(e) Saved for backward at {size}×{size}, 512 tokens, fp32: {text}; dense delta / PBLoRA = {ratio:.0f}."


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="of the layers, square but for the one "
                        "of 2048, which has a narrow twin as k and v")  # fmt: skip
    parser.add_argument("--layers", type=int, default=16, help="of the model of which a step is timed")
    parser.add_argument("--seconds", type=float, help="for the rounds of one row")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    notes = ["Ratios to the frozen linear alone: median [quartiles] of paired rounds."]
    report("adapter_overhead", all_rows(args, notes), notes, args.results, args.table)


def all_rows(args: argparse.Namespace, notes: list[str]) -> Iterator[dict[str, object]]:
    """The rows, and after them what stands below."""
    yield from layer_rows(args)
    notes += [switching(args.quick, args.layers), memory(max(args.sizes))]


if __name__ == "__main__":
    main()
