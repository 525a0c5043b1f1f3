# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses as plain text: conversations, and templates with `{prompt}` and `{response}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


PromptText = str | Sequence[Mapping[str, Any]]
"""A prompt or a response: a text, or messages with `role` and `content`, a text too or a list of text parts."""
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


def as_text(messages: PromptText) -> str:
    """Messages as plain text: a single one is its content, more become paragraphs that name their speakers."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return content_text(messages[0]["content"])
    return "\n\n".join(f"{SPEAKERS.get(m['role'], m['role'])}: {content_text(m['content'])}" for m in messages)


def content_text(content: str | Sequence[Mapping[str, str]]) -> str:
    """The content of a message, of which text parts are joined as they are."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def prompt_key(prompt: PromptText) -> str:
    """A prompt as a text that tells it from all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def as_messages(text: PromptText, role: str) -> list[dict[str, Any]]:
    """The messages, or a text as one message of a role."""
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(message) for message in text]


def fill(template: str, **parts: PromptText) -> str:
    """Puts texts in the places that a template names. Braces of other names stay as they are.

    Raises:
        ValueError: a template that lacks a part, or a conversation of several messages, which have no place in it.
    """
    for name, part in parts.items():
        if f"{{{name}}}" not in template:
            raise ValueError(f"The template {template!r} has no {{{name}}}, where the {name} belongs.")
        if not isinstance(part, str) and len(part) > 1:
            raise ValueError(
                f"A {name} has {len(part)} messages, which a text template can't tell apart. Use a tokenizer with a "
                "chat template."
            )
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda place: as_text(parts[place[1]]), template)
