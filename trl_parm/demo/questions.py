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

    Attributes:
        prompt (`str`): The prompt.
        weights (`tuple[float, ...]`): Of the objectives, in the adapter's order; they are brought to the sum 1.
        beta (`float`): β > 0; the strength of guidance is 1/β.
        max_new_tokens (`int`): Most tokens of an answer.
        temperature (`float`): Of sampling among the 50 likeliest tokens; 0 is greedy.
        seed (`int`): Of the noise, which both answers share.
    """

    prompt: str
    weights: tuple[float, ...]
    beta: float = 1.0
    max_new_tokens: int = 60
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer, as far as it is written.

    Attributes:
        text (`str`): The text.
        tokens (`int`): Tokens, an end token included.
        seconds (`float`): What they took, reading the prompt included, waiting for the other answer's turns not.
        rewards (`TokenRewards` or `None`): What the ARM thinks of its tokens, when it is done and not empty.
        measured (`tuple[float, ...]` or `None`): Its measure in each objective, likewise.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    rewards: TokenRewards | None = None
    measured: tuple[float, ...] | None = None

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Reply:
    """Both answers so far.

    Attributes:
        base, guided (`Answer`): The answers.
        ahead (`int`): How many questions are answered before this one begins.
        done (`bool`): Whether this is all.
    """

    base: Answer = Answer()
    guided: Answer = Answer()
    ahead: int = 0
    done: bool = False


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
