# SPDX-License-Identifier: Apache-2.0
"""Pieces of texts as answers of OpenAI's API, whole or streamed, with the preference and β that were used."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

from .protocol import Request
from .texts import Chosen, Piece


DONE = b"data: [DONE]\n\n"
LEAST = -9999.0
"""In the place of log 0, which JSON does not have."""


def event(value: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class Answer:
    """The answer to one request.

    Args:
        request ([`Request`]): The request.
        prompt_tokens (`int`): Of all of its prompts.
        token_text (`Callable`): A token after another one, as text and as bytes.
    """

    def __init__(self, request: Request, prompt_tokens: int, token_text: Any) -> None:
        self.request, self.prompt_tokens, self._token_text = request, prompt_tokens, token_text
        count = request.n * len(request.prompts)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._tokens: list[list[Chosen]] = [[] for _ in range(count)]
        self._counts, self._finished = [0] * count, cast("list[str | None]", [None] * count)
        self._begun = [False] * count
        kind = "chat.completion" if request.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if request.chat and request.stream else kind,
            "created": int(time.time()),
            "model": request.served.name,
            "preference": request.weights or None,
            "beta": request.beta,
            "seed": None if request.sampling is None else request.seed,
        }

    def add(self, piece: Piece) -> None:
        """Takes what is new of a text."""
        self._texts[piece.index].append(piece.text)
        self._tokens[piece.index] += piece.tokens
        self._counts[piece.index], self._finished[piece.index] = piece.count, piece.finished

    @property
    def is_whole(self) -> bool:
        """Whether all texts have ended."""
        return None not in self._finished

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and written, the last of a text, which may be an end token, included."""
        written = sum(self._counts)
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for i, (texts, tokens, finished) in enumerate(zip(self._texts, self._tokens, self._finished)):
            text = "".join(texts)
            own: dict[str, Any] = {"text": text}
            if self.request.chat:
                own = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": i, **own, "logprobs": self._logprobs(tokens), "finish_reason": finished})
        return {**self._head, "choices": choices, "usage": self.usage}

    def chunk(self, piece: Piece) -> bytes | None:
        """A piece as an event of a stream; `None` if there is nothing to tell."""
        begun, self._begun[piece.index] = self._begun[piece.index], True
        if begun and not (piece.text or piece.tokens or piece.finished):
            return None
        own: dict[str, Any] = {"text": piece.text}
        if self.request.chat:
            delta = {"content": piece.text} if begun else {"role": "assistant", "content": piece.text}
            own = {"delta": delta}
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        choice = {"index": piece.index, **own, "logprobs": logprobs, "finish_reason": piece.finished}
        usage = {"usage": None} if self.request.include_usage else {}
        return event({**self._head, "choices": [choice], **usage})

    def last(self) -> bytes:
        """What ends a stream: its usage, if it was asked for."""
        usage = event({**self._head, "choices": [], "usage": self.usage}) if self.request.include_usage else b""
        return usage + DONE

    def _logprobs(self, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        if self.request.chat:
            content = [
                {**self._entry(c.token, c.log_prob, c.before),
                 "top_logprobs": [self._entry(*one, c.before) for one in c.top]}
                for c in tokens
            ]  # fmt: skip
            return {"content": content, "refusal": None}
        own = [self._entry(c.token, c.log_prob, c.before) for c in tokens]
        tops = [[self._entry(*one, c.before) for one in c.top] for c in tokens]
        return {
            "tokens": [one["token"] for one in own],
            "token_logprobs": [one["logprob"] for one in own],
            "top_logprobs": [{one["token"]: one["logprob"] for one in top} for top in tops],
            "text_offset": [c.place for c in tokens],
        }

    def _entry(self, token: int, log_prob: float, before: int | None) -> dict[str, Any]:
        text, as_bytes = self._token_text(token, before)
        return {"token": text, "logprob": max(log_prob, LEAST), "bytes": as_bytes}
