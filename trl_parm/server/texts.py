# SPDX-License-Identifier: Apache-2.0
"""One text that is being written: its tokens, what of it may be sent already, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trl_parm.noise import Sampling, row_seed
from trl_parm.templates import BEFORE


BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""What the characters of byte-level vocabularies stand for."""


@dataclass(frozen=True)
class Chosen:
    """A token with log π of it and of the likeliest ones, by the distribution before temperature.

    Attributes:
        token (`int`), log_prob (`float`): The token.
        top (`list[tuple[int, float]]`): The likeliest tokens.
        before (`int` or `None`): The token that it follows; `None` at the beginning of a text.
        place (`int`): Characters of the text before it.
    """

    token: int
    log_prob: float
    top: list[tuple[int, float]]
    before: int | None = None
    place: int = 0


@dataclass(frozen=True)
class Piece:
    """What is new of a text.

    Attributes:
        index (`int`): Which of the texts of its request.
        text (`str`): Perhaps empty.
        tokens (`list[Chosen]`): The new tokens, if log-probabilities were asked for.
        finished (`str` or `None`): `"stop"`, `"length"`, or `None` if there is more to come.
        count (`int`): How many tokens were written so far.
    """

    index: int
    text: str
    tokens: list[Chosen]
    finished: str | None
    count: int


