# SPDX-License-Identifier: Apache-2.0
"""Small preference data sets in every format, and slow twins of what training computes on them."""

import copy

import torch
from datasets import Dataset

from trl_parm.training.tokenization import PairReader


OBJECTIVES = ["helpful", "harmless"]
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def pairs(n: int, offset: int = 0, conversational: bool = False) -> Dataset:
    """`n` pairs whose chosen response ends in `w1` and whose rejected one in `w2`, of different lengths."""
    rows = []
    for i in range(n):
        prompt, stem = f"w{(i + offset) % 50}", " w5" * (i % 3)
        row = {"prompt": prompt, "chosen": f" w{i % 7}{stem} w1", "rejected": f" w{i % 5} w2"}
        if conversational:
            row = {key: [{"role": ROLES[key], "content": text.strip()}] for key, text in row.items()}
        rows.append(row)
    return Dataset.from_list(rows)


def labelled(n: int, offset: int = 0, helpful=lambda i: i % 2, harmless=lambda i: (i + 1) % 2) -> Dataset:
    """The pairs of `pairs` with a label for each objective instead of a ranking."""
    data = pairs(n, offset).rename_columns({"chosen": "response_0", "rejected": "response_1"})
    data = data.add_column("helpful", [helpful(i) for i in range(n)])
    return data.add_column("harmless", [harmless(i) for i in range(n)])


def split_by_objective(data: Dataset) -> dict[str, Dataset]:
    """Labelled data as one ranked data set for each objective."""
    found = {}
    for objective in OBJECTIVES:
        rows = [
            {"prompt": row["prompt"], "chosen": row[f"response_{row[objective]}"],
             "rejected": row[f"response_{1 - row[objective]}"]}
            for row in data
            if row[objective] in (0, 1)
        ]  # fmt: skip
        found[objective] = Dataset.from_list(rows)
    return found


def prepared(data: Dataset, name: str, tokenizer, label_columns=None, **options) -> Dataset:
    """The data set as the trainer prepares it."""
    columns = label_columns or {objective: objective for objective in OBJECTIVES}
    return PairReader(name, data.column_names, OBJECTIVES, columns, tokenizer, **options).read(data)


def naive_log_probs(model, prompt: list[int], response: list[int]) -> float:
    """Sums the log-probability of each response token, one forward for each token, in float64."""
    model, total = copy.deepcopy(model).double(), 0.0
    for i, token in enumerate(response):
        if prompt + response[:i]:
            ids = torch.tensor([prompt + response[:i]])
            total += torch.log_softmax(model(input_ids=ids).logits[0, -1], -1)[token].item()
    return total


def naive_margins(model, rows) -> list[float]:
    """log π(y1|x) − log π(y2|x) of prepared pairs."""
    return [
        naive_log_probs(model, row["prompt_ids"], row["first_ids"])
        - naive_log_probs(model, row["prompt_ids"], row["second_ids"])
        for row in rows
    ]
