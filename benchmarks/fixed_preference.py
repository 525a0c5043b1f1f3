# SPDX-License-Identifier: Apache-2.0
"""What a preference that stays costs, folded, exported or merged, and what static caches and compiled forwards save.

    python benchmarks/fixed_preference.py [--only forms|compiled]

First a separate guide in three forms: with its adapter folded (which it is by itself, once for each α), exported to a
plain LoRA, and merged into its weights. Then base and guide on one set of weights: eager and compiled, the preference
another one in every call. On CUDA compiled forwards are CUDA graphs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import cycle

import torch
from common import argument_parser, device, interleave, paired_ratio, report
from models import caches, load, prompts, with_arm
from peft import PeftModel

from peft_pblora import preference_grid, save_as_lora, set_preference
from trl_parm import PARM


PROMPT = 8
PREFERENCE = [0.3, 0.7]


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    parts = {"forms": of_forms, "compiled": of_compiled}
    rows = (row for part in args.only for batch in args.batch_sizes for row in parts[part](batch, args))
    report("fixed_preference", rows, notes(args), args.results, args.table)


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="Llama 7B" if cuda else "Llama 68M")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--tokens", type=int, default=128 if cuda else 24)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["forms", "compiled"], choices=["forms", "compiled"])
    parser.add_argument("--backend", default="inductor", help="what compiles")
    return parser.parse_args()


def fresh(args: argparse.Namespace):
    """The model, always with the same weights."""
    return load(args.model, getattr(torch, args.dtype), device())


def arm(model):
    torch.manual_seed(1)
    adapted = with_arm(model)
    set_preference(adapted, PREFERENCE)
    return adapted


def exported(args: argparse.Namespace):
    with tempfile.TemporaryDirectory() as folder:
        save_as_lora(arm(fresh(args)), folder, PREFERENCE)
        return PeftModel.from_pretrained(fresh(args), folder).eval()


def of_forms(batch: int, args: argparse.Namespace):
    """A separate guide in each form: by itself, and beside a base model of the same size."""
    forms = {
        "PBLoRA": arm(fresh(args)),
        "exported LoRA": exported(args),
        "merged": arm(fresh(args)).merge_and_unload(),
    }
    base, ids, settings = fresh(args), prompts(batch, PROMPT, device()), generation(args.tokens)
    alphas = cycle(preference_grid(["a", "b"], 10))

    def guided(arm, alpha=None):
        PARM(base, arm, alpha).generate(ids, **settings)

    variants: dict[str, Callable] = {"unguided": lambda: base.generate(ids, **settings)}
    for name, model in forms.items():
        variants[f"{name} alone"] = lambda model=model: model.generate(input_ids=ids, **settings)
        variants[name] = lambda model=model: guided(model)
    variants["PBLoRA, a new α"] = lambda: guided(forms["PBLoRA"], next(alphas))
    times = interleave(variants, args.repeats, warmup=1)
    for name in [*forms, "PBLoRA, a new α"]:
        found = {"": f"guide: {name}", "batch": batch, "time / unguided": text(paired_ratio(times, name, "unguided"))}
        if name in forms:
            found["guide alone / merged alone"] = text(paired_ratio(times, f"{name} alone", "merged alone"))
        print(found, flush=True)
        yield found


def of_compiled(batch: int, args: argparse.Namespace):
    """The base model alone and with an adapter on it as the guide, at another preference in every call."""
    base, guided = fresh(args), arm(fresh(args))
    ids, settings = prompts(batch, PROMPT, device()), generation(args.tokens)
    alphas = cycle(preference_grid(["a", "b"], 10))
    ways = caches(args.backend)

    def with_new_alpha(way):
        PARM(guided.get_base_model(), guided, next(alphas)).generate(ids, **settings, **way)

    variants: dict[str, Callable] = {}
    for name, way in ways.items():
        variants[f"unguided, {name}"] = lambda way=way: base.generate(ids, **settings, **way)
        variants[f"PARM, {name}"] = lambda way=way: with_new_alpha(way)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    times = interleave(variants, args.repeats, warmup=1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ways:
        for who in ("unguided", "PARM"):
            yield line(times, f"{who}, {name}", f"unguided, {name}", batch, graphs if name == "compiled" else "")


def line(times, name: str, unguided: str, batch: int, graphs) -> dict[str, object]:
    found = {
        "": name,
        "batch": batch,
        "time / unguided": text(paired_ratio(times, name, unguided)),
        "time / unguided, default cache": text(paired_ratio(times, name, "unguided, default cache")),
        "graphs": graphs,
    }
    print(found, flush=True)
    return found


def generation(tokens: int) -> dict[str, object]:
    return {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}


def text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


def notes(args: argparse.Namespace) -> list[str]:
    return [
        f"{args.model}, random weights, as base model and as guide; {args.dtype}. `generate`, greedy, "
        f"{args.tokens} tokens after prompts of {PROMPT}, prefill included, compilation not; median [quartiles] of "
        f"{args.repeats} paired rounds. Graphs: compiled for the unguided and the guided model together, over all "
        "calls, each at another α.",
    ]


if __name__ == "__main__":
    main()
