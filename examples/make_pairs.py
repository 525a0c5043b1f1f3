# SPDX-License-Identifier: Apache-2.0
"""Makes preference pairs on two objectives that pull apart, sampled from the language model itself.

For every prompt the model answers several times, and pairs of answers far apart on one objective are kept: one more
positive (VADER) than the other, or more concise (shorter sentences). An answer that is better for one objective is
worse or equal for the other, so the two pull apart. Prompts about a fifth of the topics are held out.

    python examples/make_pairs.py --output runs/pairs.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from smollm2 import smollm2
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pblora.output import output_file
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.rewards import SENTENCE_END, conciseness, positivity


DATA = Path(__file__).parent / "data"
TEMPLATES = (
    "What do you think about {}?",
    "Describe {} in a few words.",
    "Write a text message about {}.",
    "Tell me a very short story about {}.",
    "How should I feel about {}?",
    "Give me one piece of advice about {}.",
    "Why do people talk about {}?",
)
HELD_OUT_TOPICS = 14
BATCH_SIZE = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: SmolLM2-135M-Instruct from its wheel)")
    parser.add_argument("--output", type=Path, default=DATA / "pairs.jsonl", help="replaced only if made by this")
    parser.add_argument("--samples", type=int, default=8, help="answers for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, help="only the first so many prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    name = args.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    pairs = []
    with output_file(args.output, "make_pairs.py") as file:
        prompts = make_prompts(args.seed)[: args.prompts]
        for start in tqdm(range(0, len(prompts), BATCH_SIZE), desc="Sampling", unit="batch"):
            splits = dict(prompts[start : start + BATCH_SIZE])
            for prompt, answers in sample_answers(model, tokenizer, list(splits), args).items():
                pairs += [to_row(prompt, splits[prompt], *pair) for pair in choose_pairs(prompt, answers)]
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    print(f"{len(pairs)} pairs in {args.output}")


def make_prompts(seed: int) -> list[tuple[str, str]]:
    """All templates with all topics in random order, each with its split: topics, not prompts, are held out."""
    rng = random.Random(seed)
    topics = (DATA / "topics.txt").read_text(encoding="utf-8").splitlines()
    held_out = set(rng.sample(topics, HELD_OUT_TOPICS))
    prompts = [
        (template.format(topic), "test" if topic in held_out else "train")
        for topic, template in itertools.product(topics, TEMPLATES)
    ]
    rng.shuffle(prompts)
    return prompts


def sample_answers(model, tokenizer, prompts: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Distinct answers to each prompt, cut after their last full sentence; answers without one are dropped."""
    inputs = encode_prompts(tokenizer, prompts)
    output = model.generate(
        **inputs,
        do_sample=True,
        top_p=0.95,
        num_return_sequences=args.samples,
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers: dict[str, set[str]] = {prompt: set() for prompt in prompts}
    for index, text in enumerate(texts):
        ends = [match.end() for match in SENTENCE_END.finditer(text.strip())]
        whole = text.strip()[: ends[-1]] if ends else ""
        if len(whole.split()) >= 4:
            answers[prompts[index // args.samples]].add(whole)
    return {prompt: sorted(found) for prompt, found in answers.items()}


def to_row(prompt: str, split: str, objective: str, better: str, worse: str) -> dict:
    """A row in TRL's conversational preference format, with its objective and split."""
    return {
        "objective": objective,
        "split": split,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def choose_pairs(prompt: str, answers: list[str]) -> list[tuple[str, str, str]]:
    """The pairs (objective, better answer, worse answer) from the answers to one prompt."""
    positive = dict(zip(answers, positivity([prompt] * len(answers), answers)))
    concise = dict(zip(answers, conciseness([prompt] * len(answers), answers)))
    pairs = {
        "positive": _furthest_apart(positive, against=concise, least=0.8, least_against=0.0),
        "concise": _furthest_apart(concise, against=positive, least=4.0, least_against=0.2),
    }
    return [(objective, *pair) for objective, found in pairs.items() for pair in found]


def _furthest_apart(
    score: dict[str, float], against: dict[str, float], least: float, least_against: float, most: int = 3
) -> list[tuple[str, str]]:
    """Pairs (better, worse) by `score` whose better answer is the worse one by `against`; none is used twice."""
    gaps = {
        (a, b): score[a] - score[b]
        for a, b in itertools.permutations(score, 2)
        if score[a] - score[b] >= least and against[b] - against[a] >= least_against
    }
    chosen: list[tuple[str, str]] = []
    for pair in sorted(gaps, key=gaps.__getitem__, reverse=True):
        if len(chosen) < most and not set(pair) & {answer for used in chosen for answer in used}:
            chosen.append(pair)
    return chosen


if __name__ == "__main__":
    main()
