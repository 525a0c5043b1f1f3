# SPDX-License-Identifier: Apache-2.0
"""Rewards that need no model and no network: functions from texts to one number each, higher is better."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence


Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
"""A reward maps prompts and responses to one float for each response."""

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


@functools.cache
def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError("`positivity` needs vaderSentiment: pip install 'trl-parm[eval]'") from None
    return SentimentIntensityAnalyzer()
