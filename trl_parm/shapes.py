# SPDX-License-Identifier: Apache-2.0
"""What users have in a row of data, as prompt and responses in one form: texts, or messages that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .texts import PromptText, as_messages, as_text


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what is no text."""
CONTEXT = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template with the messages."""
OWN = {
    "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "tokenize", "padding",
    "truncation", "max_length", "conversation", "chat_template",
}  # fmt: skip
"""What is no variable of a template, but an argument of `apply_chat_template` that another value would break."""
OPENING = ("user", "system", "developer")
"""Roles that begin a conversation, not a response."""
MESSAGES = "Give a text, or a list of messages with `role` and `content`"


REPEATED = {
    "messages": "had their prompt in the responses too, which was taken out of them",
    "text": "have responses that begin with their prompt, and were read as they are: such a prompt is read twice",
}
"""What is said of pairs whose responses repeat the prompt."""


class Pair(NamedTuple):
    """A prompt and two responses: three texts, or three lists of messages.

    Attributes:
        prompt, first, second (`str` or `list[dict]`): The parts.
        repeats (`str`): A key of `REPEATED`, or empty.
    """

    prompt: Any
    first: Any
    second: Any
    repeats: str = ""


def read_text(value: Any, where: str) -> PromptText:
    """A text as it is, or messages as chat templates read them.

    Files fill in `None` where another row has a key. So keys that are `None` are left out of messages, arguments of
    tool calls included. A message that only calls tools has an empty content; arguments that are JSON are parsed.

    Args:
        value (`Any`): What is to be a text or messages.
        where (`str`): Where it stands, for messages of errors.

    Raises:
        ValueError: something else, such as `None`, a number, no messages, or an image in them.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and len(value) and all(isinstance(message, Mapping) for message in value):
        return [_message(message, where) for message in value]
    cure = ", or leave the row out" if value is None else ""
    raise ValueError(f"{where} is {_shown(value)}. {MESSAGES}{cure}.")


def read_response(value: Any, where: str) -> str:
    """The text of a response, or of the one message that it is. Raises `ValueError` as [`read_text`], and for several
    messages or calls of tools, of which there is no text without a template."""
    found = read_text(value, where)
    if isinstance(found, str):
        return found
    if len(found) > 1 or found[0].get("tool_calls"):
        raise ValueError(
            f"{where} is {_shown(value)}, of which there is no plain text. Give a text, or one message without calls "
            "of tools."
        )
    return as_text(found)


def read_pair(row: Mapping[str, Any], names: tuple[str, str], where: str) -> Pair:
    """The prompt and the responses of a row, the columns `prompt` and `names`.

    Where one of the three is messages, texts are a message of the user's or the assistant's. In conversations the
    prompt may stand in the responses, instead of a column of its own or beside it, a text too, as in UltraFeedback.

    Raises:
        ValueError: as [`read_text`]; images; a prompt that is neither given nor what both responses begin with.
    """
    refuse_media(row, where)
    first, second = (read_text(row.get(name), f"`{name}` of {where}") for name in names)
    prompt = row.get("prompt")
    prompt = None if prompt is None else read_text(prompt, f"`prompt` of {where}")
    if all(isinstance(part, str) for part in (first, second)):
        if prompt is None:
            raise ValueError(
                f"There is no `prompt` in {where}, whose responses are plain texts. A prompt can be told from the "
                "responses only in conversations; give a `prompt` column."
            )
        if isinstance(prompt, str):
            repeats = "text" if prompt.strip() and first.startswith(prompt) and second.startswith(prompt) else ""
            return Pair(prompt, first, second, repeats)
    responses = as_messages(first, "assistant"), as_messages(second, "assistant")
    if prompt is None:
        return Pair(*_split(*responses, where))
    return _without_prompt(prompt, *responses, where)


def refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Raises `ValueError` if a row has images or the like, whose texts alone would be read."""
    for column in MEDIA:
        value = row.get(column)
        if value is not None and not (isinstance(value, list | tuple) and not any(v is not None for v in value)):
            raise ValueError(
                f"`{column}` of {where} has what is no text. Only text is read here, as by TRL's trainers where the "
                "model reads no images: leave such rows out, or remove the column to go on with the text alone."
            )


def read_context(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What goes to a row's chat template beside the messages: `tools`, and what `chat_template_kwargs` has. Raises
    `ValueError` if they are no list and no mapping, or name what is set for each part of a pair."""
    found = {name: _without_nulls(_parsed(row.get(name))) for name in CONTEXT}
    for name, kind in zip(CONTEXT, (list, dict)):
        if found[name] and not isinstance(found[name], kind):
            form = "list of tools" if kind is list else "mapping of a template's variables"
            raise ValueError(f"`{name}` of {where} is {_shown(row[name])}, but it must be a {form}.")
    kwargs = dict(found["chat_template_kwargs"] or {})
    if own := sorted(OWN.intersection(kwargs)):
        raise ValueError(f"`chat_template_kwargs` of {where} has {', '.join(own)}, which is set here. Leave it out.")
    return {**kwargs, "tools": found["tools"]} if found["tools"] else kwargs


def _split(first: list[Any], second: list[Any], where: str) -> tuple[list, list, list]:
    """A conversation's prompt, which is the messages that both begin with, and the responses after it."""
    longest = min(len(first), len(second)) - 1
    start = next((i for i in range(longest) if first[i] != second[i]), longest)
    if start < 1:
        raise ValueError(
            f"Two conversations in {where} don't begin with the same prompt and end in a response each: {first} and "
            f"{second}. Give a `prompt` column."
        )
    return first[:start], first[start:], second[start:]


def _without_prompt(given: PromptText, first: list[Any], second: list[Any], where: str) -> Pair:
    """A prompt and the responses, without a prompt that these repeat."""
    prompt = as_messages(given, "user")
    whole = [response for response in (first, second) if response[0]["role"] in OPENING]
    if isinstance(given, str) and len(whole) == 2:
        return Pair(*_split(first, second, where), "messages")
    # A system's message may stand before the prompt in the responses alone.
    end = len(prompt) + (first[0]["role"] == "system" != prompt[0]["role"])
    if first[:end] == second[:end] and first[end - len(prompt) : end] == prompt and end < min(len(first), len(second)):
        return Pair(first[:end], first[end:], second[end:], "messages")
    if whole and prompt[-1]["role"] != "assistant":
        raise ValueError(
            f"A response in {where} begins with a message of the role {whole[0][0]['role']!r}, but not both begin "
            f"with the `prompt` {_shown(given)}. Give the responses alone, or the whole conversation in both."
        )
    return Pair(prompt, first, second)


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = _without_nulls(message)
    if not isinstance(found.get("role"), str) or not set(found) - {"role"}:
        raise ValueError(f"{where} has the message {_shown(message)}. {MESSAGES}.")
    content = found.setdefault("content", "")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str) and set(part) == {"type", "text"}):
                raise ValueError(
                    f"{where} has a content part that is no text, {_shown(part)}. Only text is read here: leave such "
                    "rows out, or take these parts out of them."
                )
    elif not isinstance(content, str):
        raise ValueError(f"{where} has a message whose content is {_shown(content)}. {MESSAGES}.")
    calls = _parsed(found.get("tool_calls")) or []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not (isinstance(calls, list) and isinstance(function, dict) and isinstance(function.get("name"), str)):
            raise ValueError(
                f"{where} has a call of a tool that is {_shown(call)}. `tool_calls` is a list of mappings with `name` "
                "and `arguments`, or with those in a `function`."
            )
        function["arguments"] = _without_nulls(_parsed(function.get("arguments"))) or {}
    return {**found, "tool_calls": calls} if calls else found


def _without_nulls(value: Any) -> Any:
    """A copy without the keys that are `None`."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def _parsed(value: Any) -> Any:
    """What a text stands for, if it is JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
