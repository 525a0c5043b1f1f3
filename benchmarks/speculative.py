# SPDX-License-Identifier: Apache-2.0
"""Guided decoding weak to strong where the ARM's own backbone drafts, beside plain guidance and the unguided base.

    python benchmarks/speculative.py

The base is a Llama of 24 layers; the ARM's backbone has its first two layers, and the base's later ones are scaled
down, so that how well the drafts fit can be chosen (`--strangeness`). What this shows is what drafting costs and
saves at a given rate of accepted drafts; the rate of a real pair is another matter.
"""

from __future__ import annotations

import argparse

import torch
from common import device, interleave, paired_ratio, report
from models import prompts, use_onednn, with_arm
from transformers import LlamaConfig, LlamaForCausalLM

from trl_parm import PARMLogitsProcessor


LAYERS, SMALL = 24, 2


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = []
    for strangeness in args.strangeness:
        for sample in (False, True):
            rows += measure(strangeness, sample, args)
    capability = "" if torch.cuda.is_available() else f", the CPU has {torch.backends.cpu.get_cpu_capability()}"
    report(
        "speculative",
        rows,
        [
            f"{args.dtype}{capability}; base {LAYERS} layers of 512, backbone of the ARM its first {SMALL}, "
            f"vocabulary 8192; {args.tokens} tokens, median [quartiles] of {args.repeats} paired rounds. Accepted: of "
            "the drafted tokens."
        ],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strangeness", nargs="+", type=float, default=[0.02, 0.1, 0.3])
    parser.add_argument("--drafted", nargs="+", type=int, default=[3, 5, 8])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def pair(strangeness: float, dtype: torch.dtype):
    """A base model and a model of its first layers."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 8192,
        "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.06,
    }  # fmt: skip
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **shape)).to(device(), dtype).eval()
    small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=SMALL, **shape)).to(device(), dtype).eval()
    small.load_state_dict({name: value for name, value in base.state_dict().items() if name in small.state_dict()})
    for layer in base.model.layers[SMALL:]:
        layer.self_attn.o_proj.weight.data *= strangeness
        layer.mlp.down_proj.weight.data *= strangeness
    return base, small


def measure(strangeness: float, sample: bool, args: argparse.Namespace):
    base, small = pair(strangeness, getattr(torch, args.dtype))
    if not torch.cuda.is_available() and args.dtype == "float32":
        use_onednn(base)
        use_onednn(small)
    arm = with_arm(small)
    ids = prompts(1, 32, device()) % 8192
    settings = {"do_sample": sample, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "pad_token_id": 0}
    settings |= {"top_k": 0} if sample else {}

    def guided(**more):
        return base.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=[PARMLogitsProcessor(arm, [0.3, 0.7])],
            **settings, **more,
        )  # fmt: skip

    def drafting(count: int):
        config = small.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = count, "constant"
        config.assistant_confidence_threshold = 0.0
        return guided(assistant_model=small)

    variants = {
        "unguided": lambda: base.generate(ids, attention_mask=torch.ones_like(ids), **settings),
        "guided": guided,
    }
    variants |= {f"drafts of {count}": lambda count=count: drafting(count) for count in args.drafted}
    times = interleave(variants, args.repeats, warmup=1)
    plain = guided()
    for name in variants:
        count = int(name.split()[-1]) if name.startswith("drafts") else 0
        found = {
            "later layers ×": strangeness,
            "decoding": "sampling" if sample else "greedy",
            "": name,
            "speed / unguided": text(paired_ratio(times, "unguided", name)),
            "speed / guided": text(paired_ratio(times, "guided", name)),
            "accepted": f"{accepted(base, drafting, count, args.tokens):.2f}" if count else "",
            "same text": str(torch.equal(drafting(count), plain)) if count and not sample else "",
        }
        print(found, flush=True)
        yield found


def accepted(base, drafting, count: int, tokens: int) -> float:
    """The share of drafted tokens that were kept: every forward of the base gives one token and those it accepts."""
    rounds = []
    handle = base.register_forward_pre_hook(lambda *_: rounds.append(1))
    drafting(count)
    handle.remove()
    return (tokens - len(rounds)) / (len(rounds) * count)


def text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


if __name__ == "__main__":
    main()
