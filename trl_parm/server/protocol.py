# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, checked field by field: what would change the text and is not known here is refused."""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_parm.noise import Sampling
from trl_parm.shapes import read_text
from trl_parm.texts import PromptText

from .errors import RequestError, wrong
from .served import Catalogue, Served, checked_weights


CHAT_ONLY = ("messages", "max_completion_tokens", "top_logprobs")
KNOWN = {
    "model", "prompt", "preference", "beta", "max_tokens", "n", "stop", "seed", "temperature", "top_p", "top_k",
    "min_p", "logprobs", "stream", "stream_options", *CHAT_ONLY,
}  # fmt: skip
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
"""Fields that change no text: they are taken and not looked at."""
NEUTRAL: dict[str, Any] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "response_format": ({"type": "text"},), "modalities": (["text"],), "tools": ([],),
    "tool_choice": ("none", "auto"), "functions": ([],), "parallel_tool_calls": (True, False),
}  # fmt: skip
"""Fields of OpenAI's that can't be had here, each with the values that ask for nothing."""
OF_MESSAGES = {"role", "content"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and those by which templates know them."""
MOST_STOPS, MOST_STOP_LENGTH, MOST_LOGPROBS = 16, 256, 20
LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Request:
    """What a request asks for.

    Attributes:
        served ([`Served`]): The model.
        chat (`bool`): Whether it is a chat: the answer has messages.
        prompts (`list`): Texts, messages or token ids, one or several.
        weights (`dict[str, float]`): α by objective; empty for a model without preferences.
        beta (`float` or `None`): β; `None` for a model without.
        n (`int`): Texts after each prompt.
        max_tokens (`int` or `None`): Most tokens of each, if it says so.
        sampling ([`Sampling`] or `None`): Greedy without.
        seed (`int`): Of the noise; drawn if none was given.
        stop (`tuple[str, ...]`): Where texts end.
        logprobs (`int` or `None`): How many of the likeliest tokens to tell.
        stream (`bool`), include_usage (`bool`): Whether the answer comes in pieces, and ends with its usage.
    """

    served: Served
    chat: bool
    prompts: list[PromptText | list[int]]
    weights: dict[str, float]
    beta: float | None
    n: int
    max_tokens: int | None
    sampling: Sampling | None
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body. Raises [`RequestError`] for what is no JSON object, or has NaN or a field twice in it."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(found)) < len(found):
            raise ValueError("a field stands there twice")
        return names

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(body, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()  # half characters could not be told back
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is no JSON that can be read: {error or 'it is nested too deeply'}.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object with the fields of a request.")
    return value


def read_request(body: Mapping[str, Any], chat: bool, catalogue: Catalogue, most_texts: int) -> Request:
    """What a request asks for.

    Args:
        body (`Mapping`): The fields.
        chat (`bool`): Whether it came to `/v1/chat/completions`.
        catalogue ([`Catalogue`]): The models that are served.
        most_texts (`int`): Most texts of one request.

    Raises:
        RequestError: a field that is unknown, wrong or refused, or an unknown model.
    """
    _check_fields(body, chat)
    served = catalogue.named(body.get("model"))
    prompts: list[Any] = [_messages(body.get("messages"))] if chat else _prompts(body.get("prompt"))
    n = _whole(body, "n", 1, 1, most_texts)
    if n * len(prompts) > most_texts:
        raise wrong(
            "n" if n > 1 else "prompt",
            f"{n} texts for each of {len(prompts)} prompts are more than {most_texts}, which one request may have.",
        )
    stream = _flag(body, "stream")
    seed = _whole(body, "seed", None, -(2**63), 2**63 - 1)
    return Request(
        served, chat, prompts, *wanted_guidance(body, served), n, _max_tokens(body),
        _sampling(body), secrets.randbits(53) if seed is None else seed, _stop(body.get("stop")),
        _logprobs(body, chat), stream, _include_usage(body, stream),
    )  # fmt: skip


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    known = KNOWN - ({"prompt"} if chat else set(CHAT_ONLY))
    for name, value in body.items():
        if name in known or name in HARMLESS or value is None:
            continue
        if name in NEUTRAL:
            if not any(type(value) is type(one) and value == one or value == one == 0 for one in NEUTRAL[name]):
                raise wrong(name, f"`{name}` can't be had here. Leave it out.", "unsupported_parameter")
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise wrong(name, f"`{name[:80]}` is not known here, and might change the text, so that it is refused.{hint}",
                    "unknown_parameter")  # fmt: skip


def _messages(given: Any) -> PromptText:
    if not isinstance(given, list) or not given:
        raise wrong("messages", "`messages` must be a list of messages with `role` and `content`.")
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise wrong(where, f"`{where}` must be an object with a `role` and a `content`.")
        if message["role"] not in ROLES:
            raise wrong(
                f"{where}.role", f"The role of `{where}` is {_shown(message['role'])}, none of {', '.join(ROLES)}."
            )
        for name, value in message.items():
            if name not in OF_MESSAGES and value is not None:
                raise wrong(f"{where}.{name}", f"`{name}` of a message can't be read here. Leave it out.")
        if not isinstance(message.get("content"), str | list):
            raise wrong(f"{where}.content", f"The content of `{where}` must be a text, or a list of text parts.")
    try:
        return read_text([{"role": ROLES[m["role"]], "content": m["content"]} for m in given], "`messages`")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise wrong("messages", str(error)) from None


def _prompts(given: Any) -> list[Any]:
    """One prompt or several, as texts or ids."""
    several = isinstance(given, list) and given and isinstance(given[0], str | list)
    prompts = given if several else [given]
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt)
        if not ids and not (isinstance(prompt, str) and prompt):
            raise wrong(
                "prompt", "`prompt` must be a text, a list of token ids, or a list of those, none of them empty."
            )
    return prompts


def wanted_guidance(body: Mapping[str, Any], served: Served) -> tuple[dict[str, float], float | None]:
    """α by objective and β of a request to a model, or the model's own. Raises [`RequestError`]."""
    return _preference(body, served), _beta(body, served)


def _preference(body: Mapping[str, Any], served: Served) -> dict[str, float]:
    given, objectives = body.get("preference"), list(served.objectives)
    if given is None:
        return dict(served.preference or {})
    if not objectives:
        raise wrong(
            "preference", f"The model {served.name!r} has no preference. Leave `preference` out, or name another."
        )
    values = list(given.values()) if isinstance(given, Mapping) else given
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise wrong(
            "preference",
            f"`preference` must be an object with a number for each of {', '.join(objectives)}, or a list of them.",
        )
    try:
        return checked_weights(given, objectives)
    except (ValueError, TypeError) as error:
        raise wrong("preference", str(error)) from None


def _beta(body: Mapping[str, Any], served: Served) -> float | None:
    given = body.get("beta")
    if given is None:
        return served.beta
    if served.beta is None:
        raise wrong("beta", f"The model {served.name!r} has no β. Leave `beta` out, or name another model.")
    # Its inverse is the strength of guidance, which must be finite in float32 too.
    if not _is_number(given) or not 1e-6 <= given <= 1e6:
        raise wrong(
            "beta",
            f"`beta` is {_shown(given)}, but it must be a number from 1e-06 to 1e+06. Guidance has strength 1/beta.",
        )
    return float(given)


def _sampling(body: Mapping[str, Any]) -> Sampling | None:
    temperature = _number(body, "temperature", 1.0, 0, 2)
    top_p, min_p = _number(body, "top_p", 1.0, 0, 1), _number(body, "min_p", 0.0, 0, 1)
    top_k = _whole(body, "top_k", 0, -1, 2**31)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise wrong(
            "temperature", f"`temperature` is {temperature}, but it must be 0 or from {LEAST_TEMPERATURE} to 2."
        )
    if temperature == 0:
        return None
    # A share of 0 keeps the likeliest token alone.
    return Sampling(temperature, max(top_k, 0), top_p, min_p) if top_p > 0 else Sampling(temperature, 1)


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    found = {name: _whole(body, name, None, 1, 2**31) for name in ("max_tokens", "max_completion_tokens")}
    given = {value for value in found.values() if value is not None}
    if len(given) > 1:
        raise wrong("max_tokens", "`max_tokens` and `max_completion_tokens` differ. Give one of them.")
    return given.pop() if given else None


def _stop(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(
        isinstance(stop, str) and 0 < len(stop) <= MOST_STOP_LENGTH for stop in stops
    ):  # fmt: skip
        raise wrong(
            "stop", f"`stop` must be a text, or a list of at most {MOST_STOPS}, of 1 to {MOST_STOP_LENGTH} characters."
        )
    return tuple(stops)


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return _whole(body, "logprobs", None, 0, MOST_LOGPROBS)
    wanted, top = _flag(body, "logprobs"), _whole(body, "top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise wrong("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
    return (top or 0) if wanted else None


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, Mapping) or set(options) - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", "`stream_options` is for streams, and may have `include_usage`.")
    return _flag(options, "include_usage")


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, f"`{name}` is {_shown(value)}, but it must be true or false.")
    return bool(value)


def _whole(body: Mapping[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"`{name}` is {_shown(value)}, but it must be a whole number from {least} to {most}.")
    return value


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if not _is_number(value) or not least <= value <= most:
        raise wrong(name, f"`{name}` is {_shown(value)}, but it must be a number from {least} to {most}.")
    return float(value)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and math.isfinite(value)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
