# SPDX-License-Identifier: Apache-2.0
"""Our docstrings for the site: an extension of griffe, which reads Google's form, for the Hugging Face form.

There types stand in backticks beside `*optional*` and a default, which the site shows from the code, and other objects
in brackets, which become links here if they are in the reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe


LISTED = {
    path.rpartition(".")[2]: path
    for page in (Path(__file__).parents[1] / "reference").glob("*.md")
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
"""Name → path of all that the reference has."""
ARGUMENT = re.compile(r"^(\s+\*{0,2}[\w*, ]+) \((.+)\):(?=\s)", re.MULTILINE)
RETURNED = re.compile(r"^(\s+)`([^`]+)`:(?=\s)", re.MULTILINE)
OBJECT = re.compile(r"\[`([\w.]+)`\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """A docstring in the form that griffe reads."""
    text = ARGUMENT.sub(lambda found: f"{found[1]} ({_type(found[2])}):", text)
    text = RETURNED.sub(r"\1\2:", text)
    return OBJECT.sub(lambda found: _link(found[1]), text)


def _type(text: str) -> str:
    text = re.sub(r",? ?defaults to .*$", "", text).replace("*optional*", "optional")
    text = re.sub(r"\[(`[\w.]+`)\]", r"\1", text)
    text = re.sub(r"`(?:, | or |, or )(?=`)", "` | ", text)
    return text.replace("`", "").rstrip(", ")


def _link(path: str) -> str:
    name = path.rpartition(".")[2]
    return f"[`{path}`][{LISTED[name]}]" if name in LISTED else f"`{path}`"
