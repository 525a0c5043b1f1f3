# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations as token ids, as a model's tokenizer and its chat template make them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .texts import content_text


PROBE = "What a template makes of it"
BEFORE = 6
"""Tokens of a prompt with which it is found out whether a space follows."""


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, **kwargs: Any
) -> list[int]:
    """Ids of messages by the tokenizer's chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        messages (`Sequence[Mapping]`): Messages, whose contents are texts or lists of text parts.
        where (`str`): Where they stand, for messages of errors.
        **kwargs: For the template, such as `add_generation_prompt` and `tools`.

    Raises:
        ValueError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"There are messages in {where}, but the tokenizer has no chat template. Set `tokenizer.chat_template`, "
            "or give texts."
        )
    try:
        chat: Any = in_form(tokenizer, messages)
        return cast(Any, tokenizer.apply_chat_template(chat, return_dict=True, **kwargs))["input_ids"]
    except (AttributeError, IndexError, KeyError, TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"The tokenizer's chat template can't read {where}: {type(error).__name__}: {error}. Change these "
            "messages, or give the tokenizer another template."
        ) from error


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: without an end token that the tokenizer appends."""
    return without_end(tokenizer, text, cast(list[int], tokenizer(text)["input_ids"]))


def tokenize_response(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Ids of a text that follows these, as the tokenizer writes it there: many put a space before the beginning of a
    text, and nowhere else."""
    before = _decode(tokenizer, prompt_ids[-BEFORE:], False)
    start, whole, alone = (
        cast(list[int], tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (before, before + text, text)
    )
    # Where the two would be merged, the prompt's last token stands already.
    follows = whole[: len(start)] == start and start[-1:] == list(prompt_ids[-1:])
    return whole[len(start) :] if follows else alone


def response_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids that follow these, without special tokens, but with a space that stands before it: at the
    beginning of a text, which ids alone are taken for, many tokenizers leave that out."""
    before = list(prompt_ids[-BEFORE:])
    start, whole, alone = (_decode(tokenizer, part, True) for part in (before, [*before, *ids], ids))
    return whole[len(start) :] if whole.startswith(start) else alone


def without_end(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """The ids of a text, perhaps cut on the left, without an end token that the tokenizer has appended to it."""
    if not ids or ids[-1] != tokenizer.eos_token_id:
        return ids
    bare = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    common = min(len(bare), len(ids) - 1)
    appended = ids[-1 - common : -1] == bare[-common:] if common else not bare
    return ids[:-1] if appended else ids


def in_form(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with contents as the chat template reads them: as given, or else joined to a text, or as one part."""
    template = tokenizer.get_chat_template()
    texts, parts = (_reads(template, as_parts) for as_parts in (False, True))
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and not parts:
            content = content_text(content)
        elif isinstance(content, str) and parts and not texts:
            content = [{"type": "text", "text": content}]
        found.append({**message, "content": content})
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@functools.lru_cache(maxsize=64)
def _reads(template: str, as_parts: bool) -> bool:
    """Whether a template writes a content that is a text, or a list of parts, as its text."""
    content = [{"type": "text", "text": PROBE}] if as_parts else PROBE
    try:
        chat: Any = [[{"role": "user", "content": content}]]
        (text,), _ = cast(Any, render_jinja_template(chat, chat_template=template, bos_token="", eos_token=""))
    except (AttributeError, IndexError, KeyError, TemplateError, TypeError, ValueError):
        return not as_parts  # it refuses such a conversation; most templates read texts
    return PROBE in text and "'type'" not in text
