# SPDX-License-Identifier: Apache-2.0
"""What answers are like beside their rewards: how far from the base model, how likely under it, how repetitive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_parm.rewards import UNJUDGED

from .fronts import MEASURED, row_cell


GRAM = 4


def repetition(text: str) -> float | None:
    """The share of a text's 4-grams of words that were there before in it; `None` for a text of fewer than 4 words.

    As seq-rep-4 of Welleck et al. (ICLR 2020, arXiv 1908.04319), of words between spaces in the place of tokens.
    """
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def describe_answers(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the answers of each method at each preference are like.

    Args:
        table (`Iterable[Mapping]`): The rows of [`sweep`], or of its JSONL file; those of 0.2.0 and before lack some.

    Returns:
        `list[dict]` with `method`, `preference` (the label), `tokens` (mean length), `at_the_cap` (share that
        `generate` cut off), `repetition` (mean of [`repetition`]), `log_prob_base` (mean log π_base of a token), and
        `kl` (mean of log π_guided − log π_base of a token); `None` where rows don't say.
    """
    cells: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in table:
        row = {"response": "", **row}
        method, weights, _ = row_cell(row)
        cells.setdefault((method, weights), []).append(row)
    return [
        {
            "method": method,
            "preference": rows[0]["label"],
            "tokens": _mean([row["tokens"] for row in rows]),
            "at_the_cap": _mean([row.get("capped") for row in rows]),
            "repetition": _mean([value for row in rows if (value := repetition(row["response"])) is not None]),
            "log_prob_base": _of_a_token(rows, "log_prob_base"),
            "kl": _of_a_token(rows, "log_ratio"),
        }
        for (method, _), rows in cells.items()
    ]


def with_all_columns(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which some, of an earlier version, may lack what is measured of answers now: `None` there. Why a judge
    failed is a text."""
    found = [dict(row) for row in rows]
    if any(UNJUDGED in row for row in found):
        texts = [json.dumps(row[UNJUDGED], ensure_ascii=False) if row.get(UNJUDGED) else None for row in found]
        found = [{**row, UNJUDGED: text} for row, text in zip(found, texts)]
    measured = [name for name in MEASURED if any(name in row for row in found)]
    return [{**row, **{name: row.get(name) for name in measured}} for row in found]


def _mean(values: Sequence[Any]) -> float | None:
    return None if not values or None in values else float(sum(values) / len(values))


def _of_a_token(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """All of a sum over tokens, divided by all tokens."""
    values = [row.get(column) for row in rows]
    if any(value is None for value in values):
        return None
    return float(sum(value for value in values if value is not None)) / max(1, sum(row["tokens"] for row in rows))
