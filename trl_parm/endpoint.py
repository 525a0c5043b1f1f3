# SPDX-License-Identifier: Apache-2.0
"""Questions to a language model behind an OpenAI-compatible HTTP endpoint: several at once, and again after errors.

An answer is kept by a hash of its question, so that whoever asks the same again gets it from the disk. What fails,
or can't be read, fails alone: it becomes a [`Failure`] with the reason, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


AGAIN = (408, 409, 429, 500, 502, 503, 504, 529)
"""States of HTTP after which a question is asked again."""
LONGEST = 60.0
"""Most seconds between two attempts."""
MOST = 2**22
"""Most bytes of an answer that are read."""
PROBE = "Answer with the digit 1."
REQUEST = {"temperature": 0, "max_tokens": 512}


@dataclass(frozen=True)
class Failure:
    """In the place of an answer that there is not."""

    reason: str


@dataclass
class Endpoint:
    """A model that answers questions, each a message of a user.

    Args:
        base_url (`str`): Such as `https://api.openai.com/v1` or `http://localhost:8000/v1`.
        model (`str`): Its name there.
        system (`str`, *optional*): A system message before each question.
        request (`dict`, *optional*): Further keys of a request; `{temperature: 0, max_tokens: 512}` if not given.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): The environment variable with the key, which
            is sent if it is set. The key itself stands in no file.
        concurrency (`int`, *optional*, defaults to 8): Questions on their way at once.
        retries (`int`, *optional*, defaults to 5): How often a question is asked again where the endpoint is too busy,
            out of order or out of reach.
        timeout (`float`, *optional*, defaults to 120.0): Seconds for an answer.
        cache (`str`, *optional*): The folder with answers; `trl_parm/judgments` in the cache of Hugging Face if not
            given. An empty text keeps none.

    Attributes:
        counted (`Counter`): `requests`, `cached`, `failed`, `prompt_tokens` and `completion_tokens` so far.
        unread (`list[str]`): Why answers could not be read, so far.

    Raises:
        ValueError: a URL that is none, or a number that is too small.
    """

    base_url: str
    model: str
    system: str | None = None
    request: dict[str, Any] = field(default_factory=lambda: dict(REQUEST))
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    cache: str | None = None
    counted: Counter[str] = field(default_factory=Counter, repr=False, compare=False)
    unread: list[str] = field(default_factory=list, repr=False, compare=False)
    pause: float = field(default=0.5, repr=False, compare=False)
    """Seconds before a question is asked again the first time; then twice as many, and so on."""

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"`base_url` is {self.base_url!r}, but it must be like http://localhost:8000/v1.")
        if url.username or url.password:
            raise ValueError("`base_url` has a user or password in it. Name the variable with a key as `api_key_env`.")
        for name, least in (("concurrency", 1), ("retries", 0), ("timeout", 0.001)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be {least} or larger.")

    def check(self) -> None:
        """Asks something small, once. Raises `ValueError` if there is no answer."""
        answer = self._post(self._body(PROBE), retries=min(self.retries, 1))
        if isinstance(answer, Failure):
            raise ValueError(f"The model {self.model!r} at {self.base_url} does not answer: {answer.reason}")

    def ask(self, questions: Sequence[str], read: Callable[[str], float | Failure]) -> list[float | Failure]:
        """What is read from the answer to each question; equal ones are asked once."""
        different = list(dict.fromkeys(questions))
        with ThreadPoolExecutor(self.concurrency) as threads:
            found = dict(zip(different, threads.map(partial(self._answer, read=read), different), strict=True))
        for answer, counted in found.values():
            self.counted.update(counted)
            if isinstance(answer, Failure) and not counted.get("failed"):
                self.unread.append(answer.reason)
        return [found[question][0] for question in questions]

    def configuration(self) -> dict[str, Any]:
        """What an answer depends on, as JSON."""
        return {name: getattr(self, name) for name in ("base_url", "model", "system", "request")}

    def cost(self) -> str:
        """What was asked so far, in words."""
        names = ("requests", "cached", "failed", "prompt_tokens", "completion_tokens")
        requests, cached, failed, read, written = (self.counted[name] for name in names)
        unread = f"{len(self.unread)} could not be read (first: {self.unread[0]}), " if self.unread else ""
        return (
            f"{self.model} at {self.base_url}: {requests} requests, {failed} of them failed, {unread}{cached} answers "
            f"from the cache; {read} tokens of questions and {written} of answers"
        )

    def _answer(self, question: str, read: Callable[[str], float | Failure]) -> tuple[float | Failure, dict[str, int]]:
        body = self._body(question)
        place = self._place(body)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if place is not None:
                kept = read(str(json.loads(place.read_text(encoding="utf-8"))["answer"]))
                if not isinstance(kept, Failure):  # else it is asked again
                    return kept, {"cached": 1}
        found = self._post(body, self.retries)
        if isinstance(found, Failure):
            return found, {"requests": 1, "failed": 1}
        answer, usage, cut = found
        value = _cut_off(answer) if cut else read(answer)
        if place is not None and not isinstance(value, Failure):
            _keep(place, {"base_url": self.base_url, "request": body, "answer": answer, "usage": usage})
        return value, {"requests": 1, **usage}

    def _body(self, question: str) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"model": self.model, "messages": [*system, {"role": "user", "content": question}], **self.request}

    def _place(self, body: dict[str, Any]) -> Path | None:
        if self.cache == "":
            return None
        from huggingface_hub.constants import HF_HOME

        folder = Path(HF_HOME, "trl_parm", "judgments") if self.cache is None else Path(self.cache)
        text = json.dumps([self.base_url, body], sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return folder / digest[:2] / f"{digest}.json"

    def _post(self, body: dict[str, Any], retries: int) -> tuple[str, dict[str, int], bool] | Failure:
        """The answer, the tokens that it took, and whether it was cut off."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env, "").strip():  # a mounted secret ends in a line
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        reason = ""
        for attempt in range(retries + 1):
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            wait = self.pause * 2**attempt
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    data = response.read(MOST)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {_told(error)}"
                if error.code not in AGAIN:
                    break
                with contextlib.suppress(TypeError, ValueError):
                    wait = max(wait, float(error.headers["Retry-After"]))
            except (OSError, HTTPException) as error:  # no connection, a timeout, a connection that was cut
                reason = f"no answer ({getattr(error, 'reason', None) or error or type(error).__name__})"
            except ValueError:  # whose text may have the key in it
                return Failure(
                    f"a request that can't be sent: look at `base_url`, and at the key in {self.api_key_env}"
                )
            else:
                return _read(data)
            if attempt < retries:
                time.sleep(min(wait, LONGEST) * random.uniform(0.8, 1.0))
        return Failure(reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another place must not get the key."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read(data: bytes) -> tuple[str, dict[str, int], bool] | Failure:
    """An answer, what is told of its tokens, which many endpoints leave out, and whether it was cut off."""
    try:
        found = json.loads(data)
        choice = found["choices"][0]
        answer = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return Failure("an answer that is no chat completion in JSON")
    if not isinstance(answer, str):
        return Failure(f"an answer without a text (it ended by {choice.get('finish_reason')!r})")
    usage = found.get("usage")
    counts = {n: usage.get(n) if isinstance(usage, dict) else 0 for n in ("prompt_tokens", "completion_tokens")}
    usage = {name: count if isinstance(count, int) else 0 for name, count in counts.items()}
    return answer, usage, choice.get("finish_reason") == "length"


def _cut_off(answer: str) -> Failure:
    end = " ".join(answer.split())[-120:]
    return Failure(f"an answer that was cut off, for which `request` can have more `max_tokens`: {end!r}")


def _told(error: urllib.error.HTTPError) -> str:
    """What an endpoint says of an error, in a line."""
    with contextlib.suppress(OSError, HTTPException):
        return " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
    return ""


def _keep(path: Path, content: dict[str, Any]) -> None:
    """Writes an answer whole or not at all; a disk that can't be written to costs the cache only."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(name, path)
