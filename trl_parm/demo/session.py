# SPDX-License-Identifier: Apache-2.0
"""What a visitor has seen so far. Each session of the page has its own list of these."""

from __future__ import annotations

from dataclasses import dataclass

from .questions import Question, Reply


MOST_ENTRIES = 200
"""The oldest make room: a page may stay open for days."""


@dataclass(frozen=True)
class Entry:
    """A question that was answered.

    Attributes:
        prompt (`str`): The prompt.
        weights (`tuple[float, ...]`): Of the objectives.
        beta (`float`): β.
        base, guided (`tuple[float, ...]` or `None`): What the answers measure; `None` for an empty one.
    """

    prompt: str
    weights: tuple[float, ...]
    beta: float
    base: tuple[float, ...] | None
    guided: tuple[float, ...] | None


def add(entries: list[Entry], question: Question, reply: Reply) -> list[Entry]:
    """The entries with one more, as a new list."""
    entry = Entry(question.prompt, question.weights, question.beta, reply.base.measured, reply.guided.measured)
    return [*entries, entry][-MOST_ENTRIES:]
