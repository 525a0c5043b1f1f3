# SPDX-License-Identifier: Apache-2.0
"""What guidance costs where base and guides share one set of weights, and what a sweep over preferences costs.

    python benchmarks/shared_backbone.py [--models ...] [--dtype float32|bfloat16] [--products float32|bfloat16]

Decoding after one prompt, beside the unguided base model at the same batch size: PARM and GenARM in one forward,
the same by a logits processor, in two, and the authors' way, which we wrote as a naive twin: two forwards, one prompt
at a time, and an adapter that multiplies out its m×n product in every layer of every forward.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from common import device, interleave, paired_ratio, report
from models import load, prompts, with_arm, with_loras
from transformers import DynamicCache

from peft_pblora import preference_grid
from peft_pblora.kv_cache import cache_argument
from peft_pblora.layer import PreferenceLinear
from trl_parm import PARM, GenARM, GenARMLogitsProcessor, PARMLogitsProcessor, optimize_for_cpu
from trl_parm.cpu import has_bfloat16_units


PROMPT = 32


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = []
    for name in args.models:
        rows += measure(name, args)
    report("shared_backbone" + ("_bfloat16" if args.products == "bfloat16" else ""), rows, notes(args))


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Llama 7B"] if cuda else ["SmolLM2-135M", "Llama 271M"])
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--products", default=None if cuda else "float32", help="of `optimize_for_cpu`, which packs")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace):
    dtype = getattr(torch, args.dtype)
    base = load(name, dtype, device())
    if args.products:
        optimize_for_cpu(base, getattr(torch, args.products))
    parm, genarm = with_arm(shared_copy(base)), with_loras(shared_copy(base), ["helpful", "harmless"])
    dense = shared_copy(parm)
    for module in dense.modules():
        if isinstance(module, PreferenceLinear):
            module.forward = DenseTwin(module)
    for batch in args.batch_sizes:
        yield from of_batch(name, batch, base, parm, genarm, dense, args)
    yield from of_sweep(name, base, parm, args)


def shared_copy(model):
    """A model of the same weights, so that several adapted ones fit into memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def of_batch(name, batch, base, parm, genarm, dense, args):
    ids, preference = prompts(batch, PROMPT, device()), [0.3, 0.7]
    arms = {"helpful": "helpful", "harmless": "harmless"}
    parm_base, genarm_base = parm.get_base_model(), genarm.get_base_model()

    def guided(make):
        return lambda tokens: make().generate(ids, **generation(tokens))

    def processed(model, make):
        return lambda tokens: model.generate(ids, logits_processor=[make()], **generation(tokens))

    variants = {
        "unguided": lambda tokens: base.generate(ids, **generation(tokens)),
        "PARM, one forward": guided(lambda: PARM(parm_base, parm, preference)),
        "PARM by a processor, two forwards": processed(parm_base, lambda: PARMLogitsProcessor(parm, preference)),
        "GenARM k=2, one forward": guided(lambda: GenARM(genarm_base, arms, preference, adapters_of=genarm)),
        "GenARM k=2 by a processor, two forwards": processed(
            genarm_base, lambda: GenARMLogitsProcessor(arms, preference, adapters_of=genarm)
        ),
    }
    if batch == 1:
        variants["the authors' way"] = lambda tokens: authors_decode(base, dense, ids, tokens)
    whole, steps = timed(variants, args)
    for variant in variants:
        yield line(name, batch, variant, whole, steps)


def of_sweep(name, base, parm, args):
    """Eleven preferences of one prompt at once, beside one unguided sequence and eleven guided ones in turn."""
    ids, grid, model = prompts(1, PROMPT, device()), preference_grid(["a", "b"], 10), parm.get_base_model()

    def in_turn(tokens):
        for preference in grid:
            PARM(model, parm, preference).generate(ids, **generation(tokens))

    def at_once(tokens):
        return PARM(model, parm, grid).generate(ids.repeat(11, 1), **generation(tokens))

    variants = {
        "unguided": lambda tokens: base.generate(ids, **generation(tokens)),
        "11 α of one prompt, one forward": at_once,
        "11 α in turn": in_turn,
    }
    whole, steps = timed(variants, args)
    for variant in list(variants)[1:]:
        yield line(name, 1, variant, whole, steps)


def timed(variants, args) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of whole calls, and of all their tokens but the first, which the prompt's forward gives."""
    calls = {
        (variant, tokens): lambda run=run, tokens=tokens: run(tokens)
        for variant, run in variants.items()
        for tokens in (1, args.tokens)
    }
    times = interleave(calls, args.repeats, warmup=1)
    whole = {variant: times[variant, args.tokens] for variant in variants}
    first = {variant: times[variant, 1] for variant in variants}
    return whole, {name: [a - b for a, b in zip(whole[name], first[name])] for name in variants}


def generation(tokens: int) -> dict[str, object]:
    return {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}


@torch.no_grad()
def authors_decode(base, arm, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Two forwards a token, one prompt at a time."""
    caches, new = [DynamicCache(config=base.config) for _ in range(2)], ids
    for _ in range(tokens):
        found = [
            torch.log_softmax(
                model(input_ids=new, use_cache=True, **cache_argument(model, cache)).logits[:, -1].float(), -1
            )
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


def line(name, batch, variant, whole, steps) -> dict[str, object]:
    found: dict[str, object] = {"model": name, "batch": batch, "": variant}
    found["token / unguided token"] = text(paired_ratio(steps, variant, "unguided"))
    found["with the prompt"] = f"{paired_ratio(whole, variant, 'unguided')[0]:.2f}"
    one = next(other for other in steps if other.endswith("one forward"))
    found["token / token in one forward"] = f"{paired_ratio(steps, variant, one)[0]:.2f}"
    print(found, flush=True)
    return found


def text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def notes(args: argparse.Namespace) -> list[str]:
    kernels = f", after `optimize_for_cpu` with products in {args.products}" if args.products else ""
    units = "with" if has_bfloat16_units() else "without"
    capability = f"; the CPU has {torch.backends.cpu.get_cpu_capability()}, {units} bfloat16 units"
    capability = "" if torch.cuda.is_available() else capability
    return [
        f"{args.dtype}{kernels}{capability}. `generate`, greedy, {args.tokens} tokens after prompts of {PROMPT}; "
        f"median [quartiles] of {args.repeats} paired rounds. A token: the time of all but the first, whose forward "
        "reads the prompt. In one forward: PARM's, or that of the eleven preferences. The authors' way decodes prompt "
        "by prompt, so that a batch takes it as many times as long as one.",
    ]


if __name__ == "__main__":
    main()
