# SPDX-License-Identifier: Apache-2.0
"""What a visitor asks, what comes back, and what is kept of it: plain data. Each session of the page has its own."""

from __future__ import annotations

from dataclasses import dataclass

from trl_parm.decoding import TokenRewards


MOST_ENTRIES = 200
"""The oldest make room: a page may stay open for days."""


@dataclass(frozen=True)
class Question:
    """What a visitor asks.

    The weights are in the adapter's order and are brought to the sum 1; guidance has strength 1/β; temperature 0 is
    greedy, any other samples among the likeliest tokens; both answers share the noise of the seed.
    """

    prompt: str
    weights: tuple[float, ...]
    beta: float = 1.0
    max_new_tokens: int = 60
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer, as far as it is written."""

    text: str = ""
    tokens: int = 0
    """An end token included."""
    seconds: float = 0.0
    """What they took, reading the prompt included, waiting for the other answer's turns not."""
    rewards: TokenRewards | None = None
    """What the ARM thinks of its tokens, when it is done and not empty."""
    measured: tuple[float, ...] | None = None
    """Its measure in each objective, likewise."""

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Reply:
    """Both answers so far, how many questions are answered before this one begins, and whether this is all."""

    base: Answer = Answer()
    guided: Answer = Answer()
    ahead: int = 0
    done: bool = False


@dataclass(frozen=True)
class Entry:
    """A question that was answered, and what its answers measure: nothing for an empty one."""

    prompt: str
    weights: tuple[float, ...]
    beta: float
    base: tuple[float, ...] | None
    guided: tuple[float, ...] | None


def add(entries: list[Entry], question: Question, reply: Reply) -> list[Entry]:
    """The entries with one more, as a new list."""
    entry = Entry(question.prompt, question.weights, question.beta, reply.base.measured, reply.guided.measured)
    return [*entries, entry][-MOST_ENTRIES:]
