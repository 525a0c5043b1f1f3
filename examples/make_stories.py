# SPDX-License-Identifier: Apache-2.0
"""Makes the pairs of the task `stories` from a small model of stories, labelled for two objectives that do not depend
on each other: more positive (VADER), or fewer words in a sentence.

    python examples/make_stories.py --model MODEL --output runs/small/stories.jsonl

The model goes on from the beginning of a story several times. All twos of its answers to one prompt are pairs, of
which each objective prefers one, the other, or neither. The prompts of a split are in no other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pblora.output import output_file
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.rewards import conciseness, positivity


NAMES = ("Anna", "Ben", "Jack", "Lily", "Max", "Mia", "Sara", "Sue", "Tim", "Tom")
PLACES = (
    "to a dark cave", "to a small house", "to school", "to the beach", "to the big forest", "to the garden",
    "to the park", "to the zoo",
)  # fmt: skip
THINGS = (
    "a broken cup", "a little dog", "a pretty flower", "a red ball", "a sad cat", "a scary bear", "a toy car",
    "a yellow bird", "a big box", "an old man",
)  # fmt: skip
HELD_OUT = {"test": 120, "validation": 60}
LEAST = {"positive": 0.2, "brief": 1.0}
"""Rewards that differ by less are a tie."""
BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a model that continues stories")
    parser.add_argument("--output", type=Path, default=Path("runs/small/stories.jsonl"))
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, help="only the first so many prompts of each split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    count = 0
    with output_file(args.output, "make_stories.py") as file:
        for split, prompts in make_prompts(args.seed).items():
            prompts = prompts[: args.prompts]
            for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc=split, unit="batch"):
                for prompt, answers in sample(model, tokenizer, prompts[start : start + BATCH_SIZE], args):
                    for pair in label_pairs(prompt, answers):
                        file.write(json.dumps({**pair, "split": split}, ensure_ascii=False) + "\n")
                        count += 1
    print(f"{count} pairs in {args.output}")


def make_prompts(seed: int) -> dict[str, list[str]]:
    """Beginnings of stories by split, in random order."""
    prompts = [
        f"One day, {name} went {place}. {name} saw {thing}."
        for name, place, thing in itertools.product(NAMES, PLACES, THINGS)
    ]
    random.Random(seed).shuffle(prompts)
    found = {}
    for split, size in HELD_OUT.items():
        found[split], prompts = prompts[:size], prompts[size:]
    return {"train": prompts, **found}


def sample(model, tokenizer, prompts: list[str], args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Distinct answers to each prompt. They begin with a space, so that they can follow it."""
    inputs = encode_prompts(tokenizer, prompts)
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=50,
        num_return_sequences=args.samples,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for number, prompt in enumerate(prompts):
        answers = {text.strip() for text in texts[number * args.samples : (number + 1) * args.samples]}
        yield prompt, sorted(" " + answer for answer in answers if answer)


def label_pairs(prompt: str, answers: list[str]) -> list[dict]:
    """All twos of the answers, with which of them each objective prefers; those that no objective tells apart go."""
    scores = {
        "positive": positivity([prompt] * len(answers), answers),
        "brief": conciseness([prompt] * len(answers), answers),
    }
    pairs = []
    for i, j in itertools.combinations(range(len(answers)), 2):
        labels = {name: better(found[i], found[j], LEAST[name]) for name, found in scores.items()}
        if set(labels.values()) != {-1}:
            pairs.append({"prompt": prompt, "response_0": answers[i], "response_1": answers[j], **labels})
    return pairs


def better(first: float, second: float, least: float) -> int:
    """Which of two is larger, 0 or 1; -1 if they differ by less than `least`."""
    return -1 if abs(first - second) < least else int(second > first)


if __name__ == "__main__":
    main()
