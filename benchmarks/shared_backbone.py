# SPDX-License-Identifier: Apache-2.0
"""What guidance costs where base and guides share one set of weights, and what a sweep over preferences costs.

    python benchmarks/shared_backbone.py [--models ...] [--dtype float32|bfloat16] [--kernels onednn|torch]

Decode steps after one prompt, beside the unguided base model at the same batch size: PARM and GenARM in one forward,
the same in forwards of their own, and the authors' way, which we wrote as a naive twin: two forwards, one prompt at a
time, and an adapter that multiplies out its m×n product in every layer of every forward.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from common import device, interleave, paired_ratio, report
from models import load, prompts, use_onednn, with_arm, with_loras
from transformers import DynamicCache

from peft_pblora import preference_grid
from peft_pblora.layer import PreferenceLinear
from trl_parm import GenARMLogitsProcessor, PARMLogitsProcessor


PROMPT = 32


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = []
    for name in args.models:
        rows += measure(name, args)
    report("shared_backbone", rows, notes(args))


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Llama 7B"] if cuda else ["SmolLM2-135M", "Llama 271M"])
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--kernels", default="torch" if cuda else "onednn", choices=["torch", "onednn"])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5 if cuda else 3)
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace):
    dtype = getattr(torch, args.dtype)
    base = load(name, dtype, device())
    if args.kernels == "onednn":
        use_onednn(base)
    parm, genarm = with_arm(shared_copy(base)), with_loras(shared_copy(base), ["helpful", "harmless"])
    dense = shared_copy(parm)
    for module in dense.modules():
        if isinstance(module, PreferenceLinear):
            module.forward = DenseTwin(module)
    for batch in args.batch_sizes:
        yield from of_batch(name, batch, base, parm, genarm, dense, args)
    yield of_sweep(name, base, parm, args)


def shared_copy(model):
    """A model of the same weights, so that several adapted ones fit into memory."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = (getattr(m.__dict__.get("forward"), "weight", None) for m in model.modules())
    memo |= {id(tensor): tensor for tensor in packed if tensor is not None}
    return copy.deepcopy(model, memo)


def of_batch(name, batch, base, parm, genarm, dense, args):
    ids, settings = prompts(batch, PROMPT, device()), generation(args.tokens)
    preference, arms = [0.3, 0.7], {"helpful": "helpful", "harmless": "harmless"}
    parm_base, genarm_base = parm.get_base_model(), genarm.get_base_model()

    def guided(model, processor):
        return lambda: model.generate(ids, logits_processor=[processor()], **settings)

    variants = {
        "unguided": lambda: base.generate(ids, **settings),
        "PARM, one forward": guided(parm_base, lambda: PARMLogitsProcessor(parm, preference)),
        "PARM, two forwards": guided(parm_base, lambda: PARMLogitsProcessor(parm, preference, shared_forward=False)),
        "GenARM k=2, one forward": guided(
            genarm_base, lambda: GenARMLogitsProcessor(arms, preference, adapters_of=genarm)
        ),
        "GenARM k=2, three forwards": guided(
            genarm_base,
            lambda: GenARMLogitsProcessor(arms, preference, adapters_of=genarm, shared_forward=False),
        ),
    }
    if batch == 1:
        variants["the authors' way"] = lambda: authors_decode(base, dense, ids, args.tokens)
    times = interleave(variants, args.repeats, warmup=1)
    for variant in variants:
        yield line(name, batch, variant, times, "unguided", {"/ PARM, one forward": "PARM, one forward"})


def of_sweep(name, base, parm, args):
    """Eleven preferences of one prompt at once, beside one unguided sequence and eleven guided ones in turn."""
    ids, settings = prompts(1, PROMPT, device()), generation(args.tokens)
    grid, model = preference_grid(["a", "b"], 10), parm.get_base_model()

    def in_turn():
        for preference in grid:
            guide = PARMLogitsProcessor(parm, preference, shared_forward=False)
            model.generate(ids, logits_processor=[guide], **settings)

    variants = {
        "unguided": lambda: base.generate(ids, **settings),
        "sweep": lambda: model.generate(
            ids.repeat(11, 1), logits_processor=[PARMLogitsProcessor(parm, grid)], **settings
        ),
        "in turn": in_turn,
    }
    times = interleave(variants, max(3, args.repeats // 2), warmup=1)
    found = line(
        name,
        "11 α of one prompt",
        "sweep, one forward",
        {**times, "sweep, one forward": times["sweep"]},
        "unguided",
        {},
    )
    found["in turn, two forwards / this"] = text(paired_ratio(times, "in turn", "sweep"))
    return found


def generation(tokens: int) -> dict[str, object]:
    return {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}


@torch.no_grad()
def authors_decode(base, arm, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Two forwards a token, one prompt at a time."""
    caches, new = [DynamicCache(config=base.config) for _ in range(2)], ids
    for _ in range(tokens):
        found = [
            torch.log_softmax(model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1].float(), -1)
            for model, cache in zip((base, arm), caches)
        ]
        new = (found[0] + found[1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
    return ids


class DenseTwin:
    """The authors' adapter: s · B W(α) A multiplied out, as large as the layer's own weight, in every forward."""

    def __init__(self, layer: PreferenceLinear) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        delta = self.layer.get_delta_weight("default")
        return self.layer.base_layer(x) + F.linear(x.to(delta.dtype), delta).to(x.dtype)


def line(name, batch, variant, times, unit, others) -> dict[str, object]:
    found = {"model": name, "batch": batch, "": variant, "time / unguided": text(paired_ratio(times, variant, unit))}
    for column, other in others.items():
        found[f"time {column}"] = f"{paired_ratio(times, variant, other)[0]:.2f}"
    print(found, flush=True)
    return found


def text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def notes(args: argparse.Namespace) -> list[str]:
    kernels = ", linear layers by oneDNN with packed weights" if args.kernels == "onednn" else ""
    capability = "" if torch.cuda.is_available() else f"; the CPU has {torch.backends.cpu.get_cpu_capability()}"
    return [
        f"{args.dtype}{kernels}{capability}. `generate`, greedy, {args.tokens} tokens after prompts of {PROMPT}, "
        f"prefill included; median [quartiles] of {args.repeats} paired rounds. The authors' way decodes "
        "prompt by prompt, so that a batch takes it as many times as long as one.",
    ]


if __name__ == "__main__":
    main()