@dataclass(frozen=True)
class Settings:
    """How a text is written.

    Attributes:
        most (`int`): Most tokens.
        sampling ([`Sampling`] or `None`): Greedy without.
        seed (`int`): Of its noise.
        stop (`tuple[str, ...]`): It ends before any of these.
        ends (`frozenset[int]`): It ends with any of these tokens, which are not of its text.
        logprobs (`int` or `None`): How many of the likeliest tokens to tell.
        goes_on (`bool`, *optional*): Whether it goes on with the text of its prompt, and is no answer to it.
        processors (`Callable`, *optional*): Changes scores `(1, vocab)` by the ids so far, `(1, length)`.
    """

    most: int
    sampling: Sampling | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    goes_on: bool = False
    processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Decoder:
    """Tokens as text, as they come: characters of several tokens wait for the last of them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The base model's.
        before (`Sequence[int]`, *optional*): The end of a text that they go on with: after it a space may come first.
        skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether special tokens have no text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._tokens, self._skips = tokenizer, list(before), skip_special_tokens
        self._start, self._told = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._tokens.append(token)
        before, whole = self._decoded(self._told), self._decoded(len(self._tokens))
        if len(whole) <= len(before) or whole.endswith("�"):
            return ""
        # Spaces between two tokens depend on both, so the last ones that were told are decoded with the next.
        self._start, self._told = self._told, len(self._tokens)
        return whole[len(before) :]

    def rest(self) -> str:
        """What is left at the end."""
        return self._decoded(len(self._tokens))[len(self._decoded(self._told)) :]

    def _decoded(self, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[self._start : stop], skip_special_tokens=self._skips)


@dataclass(eq=False)
class Text:
    """A text that is being written.

    Args:
        owner (`Any`): Whose it is.
        index (`int`): Which one of that owner's.
        prompt (`list[int]`): Ids of its prompt.
        settings ([`Settings`]): How it is written.
        tokenizer (`PreTrainedTokenizerBase`): The base model's.

    Attributes:
        written (`list[int]`): Its tokens so far.
        stint (`int`): How many of them since it was given a row.
        finished (`str` or `None`): Why it has ended.
    """

    owner: Any
    index: int
    prompt: list[int]
    settings: Settings
    tokenizer: Any
    written: list[int] = field(default_factory=list)
    stint: int = 0
    finished: str | None = None

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.tokenizer, self.prompt[-BEFORE:] if self.settings.goes_on else ())
        self._waiting, self._sent = "", 0
        self._untold: list[Chosen] = []

    @property
    def ids(self) -> list[int]:
        """All tokens so far."""
        return self.prompt + self.written

    @property
    def read(self) -> int:
        """How many tokens of it were read when the last one was chosen."""
        return len(self.prompt) + len(self.written) - 1

    def add(self, chosen: Chosen) -> Piece:
        """Writes one token more, and returns what can be sent now: nothing that a stop may still take away, neither
        text nor tokens."""
        last = self.written[-1] if self.written else self.prompt[-1] if self.settings.goes_on else None
        self._untold.append(replace(chosen, before=last, place=self._sent + len(self._waiting)))
        self.written.append(chosen.token)
        self.stint += 1
        ended = chosen.token in self.settings.ends
        if not ended:
            self._waiting += self._decoder.add(chosen.token)
        if ended or len(self.written) >= self.settings.most:
            self._waiting += self._decoder.rest()
            self.finished = "stop" if ended else "length"
        text, self._waiting, stopped = until_stop(self._waiting, self.settings.stop, self.finished is not None)
        self._sent += len(text)
        whole = self.finished is not None and not stopped
        told = [one for one in self._untold if whole or one.place < self._sent]
        self._untold = self._untold[len(told) :]
        if stopped:
            self.finished = "stop"
        return Piece(
            self.index, text, told if self.settings.logprobs is not None else [], self.finished, len(self.written)
        )


def token_text(tokenizer: Any, token: int, before: int | None) -> tuple[str, list[int] | None]:
    """A token as text after another one, and as bytes. Parts of characters have no text, but bytes, where the
    vocabulary tells them."""
    text = tokenizer.decode([token])
    if "�" in text:
        return text, _bytes(tokenizer.convert_ids_to_tokens(token))
    if before is not None:  # which decides about a space between them
        first, both = tokenizer.decode([before]), tokenizer.decode([before, token])
        text = both[len(first) :] if both.startswith(first) else text
    return text, list(text.encode())


def _bytes(piece: str) -> list[int] | None:
    if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return [int(found[1], 16)]
    return [BYTES[character] for character in piece] if set(piece) <= set(BYTES) else None


def until_stop(text: str, stops: Sequence[str], last: bool) -> tuple[str, str, bool]:
    """What of a text is certain, what may still be the beginning of a stop, and whether it has come to one.

    Args:
        text (`str`): What was not sent yet.
        stops (`Sequence[str]`): The text ends before any of these.
        last (`bool`): Whether nothing follows.
    """
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    if found:
        return text[: min(found)], "", True
    if last:
        return text, "", False
    certain = len(text) - begun_stop(text, stops)
    return text[:certain], text[certain:], False


def begun_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


@torch.no_grad()
def choose(log_probs: torch.Tensor, texts: Sequence[Text]) -> list[Chosen]:
    """The next token of each text: each by its own settings, and noise of its own seed.

    Args:
        log_probs (`torch.Tensor` of shape `(rows, vocab)`): log π after each text.
        texts (`Sequence[Text]`): The texts.
    """
    scores = _processed(log_probs, texts)
    tokens = torch.empty(len(texts), dtype=torch.long)
    groups: dict[Sampling | None, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(text.settings.sampling, []).append(row)
    for sampling, rows in groups.items():
        own = scores if len(rows) == len(texts) else scores[rows]
        if sampling is not None:
            seeds, numbers = zip(*((texts[row].settings.seed, len(texts[row].written)) for row in rows))
            own = sampling.noisy(own, seeds, numbers)
        tokens[rows] = own.argmax(-1).cpu()
    return [_told(text, token, scores[row]) for row, (text, token) in enumerate(zip(texts, tokens.tolist()))]


def choice_seed(seed: int, index: int) -> int:
    """The seed of one of the texts of a request."""
    return row_seed(seed, index)


def _processed(log_probs: torch.Tensor, texts: Sequence[Text]) -> torch.Tensor:
    """Scores by what the base model's generation config does to them, normalised."""
    if not any(text.settings.processors for text in texts):
        return log_probs
    rows = []
    for text, row in zip(texts, log_probs.split(1)):
        if text.settings.processors is not None:
            ids = torch.tensor([text.ids], device=row.device)
            row = text.settings.processors(ids, row.clone()).log_softmax(-1)
        rows.append(row)
    return torch.cat(rows)


def _told(text: Text, token: int, scores: torch.Tensor) -> Chosen:
    count = text.settings.logprobs
    if count is None:
        return Chosen(token, 0.0, [])
    values, tokens = scores.topk(min(count, len(scores)))
    return Chosen(token, float(scores[token]), list(zip(tokens.tolist(), values.tolist())))
