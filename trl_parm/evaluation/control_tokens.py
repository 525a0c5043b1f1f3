# SPDX-License-Identifier: Apache-2.0
"""Prompts in which a user's text of a control token, such as `<|im_end|>`, stays text."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from trl_parm.templates import in_form
from trl_parm.texts import PromptText, as_messages, as_text, fill


def escaped_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptText],
    template: str | None = None,
    max_length: int | None = None,
) -> list[list[int]]:
    """The ids of each prompt as [`encode_prompts`](trl_parm.evaluation.decoding.encode_prompts) has them, but the only
    control tokens are those that the template writes: transformers' `sanitize_control_tokens`, for text templates too.

    Args:
        tokenizer, prompts, template, max_length: As there.

    Raises:
        ValueError: a transformers that can't do this, or a tokenizer that has a control token in its plain vocabulary.
    """
    check_escapes(tokenizer)
    encode: Any = tokenizer.apply_chat_template
    options: dict[str, Any] = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": True}
    around: tuple[list[int], list[int]] = [], []
    chats = [as_messages(prompt, "user") for prompt in prompts]
    if template is not None or tokenizer.chat_template is None:
        template = template or "{prompt}"
        for prompt in prompts:
            fill(template, prompt=prompt)  # raises what is wrong
        chats = [as_messages(as_text(prompt), "user") for prompt in prompts]
        parts = [f"{{{{ {json.dumps(part, ensure_ascii=False)} }}}}" for part in template.split("{prompt}")]
        options["chat_template"], around = "{{ messages[0]['content'] }}".join(parts), _around(tokenizer)
    else:
        chats = [in_form(tokenizer, chat) for chat in chats]
    most = None if max_length is None else max(0, max_length - sum(map(len, around)))
    rows = [cast(list[int], ids) for ids in encode(chats, **options)["input_ids"]]
    cut = [ids if most is None else ids[max(0, len(ids) - most) :] for ids in rows]
    return [[*around[0], *ids, *around[1]] for ids in cut]


def check_escapes(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` for a transformers that can't read control tokens as text."""
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        raise ValueError("`escape_control_tokens` needs a newer transformers (5.24): pip install -U transformers")


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after a plain text."""
    text, whole = (cast(list, tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(text)] == text)
    return whole[:start], whole[start + len(text) :]
