# SPDX-License-Identifier: Apache-2.0
"""The demo's command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trl_parm.arguments import option, parse, required
from trl_parm.extras import require


NEEDED = ("gradio", "matplotlib", "moocore")


@dataclass
class DemoArguments:
    """Arguments of `trl-parm demo` and of `python -m trl_parm.demo`."""

    arm: str = option("", "The preference-conditioned adapter: a folder or Hub id.")
    model: str | None = option(None, "The base model; the adapter's own if not given.")
    beta: float = option(1.0, "β at the start; guidance has strength 1/β.")
    dtype: str = option("auto", "Of the weights, such as float32.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int | None = option(None, "Port; the first free one from 7860 if not given.")
    escape_control_tokens: bool = option(False, "Read text of control tokens, such as <|im_end|>, in prompts as text.")
    share: bool = option(False, "Make a public link through gradio's servers.")

    def __post_init__(self) -> None:
        required(self, "arm")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until it is interrupted: exit code 0, or 2 after one line on stderr that says what is wrong."""
    try:
        serve(parse("demo", DemoArguments, sys.argv[1:] if argv is None else argv, __doc__))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def serve(arguments: DemoArguments) -> None:
    """Serves the page. Raises `ValueError`, `OSError` or `ImportError` if something is wrong or missing."""
    require("demo", "the demo", *NEEDED)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio looks before any page is made
    from trl_parm.decoding.methods import guidance_strength

    from .answering import Answering
    from .loading import load_models
    from .page import Page

    guidance_strength(arguments.beta)  # before anything is loaded
    models = load_models(arguments.arm, arguments.model, arguments.dtype)
    page = Page(Answering(models, arguments.escape_control_tokens), arguments.beta)
    try:
        page.launch(arguments.host, arguments.port, arguments.share)
    finally:
        page.answering.close()
