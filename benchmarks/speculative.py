# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of a guided model, weak to strong, beside plain guidance and the unguided base.

    python benchmarks/speculative.py [--base "Llama 7B" --backbone-layers 5]

The base is a Llama of 24 layers; the ARM's backbone has its first two layers, and the base's later ones are scaled
down, so that how well drafts fit can be chosen (`--strangeness`): at 0.02 base and backbone agree well, at 1.0 they
have nothing to do with each other, and drafting has to switch itself off. That shows what drafting costs and saves at
a given rate of accepted drafts; the rate of a real pair is another matter. SmolLM2-135M, guided by an adapter on its
own weights, repeats a passage, with drafts that are looked up in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from common import argument_parser, device, interleave, paired_ratio, report
from models import SHAPES, load, prompts, with_arm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_parm import LM, PARM, SpeculativeDecoding, optimize_for_cpu


SHAPES["24 layers of 512"] = (512, 24, 8, 1408, 8192)
PREFERENCE = [0.3, 0.7]
PASSAGE = (
    "The old lighthouse stood at the end of the pier, where the wind never rested. Every evening the keeper climbed "
    "its narrow stairs, lit the lamp and wrote the weather into a heavy book. Ships passed, sounded their horns and "
    "vanished into the dark. When the keeper grew old, his daughter took the book and climbed the stairs in his place."
)


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    report("speculative", all_rows(args), [notes(args)], args.results, args.table)


def all_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    for strangeness in args.strangeness:
        models = pair(strangeness, args)
        for sample in [decoding == "sampling" for decoding in args.decoding]:
            for batch in args.batch_sizes:
                yield from measure(models, batch, sample, args, f"layers × {strangeness:g}")
    if args.real:
        yield from measure_real(args)
        yield from own_layers(args)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--base", default="24 layers of 512", choices=[name for name in SHAPES if SHAPES[name]])
    parser.add_argument("--backbone-layers", type=int, default=2, help="of the ARM's backbone, the base's first")
    parser.add_argument("--decoding", nargs="+", default=["greedy", "sampling"], choices=["greedy", "sampling"])
    parser.add_argument("--strangeness", nargs="+", type=float, default=[0.02, 1.0])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-real", dest="real", action="store_false", help="without SmolLM2-135M")
    return parser.parse_args()


def notes(args: argparse.Namespace) -> str:
    capability = "" if torch.cuda.is_available() else f", the CPU has {torch.backends.cpu.get_cpu_capability()}"
    hidden, layers, _, _, vocabulary = SHAPES[args.base]
    return (
        f"{args.dtype}{capability}; base {layers} layers of {hidden}, backbone of the ARM its first "
        f"{args.backbone_layers}, vocabulary {vocabulary}; {args.tokens} tokens, median [quartiles] of {args.repeats} "
        "paired rounds. Accepted: of the drafted tokens; in brackets how many were drafted for each token of text. "
        "The same text: as plain guidance."
    )


