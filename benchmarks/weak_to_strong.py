# SPDX-License-Identifier: Apache-2.0
"""What each method costs weak to strong: time for each token, extra parameters, peak memory.

    python benchmarks/weak_to_strong.py

A large base model and small guides with random weights, three objectives. Where guides are adapters on one small
model, all of them run in one forward; `separate` rows have a whole small model for each, as in the papers. On CUDA the
shapes are those of PARM's helpful-assistant experiment, a base of 7B and guides of 1.1B.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import argument_parser, device, interleave, paired_ratio, report
from models import load, prompts, with_arm, with_loras

from trl_parm import LM, PARM, GenARM, MODWeakToStrong, optimize_for_cpu


OBJECTIVES = ["helpful", "harmless", "humorous"]
PREFERENCE = [0.5, 0.3, 0.2]
PROMPT = 32


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = (row for batch in args.batch_sizes for row in measure(batch, args))
    report(
        "weak_to_strong",
        rows,
        [
            f"{args.base} guided by {args.guide}, {args.dtype}; greedy, {args.tokens} tokens after prompts of "
            f"{PROMPT}; median [quartiles] of {args.repeats} paired rounds. Extra parameters: of everything but the "
            "base model.",
        ],
        args.results,
        args.table,
    )


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argument_parser(__doc__)
    parser.add_argument("--base", default="Llama 7B" if cuda else "Llama 271M")
    parser.add_argument("--guide", default="Llama 1.1B" if cuda else "Llama 68M")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--tokens", type=int, default=128 if cuda else 24)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def measure(batch: int, args: argparse.Namespace):
    base = small(args.base, args)
    methods = guided(args)
    ids = prompts(batch, PROMPT, device())
    settings = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": args.tokens,
        "min_new_tokens": args.tokens, "pad_token_id": 0,
    }  # fmt: skip
    variants: dict[str, Callable] = {"base": lambda: base.generate(ids, **settings)}
    for name, (make, _) in methods.items():
        variants[name] = lambda make=make: make(base).generate(ids, **settings)
    times = interleave(variants, args.repeats, warmup=1)
    for name in variants:
        middle, low, high = paired_ratio(times, name, "base")
        found = {
            "method": name,
            "batch": batch,
            "time / base": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            "extra parameters, M": "" if name == "base" else f"{methods[name][1] / 1e6:.1f}",
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            variants[name]()
            found["peak of a call, MiB"] = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
        print(found, flush=True)
        yield found


def guided(args: argparse.Namespace) -> dict[str, tuple[Callable, int]]:
    """Method → what makes its guided model, and how many parameters it adds to the base model."""
    parm = with_arm(small(args.guide, args, 1), len(OBJECTIVES))
    adapters = with_loras(small(args.guide, args, 1), OBJECTIVES)
    apart = {name: with_loras(small(args.guide, args, 1 + i), [name]) for i, name in enumerate(OBJECTIVES)}
    reference = small(args.guide, args, 1)
    named = {name: name for name in OBJECTIVES}
    untuned = LM(adapters, disable_adapter=True)
    policies = sum(size(model) for model in apart.values())
    return {
        "PARM": (lambda base: PARM(base, parm, PREFERENCE), size(parm)),
        "GenARM k=3, one forward": (
            lambda base: GenARM(base, named, PREFERENCE, adapters_of=adapters), size(adapters)
        ),
        "GenARM k=3, separate": (lambda base: GenARM(base, apart, PREFERENCE), policies),
        "MOD-w2s k=3, one forward": (
            lambda base: MODWeakToStrong(base, named, untuned, PREFERENCE, adapters_of=adapters), size(adapters)
        ),
        "MOD-w2s k=3, separate": (
            lambda base: MODWeakToStrong(base, apart, reference, PREFERENCE), policies + size(reference)
        ),
    }  # fmt: skip


def small(name: str, args: argparse.Namespace, seed: int = 0):
    model = load(name, getattr(torch, args.dtype), device(), seed)
    if not torch.cuda.is_available() and args.dtype == "float32":
        optimize_for_cpu(model, torch.float32)
    return model


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
