# SPDX-License-Identifier: Apache-2.0
"""Guided decoding with separate models, against the bound that running both allows: 1 / (1/base + 1/guides).

    python benchmarks/guided_decoding.py

Rows: model pairs × new tokens × batch sizes, for PARM (one guide) and GenARM (k guides). The bound is made of what
`generate` of each model alone takes. Base and guides are separate models here; what sharing their weights saves is
`shared_backbone.py`'s.
"""

from __future__ import annotations

import argparse

import torch
from common import device, interleave, paired_ratio, report
from models import cache_bytes, load, prompts, with_arm

from trl_parm import PARM, GenARM


PROMPT = 64


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = []
    for base, guide in [pair.split("+") for pair in args.pairs]:
        for guides in args.guides:
            rows += measure(base, guide, guides, args)
    report(
        "guided_decoding",
        rows,
        [
            f"{args.dtype}, greedy, prompts of {PROMPT} tokens; median [quartiles] of {args.repeats} paired rounds. "
            "`guided / bound`: tokens a second as a share of 1/(1/base + Σ 1/guide), where every model decodes on its "
            "own with `generate`. Caches: keys and values at the end, of the base and of all guides."
        ],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=["Llama 68M+Llama 17M"])
    parser.add_argument("--guides", nargs="+", type=int, default=[1, 2], help="1 is PARM, more GenARM")
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def measure(base_name: str, guide_name: str, guides: int, args: argparse.Namespace):
    dtype = getattr(torch, args.dtype)
    base = load(base_name, dtype, device())
    arms = [with_arm(load(guide_name, dtype, device(), seed=1 + i)) for i in range(guides)]
    for tokens in args.tokens:
        for batch in args.batch_sizes:
            yield row(base_name, guide_name, base, arms, tokens, batch, args.repeats)


def row(base_name, guide_name, base, arms, tokens: int, batch: int, repeats: int) -> dict[str, object]:
    ids = prompts(batch, PROMPT, device())
    settings = {
        "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens,
        "pad_token_id": 0,
    }  # fmt: skip
    if len(arms) == 1:
        guided = PARM(base, arms[0], [0.5, 0.5])
    else:
        weights = [1 / len(arms)] * len(arms)
        guided = GenARM(base, {str(i): arm for i, arm in enumerate(arms)}, weights)
    variants = {
        "base": lambda: base.generate(ids, **settings),
        **{f"guide {i}": lambda arm=arm: arm.generate(input_ids=ids, **settings) for i, arm in enumerate(arms)},
        "guided": lambda: guided.generate(ids, **settings),
    }
    times = interleave(variants, repeats, warmup=1)
    alone = [times[name] for name in variants if name != "guided"]
    times["bound"] = [sum(parts) for parts in zip(*alone)]
    middle, low, high = paired_ratio(times, "bound", "guided")
    of_base = paired_ratio(times, "guided", "base")[0]
    found = {
        "base + guides": f"{base_name} + {len(arms)} × {guide_name}",
        "new tokens": tokens,
        "batch": batch,
        "base, tokens/s": f"{batch * tokens / sorted(times['base'])[repeats // 2]:.1f}",
        "guided, tokens/s": f"{batch * tokens / sorted(times['guided'])[repeats // 2]:.1f}",
        "guided / bound": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        "time / base": f"{of_base:.2f}",
        "caches, MiB": " + ".join(
            f"{cache_bytes(model, batch, PROMPT + tokens) * n / 2**20:.1f}"
            for model, n in ((base, 1), (arms[0].get_base_model(), len(arms)))
        ),
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
