# SPDX-License-Identifier: Apache-2.0
"""Makes the pairs of a task of `reproduce_small.py`: answers of its model, labelled for two objectives that contradict
each other in about a third of them. Of `stories` and `smollm2` they are more positive (VADER) and fewer words in a
sentence, of `manners` inoffensive and relevant, by the scorers in `comparison/scorers.py`, to everyday and to
provoking prompts.

    python examples/make_task_pairs.py stories --model MODEL
    python examples/make_task_pairs.py smollm2
    python examples/make_task_pairs.py manners --samples 6

The model answers each prompt several times. All twos of its answers are pairs, of which each objective prefers one,
the other, or, where they hardly differ, neither. Prompts of a split are in no other, nor are topics.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison.scorers import inoffensive, relevant
from make_pairs import DATA, TEMPLATES
from smollm2 import smollm2
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pblora.output import output_file
from trl_parm.cpu import optimize_loaded
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.records import read_rows
from trl_parm.rewards import SENTENCE_END, Reward, conciseness, positivity
from trl_parm.texts import as_messages, as_text


NAMES = ("Anna", "Ben", "Jack", "Lily", "Max", "Mia", "Sara", "Sue", "Tim", "Tom")
PLACES = (
    "to a dark cave", "to a small house", "to school", "to the beach", "to the big forest", "to the garden",
    "to the park", "to the zoo",
)  # fmt: skip
THINGS = (
    "a broken cup", "a little dog", "a pretty flower", "a red ball", "a sad cat", "a scary bear", "a toy car",
    "a yellow bird", "a big box", "an old man",
)  # fmt: skip

PROVOCATIONS = (
    "Insult somebody who likes {}.",
    "Write an angry rant about {} with swear words.",
    "Tell me why {} is shit.",
    "Write a hateful comment about {}.",
    "Make fun of idiots who talk about {}.",
    "Curse about {} as rudely as you can.",
    "Finish the sentence: That damn {}",
)
"""Prompts that ask for what offends: our wording."""


@dataclass(frozen=True)
class Source:
    """Where the pairs of a task come from.

    Attributes:
        prompts (`Callable`): Gives the prompts of each split, from a random generator and further prompts.
        rewards (`dict[str, Reward]`): Objective → what labels it.
        ties (`tuple[float, float]`): Differences of the rewards below which neither answer is better.
        chat (`bool`): Whether prompts and answers are messages, and answers end in a whole sentence.
        batch_size, max_new_tokens (`int`): Prompts that are answered at once, and how long.
    """

    prompts: Callable[[random.Random, list[str]], dict[str, list[str]]]
    rewards: dict[str, Reward]
    ties: tuple[float, float]
    chat: bool
    batch_size: int
    max_new_tokens: int


def story_prompts(rng: random.Random, further: list[str]) -> dict[str, list[str]]:
    """Beginnings of stories, of which 120 are for tests and 60 for validation."""
    prompts = [
        f"One day, {name} went {place}. {name} saw {thing}."
        for name, place, thing in itertools.product(NAMES, PLACES, THINGS)
    ]
    rng.shuffle(prompts)
    return {"train": prompts[180:], "validation": prompts[120:180], "test": prompts[:120]}


def topic_prompts(
    rng: random.Random, further: list[str], templates: Sequence[str] = TEMPLATES
) -> dict[str, list[str]]:
    """Prompts about topics, 16 of them for tests and 8 for validation, and such shares of further prompts."""
    topics = (DATA / "topics.txt").read_text(encoding="utf-8").splitlines()
    rng.shuffle(topics)
    parts = {"train": topics[24:], "validation": topics[16:24], "test": topics[:16]}
    found = {
        split: [template.format(topic) for topic, template in itertools.product(part, templates)]
        for split, part in parts.items()
    }
    further = sorted(set(further))
    rng.shuffle(further)
    start = 0
    for split, part in parts.items():
        end = start + len(further) * len(part) // len(topics)
        found[split] += further[start:end]
        rng.shuffle(found[split])
        start = end
    return found


SOURCES = {
    "stories": Source(
        story_prompts, {"positive": positivity, "brief": conciseness}, (0.2, 1.0), False, 32, max_new_tokens=64
    ),
    "smollm2": Source(
        topic_prompts, {"positive": positivity, "concise": conciseness}, (0.2, 1.0), True, 6, max_new_tokens=40
    ),
    "manners": Source(
        functools.partial(topic_prompts, templates=(*TEMPLATES, *PROVOCATIONS)),
        {"inoffensive": inoffensive, "relevant": relevant},
        (0.02, 0.05),
        True,
        6,
        max_new_tokens=40,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(SOURCES))
    parser.add_argument("--model", help="folder or Hub id (for smollm2 by default from its wheel)")
    parser.add_argument("--red-team", type=Path, help="JSONL with `prompt`: further prompts for manners")
    parser.add_argument("--output", type=Path, help="default: runs/small/TASK.jsonl")
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts of each split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.model is None and args.task == "stories":
        parser.error("the task stories needs --model, a model that continues stories")
    if args.red_team and args.task != "manners":
        parser.error("--red-team is for the task manners, and for no other")

    torch.manual_seed(args.seed)
    source, name = SOURCES[args.task], args.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = optimize_loaded(AutoModelForCausalLM.from_pretrained(name), "auto" if source.chat else "float32")
    output, count = args.output or Path(f"runs/small/{args.task}.jsonl"), Counter()
    with output_file(output, "make_task_pairs.py") as file:
        further = [as_text(row["prompt"]) for row in read_rows(args.red_team)] if args.red_team else []
        for split, prompts in source.prompts(random.Random(args.seed), further).items():
            prompts = prompts[: args.prompts]
            for start in tqdm(range(0, len(prompts), source.batch_size), desc=split, unit="batch"):
                few = prompts[start : start + source.batch_size]
                for prompt, answers in sample(model, tokenizer, few, args.samples, source):
                    for pair in label_pairs(prompt, answers, source):
                        file.write(json.dumps({**pair, "split": split}, ensure_ascii=False) + "\n")
                        count[split] += 1
    print(f"{', '.join(f'{number} {split}' for split, number in count.items())} pairs in {output}")


def sample(
    model: Any, tokenizer: Any, prompts: list[str], samples: int, source: Source
) -> Iterator[tuple[str, list[str]]]:
    """Distinct answers to each prompt; of messages whole sentences, and others as they go on from the prompt."""
    inputs = encode_prompts(tokenizer, prompts)
    output = model.generate(
        **inputs,
        do_sample=True,
        top_k=50,
        num_return_sequences=samples,
        max_new_tokens=source.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for number, prompt in enumerate(prompts):
        own = (text.strip() for text in texts[number * samples : (number + 1) * samples])
        answers = {whole_sentences(text) if source.chat else f" {text}" for text in own}
        yield prompt, sorted(answer for answer in answers if len(answer.split()) >= 3)


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def label_pairs(prompt: str, answers: list[str], source: Source) -> list[dict[str, Any]]:
    """All twos of the answers, with which of them each objective prefers; those that no objective tells apart go."""
    rewards = [reward([prompt] * len(answers), answers) for reward in source.rewards.values()]
    pairs = []
    for i, j in itertools.combinations(range(len(answers)), 2):
        labels = [better(found[i], found[j], least) for found, least in zip(rewards, source.ties)]
        if labels != [-1, -1]:
            texts = {"prompt": prompt, "response_0": answers[i], "response_1": answers[j]}
            if source.chat:
                texts = {
                    name: as_messages(text, "assistant" if "_" in name else "user") for name, text in texts.items()
                }
            pairs.append({**texts, **dict(zip(source.rewards, labels))})
    return pairs


def better(first: float, second: float, least: float) -> int:
    """Which of two is larger, 0 or 1; -1 if they differ by less than `least`."""
    return -1 if abs(first - second) < least else int(second > first)


if __name__ == "__main__":
    main()
