# SPDX-License-Identifier: Apache-2.0
"""Rewards that need no model and no network: functions from texts to one number each, higher is better."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

from .endpoint import Failure
from .texts import PromptText, as_text


Reward = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
"""A reward maps prompts and responses to one float for each response. It gets prompts as texts, or as they are given,
texts or messages, if it has an attribute `reads_messages` that is true."""

UNJUDGED = "unjudged"
"""The column that says why a row has no number of a judge."""
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
"""Where a sentence ends: its last mark, before white space or the end of the text."""


def positivity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment in [−1, 1] (Hutto and Gilbert, ICWSM 2014). Needs the extra `eval`."""
    analyzer = _vader()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the number of words."""
    return [-float(len(response.split())) for response in responses]


def conciseness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the mean number of words in a sentence."""
    return [-len(r.split()) / max(1, len(SENTENCE_END.findall(r))) for r in responses]


def readable(reward: Reward, prompts: Sequence[PromptText]) -> list[Any]:
    """Prompts as a reward reads them, see [`Reward`]."""
    return list(prompts) if getattr(reward, "reads_messages", False) else [as_text(prompt) for prompt in prompts]


def score(
    name: str,
    reward: Reward,
    prompts: Sequence[PromptText],
    responses: Sequence[str],
    numbers: Sequence[int] | None = None,
    may_fail: bool = False,
) -> list[Any]:
    """Asks a reward for one number for each response. `name` and the `numbers` of rows are for messages.

    Where it `may_fail`, a [`Failure`] of a judge stays in the place of a number. Prompts and responses are copies,
    which the reward may change.

    Raises:
        ValueError: the reward returned something else, or a number that is not finite. What a reward raises itself
            goes on as it is, with a note that names the reward.
    """
    try:
        found = _entries(reward(copy.deepcopy(readable(reward, prompts)), list(responses)))
    except Exception as error:
        if not getattr(reward, "is_model", False):  # a function, of which only its author knows more
            error.add_note(f"This is from the reward {name!r}.")
        raise
    if not isinstance(found, list):
        raise ValueError(f"The reward {name!r} returned {found!r}. It must return one number for each response.")
    if len(found) != len(responses):
        raise ValueError(
            f"The reward {name!r} returned {len(found)} numbers for {len(responses)} responses. It must return one "
            "for each, in their order."
        )
    values = [value if isinstance(value, Failure) else _number(value) for value in found]
    for i, value in enumerate(values):
        if isinstance(value, Failure):
            if not may_fail:
                raise ValueError(f"The reward {name!r} failed: {value.reason}. Here every response needs a number.")
        elif value is None or not math.isfinite(value):
            row = "" if numbers is None else f" of row {numbers[i]}"
            raise ValueError(
                f"The reward {name!r} returned {found[i]!r} for the response {responses[i][:80]!r}{row}. It must "
                "return one finite number for each response."
            )
    return values


def with_failures(scores: Mapping[str, Sequence[Any]], row: int) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The rewards of a row, `None` where a judge failed, and `unjudged` with the reason of each that did."""
    values = {name: None if isinstance(of_all[row], Failure) else of_all[row] for name, of_all in scores.items()}
    reasons = {name: of_all[row].reason for name, of_all in scores.items() if isinstance(of_all[row], Failure)}
    return values, {UNJUDGED: reasons} if reasons else {}


def is_unjudged(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has no number because a judge failed, as it says."""
    return row.get(name, 0) is None and name in (row.get(UNJUDGED) or {})


def check_installed(reward: Callable) -> None:
    """Raises `ImportError` for a reward of this module, or one made of it, whose package is not installed."""
    if inspect.unwrap(reward) is positivity:
        _vader()


def _entries(found: Any) -> Any:
    """What a reward returned as a list, also of a tensor, an array or a generator; anything else as it is."""
    found = found.tolist() if hasattr(found, "tolist") else found
    listed = isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping | Set)
    return list(found) if listed else found


def _number(value: Any) -> float | None:
    """A number, or the one in a tensor, an array or a list; `None` for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return float(value) if isinstance(value, Real) else None


@functools.cache
def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError("`positivity` needs vaderSentiment: pip install 'trl-parm[eval]'") from None
    return SentimentIntensityAnalyzer()