def pair(strangeness: float, args: argparse.Namespace):
    """A base model and a model of its first layers, with an ARM on the latter."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden, layers, heads, intermediate, vocabulary = SHAPES[args.base]
    shape = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
        "initializer_range": 0.06 * (512 / hidden) ** 0.5,
    }  # fmt: skip
    with torch.device(device()):
        base, small = (
            LlamaForCausalLM._from_config(LlamaConfig(num_hidden_layers=n, **shape), dtype=dtype).eval()
            for n in (layers, args.backbone_layers)
        )
    small.load_state_dict({name: value for name, value in base.state_dict().items() if name in small.state_dict()})
    for layer in base.model.layers[args.backbone_layers :]:
        layer.self_attn.o_proj.weight.data *= strangeness
        layer.mlp.down_proj.weight.data *= strangeness
    if not torch.cuda.is_available() and dtype == torch.float32:
        optimize_for_cpu(base, torch.float32)
        optimize_for_cpu(small, torch.float32)
    return base, small, with_arm(small)


def measure(models, batch: int, sample: bool, args: argparse.Namespace, name: str) -> Iterator[dict[str, object]]:
    base, small, arm = models
    ids = prompts(batch, 32, device()) % base.config.vocab_size

    def guided(**more):
        return run(PARM(base, arm, PREFERENCE), ids, args.tokens, sample, **more)

    def assisted():
        config = small.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = 5, "constant"
        config.assistant_confidence_threshold = 0.0
        return guided(assistant_model=small)

    drafts = {
        "drafts of 5": ("auto", 5),
        "drafts as they pay": ("auto", None),
        "the ARM drafts": (LM(arm, PREFERENCE), 5),
    }
    speculative = {label: SpeculativeDecoding(draft, count) for label, (draft, count) in drafts.items()}
    variants: dict[str, Callable] = {"unguided": lambda: run(base, ids, args.tokens, sample), "guided": guided}
    if batch == 1:
        variants["`assistant_model`, 5"] = assisted
    variants |= {label: lambda one=one: guided(custom_generate=one) for label, one in speculative.items()}
    yield from lines(name, batch, sample, variants, speculative, args)


def measure_real(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """SmolLM2, guided by an adapter on its own weights, repeats a passage: drafts come from the prompt."""
    base = load("SmolLM2-135M", getattr(torch, args.dtype), device())
    tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)
    if not torch.cuda.is_available() and args.dtype == "float32":
        optimize_for_cpu(base, torch.float32)
    arm = with_arm(base)
    for layer in arm.modules():
        if hasattr(layer, "adapters"):
            layer.adapters["default"].B.weight.data *= 0.1
    chat = [{"role": "user", "content": f"Repeat this text word by word:\n\n{PASSAGE}"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"].to(device())
    speculative = {"prompt lookup, as it pays": SpeculativeDecoding("prompt")}
    model = arm.get_base_model()
    guided = PARM(model, arm, PREFERENCE)

    def unguided():
        with arm.disable_adapter():
            return run(model, ids, args.tokens, False)

    variants = {
        "unguided": unguided,
        "guided": lambda: run(guided, ids, args.tokens, False),
        **{
            label: lambda one=one: run(guided, ids, args.tokens, False, custom_generate=one)
            for label, one in speculative.items()
        },
    }
    yield from lines("SmolLM2-135M repeats a text", 1, False, variants, speculative, args)


def own_layers(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """How often SmolLM2's first layers, with its norm and head, would draft what all of its layers say."""
    base = load("SmolLM2-135M", getattr(torch, args.dtype), device())
    tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)
    chat = [{"role": "user", "content": "Tell me about the history of bread in Europe."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"].to(device())
    with torch.no_grad():
        text = run(base, ids, args.tokens, False)
        hidden = base(text, output_hidden_states=True).hidden_states
        whole = base.lm_head(hidden[-1]).log_softmax(-1)[0, ids.shape[1] - 1 : -1].exp()
        for count in (10, 15, 20, 25):
            part = base.lm_head(base.model.norm(hidden[count])).log_softmax(-1)[0, ids.shape[1] - 1 : -1].exp()
            agree = {
                "greedy": (part.argmax(-1) == whole.argmax(-1)).float().mean(),
                "sampling": torch.minimum(part, whole).sum(-1).mean(),
            }
            for decoding, share in agree.items():
                found: dict[str, object] = {
                    "base": "SmolLM2-135M", "batch": 1, "decoding": decoding,
                    "": f"{count} of its {len(hidden) - 1} layers would draft", "accepted": f"{share:.2f}",
                }  # fmt: skip
                print(found, flush=True)
                yield found


def run(model, ids: torch.Tensor, tokens: int, sample: bool, **more) -> torch.Tensor:
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0, "do_sample": sample}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **settings, **({"top_k": 0} if sample else {}), **more
    )


def lines(name, batch, sample, variants, speculative, args) -> Iterator[dict[str, object]]:
    times = interleave(variants, args.repeats, warmup=1)
    plain = None if sample else variants["guided"]()
    for label in variants:
        found: dict[str, object] = {
            "base": name,
            "batch": batch,
            "decoding": "sampling" if sample else "greedy",
            "": label,
            "speed / unguided": text(paired_ratio(times, "unguided", label)),
            "speed / guided": text(paired_ratio(times, "guided", label)),
        }
        if one := speculative.get(label):
            same = plain is not None and torch.equal(variants[label](), plain)
            drafted = one.drafted / (args.tokens * batch)
            found["accepted"] = f"{one.accepted / max(one.drafted, 1):.2f} [{drafted:.2f}]"
            found["same text"] = "" if plain is None else str(same)
        print(found, flush=True)
        yield found


def text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"


if __name__ == "__main__":
    main()
