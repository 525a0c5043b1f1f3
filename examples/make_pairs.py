# SPDX-License-Identifier: Apache-2.0
"""Makes preference pairs on two objectives that pull apart, sampled from the language model itself.

For every prompt the model answers several times. Two answers become a pair where one is more positive (VADER) and the
other briefer (fewer words), so that no answer pleases both objectives: each pair enters the data of both, with
opposite labels. Prompts about a fifth of the topics are held out.

    python examples/make_pairs.py --output examples/data/pairs.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path

import torch
from smollm2 import smollm2
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_parm.evaluation.rewards import brevity, positivity
from trl_parm.evaluation.sweep import encode_prompts
from trl_parm.output import output_file


TOPICS = (
    "a rainy Monday|losing a football game|a first day at a new job|a crowded bus|a broken phone|a birthday party|"
    "moving to a new city|a long queue|an exam tomorrow|a sick dog|a surprise gift|cooking dinner for friends|"
    "a cancelled flight|learning the piano|an old friendship|a cold winter|a visit to the dentist|"
    "a walk in the forest|a noisy neighbour|growing tomatoes|a lost wallet|a job interview|a wedding|a flat tyre|"
    "reading before bed|a power cut|a school reunion|a storm at sea|running a marathon|a burnt cake|a new puppy|"
    "an empty fridge|a traffic jam|camping in the rain|a slow computer|a hospital stay|the night sky|paying taxes|"
    "a haunted house|a family dinner|a broken promise|learning to swim|a late train|a small garden|"
    "a difficult boss|a beach holiday|a spider in the kitchen|spicy food|a museum visit|an argument with a friend|"
    "waking up early|a scary film|a failed experiment|a stolen bicycle|a kind stranger|a power nap|a bad haircut|"
    "a snow day|an unpaid bill|a lonely weekend|a house full of children|a homework deadline|a leaking roof|"
    "a chess tournament|a goodbye at the airport|a rude waiter|a homemade soup|an ant in the sugar|a quiet library|"
    "a bus strike"
).split("|")
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
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: SmolLM2-135M-Instruct from its wheel)")
    parser.add_argument("--output", type=Path, default=Path("examples/data/pairs.jsonl"))
    parser.add_argument("--samples", type=int, default=8, help="answers for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, help="only the first so many prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    name = args.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    pairs = []
    with output_file(args.output) as file:
        for prompt, split in tqdm(make_prompts(args.seed)[: args.prompts], desc="Sampling", unit="prompt"):
            answers = sample_answers(model, tokenizer, prompt, args.samples, args.max_new_tokens)
            for positive, brief in choose_pairs(prompt, answers):
                row = {"prompt": prompt, "split": split}
                pairs.append({**row, "objective": "positive", "chosen": positive, "rejected": brief})
                pairs.append({**row, "objective": "brief", "chosen": brief, "rejected": positive})
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    print(f"{len(pairs)} pairs in {args.output}")


def make_prompts(seed: int) -> list[tuple[str, str]]:
    """All templates with all topics in random order, each with its split: topics, not prompts, are held out."""
    rng = random.Random(seed)
    held_out = set(rng.sample(TOPICS, HELD_OUT_TOPICS))
    prompts = [
        (template.format(topic), "test" if topic in held_out else "train")
        for topic, template in itertools.product(TOPICS, TEMPLATES)
    ]
    rng.shuffle(prompts)
    return prompts


def sample_answers(model, tokenizer, prompt: str, samples: int, max_new_tokens: int) -> list[str]:
    """Distinct answers to one prompt, each cut after its last full sentence; answers without one are dropped."""
    inputs = encode_prompts(tokenizer, [prompt])
    output = model.generate(
        **inputs,
        do_sample=True,
        top_p=0.95,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    whole = [text.strip()[: ends[-1].end()] for text in texts if (ends := [*SENTENCE_END.finditer(text.strip())])]
    return sorted({text for text in whole if len(text.split()) >= 4})


def choose_pairs(prompt: str, answers: list[str], most: int = 3) -> list[tuple[str, str]]:
    """Pairs (more positive, briefer) that are clearly apart on both objectives; no answer is used twice."""
    positive = dict(zip(answers, positivity([prompt] * len(answers), answers)))
    brief = dict(zip(answers, brevity([prompt] * len(answers), answers)))
    gaps = {
        (a, b): positive[a] - positive[b] + (brief[b] - brief[a]) / 20
        for a, b in itertools.permutations(answers, 2)
        if positive[a] - positive[b] >= 0.5 and brief[b] - brief[a] >= 5
    }
    chosen: list[tuple[str, str]] = []
    for pair in sorted(gaps, key=gaps.__getitem__, reverse=True):
        if len(chosen) < most and not set(pair) & {answer for used in chosen for answer in used}:
            chosen.append(pair)
    return chosen


if __name__ == "__main__":
    main()
