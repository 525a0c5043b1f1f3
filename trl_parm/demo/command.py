# SPDX-License-Identifier: Apache-2.0
"""The demo's command line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence


NEEDED = {"gradio": "gradio", "matplotlib": "matplotlib", "moocore": "moocore", "scipy": "scipy"}


def main(argv: Sequence[str] | None = None) -> int:
    """Loads the models and serves the page until it is interrupted.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process if not given.

    Returns:
        `int`: An exit code: 0, or 2 after one line on stderr that says what is wrong.
    """
    args = _parser().parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the demo needs {', '.join(missing)}: pip install 'trl-parm[demo]'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio looks before any page is made
    from trl_parm.decoding.processors import guidance_strength

    from .answering import Answering
    from .loading import load_models, one_line
    from .page import Page

    try:
        guidance_strength(args.beta)
        page = Page(Answering(load_models(args.arm, args.model, args.dtype)), args.beta)
    except ValueError as error:
        return _refuse(one_line(error))
    try:
        page.launch(args.host, args.port, args.share)
    except OSError as error:
        return _refuse(one_line(error))
    finally:
        page.answering.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-parm demo", description="A page where a preference slider steers a frozen model."
    )
    parser.add_argument(
        "--arm", required=True, help="the preference-conditioned adapter, a folder or an id on the Hub"
    )
    parser.add_argument("--model", help="the frozen base model (default: the one that the adapter was trained on)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make a public link through gradio's servers")
    parser.add_argument(
        "--beta", type=float, default=1.0, help="β at the start; guidance has strength 1/β (default: 1)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, such as float32 (default: as they were saved)"
    )
    return parser


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
