# SPDX-License-Identifier: Apache-2.0
"""What guidance costs where base and guides share one set of weights, and what a sweep over preferences costs.

    python benchmarks/shared_backbone.py [--models ...] [--dtype float32|bfloat16] [--products float32|bfloat16]
        [--cache "default cache"|"static cache"|compiled] [--genarm 2 3] [--only parm sweep] [--targets]

Decoding after one prompt, beside the unguided base model at the same batch size: PARM and GenARM in one forward,
the same by a logits processor, in two, and the authors' way, which we wrote as a naive twin: two forwards, one prompt
at a time, and an adapter that multiplies out its m×n product in every layer of every forward.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from common import argument_parser, device, interleave, paired_ratio, report, verdict
from models import caches, load, prompts, shared_copy, with_arm, with_loras
from transformers import DynamicCache

from peft_pblora import preference_grid
from peft_pblora.kv_cache import cache_argument, cache_in
from peft_pblora.layer import PreferenceLinear
from trl_parm import PARM, GenARM, GenARMLogitsProcessor, PARMLogitsProcessor, optimize_for_cpu
from trl_parm.cpu import has_bfloat16_units


PROMPT = 32
PARTS = ["parm", "genarm", "processor", "authors", "sweep"]
SWEEP = "11 α of one prompt, one forward"
TARGETS = {("PARM, one forward", 1): 1.10, ("PARM, one forward", 8): 1.30, (SWEEP, 1): 2.0}
"""Variant and batch → the most that a token may take beside an unguided one on an H100 or H200, at 7B; computed from
bytes and operations before anything ran there."""


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = (row for name in args.models for row in measure(name, args))
    report("shared_backbone", rows, notes(args), args.results, args.table)


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["Llama 7B"] if cuda else ["SmolLM2-135M", "Llama 271M"])
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--products", default=None if cuda else "float32", help="of `optimize_for_cpu`, which packs")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="default cache", choices=list(caches()))
    parser.add_argument("--backend", default="inductor", help="what compiles")
    parser.add_argument("--genarm", nargs="+", type=int, default=[2], help="numbers of objectives")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--targets", action="store_true", help="say beside figures whether a GPU's targets were met")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace):
    dtype = getattr(torch, args.dtype)
    base = load(name, dtype, device())
    if args.products:
        optimize_for_cpu(base, getattr(torch, args.products))
    parm = with_arm(shared_copy(base))
    genarm = with_loras(shared_copy(base), names_of(max(args.genarm)))
    dense = shared_copy(parm)
    for module in dense.modules():
        if isinstance(module, PreferenceLinear):
            module.forward = DenseTwin(module)
    for batch in args.batch_sizes:
        yield from of_batch(name, batch, base, parm, genarm, dense, args)
    if "sweep" in args.only:
        yield from of_sweep(name, base, parm, args)


def names_of(objectives: int) -> list[str]:
    return [f"objective {i + 1}" for i in range(objectives)]


def of_batch(name, batch, base, parm, genarm, dense, args):
    ids, preference, way = prompts(batch, PROMPT, device()), [0.3, 0.7], caches(args.backend)[args.cache]
    parm_base = parm.get_base_model()
    variants = {"unguided": Decoding(lambda: base, ids, way)}
    if "parm" in args.only:
        variants["PARM, one forward"] = Decoding(lambda: PARM(parm_base, parm, preference), ids, way)
    if {"parm", "processor"} <= set(args.only):
        variants["PARM by a processor, two forwards"] = Decoding(
            lambda: parm_base, ids, way, lambda: PARMLogitsProcessor(parm, preference)
        )
    for k in args.genarm if "genarm" in args.only else ():
        arms = {name: name for name in names_of(k)}
        weights = preference if k == 2 else [1 / k] * k
        variants[f"GenARM k={k}, one forward"] = Decoding(
            lambda arms=arms, weights=weights: GenARM(genarm.get_base_model(), arms, weights, adapters_of=genarm),
            ids, way,
        )  # fmt: skip
        if "processor" in args.only:
            variants[f"GenARM k={k} by a processor, two forwards"] = Decoding(
                genarm.get_base_model, ids, way,
                lambda arms=arms, weights=weights: GenARMLogitsProcessor(arms, weights, adapters_of=genarm),
            )  # fmt: skip
    if batch == 1 and "authors" in args.only:
        variants["the authors' way"] = lambda tokens: authors_decode(base, dense, ids, tokens)
    whole, steps = timed(variants, args)
    for variant in variants:
        yield line(name, batch, variant, whole, steps, args)


def of_sweep(name, base, parm, args):
    """Eleven preferences of one prompt at once, beside one unguided sequence and eleven guided ones in turn."""
    ids, grid, model = prompts(1, PROMPT, device()), preference_grid(["a", "b"], 10), parm.get_base_model()
    way = caches(args.backend)[args.cache]
    each = [Decoding(lambda α=α: PARM(model, parm, α), ids, way) for α in grid]
    variants = {
        "unguided": Decoding(lambda: base, ids, way),
        SWEEP: Decoding(lambda: PARM(model, parm, grid), ids.repeat(11, 1), way),
    }
    if not way:
        variants["11 α in turn"] = lambda tokens: [decode(tokens) for decode in each]
    whole, steps = timed(variants, args)
    for variant in list(variants)[1:]:
        yield line(name, 1, variant, whole, steps, args)


class Decoding:
    """Calls of `generate`. A cache of fixed size is emptied for the next call and stays where it is in memory."""

    def __init__(self, make, ids: torch.Tensor, way: dict[str, object], processor=None) -> None:
        self.make, self.ids, self.way, self.processor = make, ids, way, processor
        self.cache = None

    def __call__(self, tokens: int) -> None:
        model, settings = self.make(), {**generation(tokens), **self.way}
        if self.processor is not None:
            settings["logits_processor"] = [self.processor()]
        if self.cache is not None:
            self.cache.reset()
            settings.pop("cache_implementation")
            settings |= cache_argument(getattr(model, "backbone", model), self.cache)
        found = model.generate(self.ids, return_dict_in_generate=True, **settings)
        if "cache_implementation" in self.way:
            self.cache = cache_in(found)


def timed(variants, args) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of whole calls, and of all their tokens but the first, which the prompt's forward gives."""
    calls = {
        (variant, tokens): lambda run=run, tokens=tokens: run(tokens)
        for variant, run in variants.items()
        for tokens in (args.tokens, 1)  # the cache has room for as many as the first call wants
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


def line(name, batch, variant, whole, steps, args) -> dict[str, object]:
    found: dict[str, object] = {"model": name, "batch": batch, "": variant}
    ratio = paired_ratio(steps, variant, "unguided")
    found["token / unguided token"] = text(ratio)
    if args.targets:
        most = TARGETS.get((variant, batch))
        found["target"] = "" if most is None else verdict(ratio[0], most)
        found["ms a token"] = f"{1000 * statistics.median(steps[variant]) / (args.tokens - 1):.2f}"
    found["with the prompt"] = f"{paired_ratio(whole, variant, 'unguided')[0]:.2f}"
    if one := next((other for other in steps if other.endswith("one forward")), None):
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
        f"{args.dtype}{kernels}{capability}; {args.cache}. `generate`, greedy, {args.tokens} tokens after prompts of "
        f"{PROMPT}; median [quartiles] of {args.repeats} paired rounds. A token: the time of all but the first, whose "
        "forward reads the prompt. In one forward: PARM's, or that of the eleven preferences. The authors' way "
        "decodes prompt by prompt, so that a batch takes it as many times as long as one.",
    ]


if __name__ == "__main__":
    main()
