# SPDX-License-Identifier: Apache-2.0
"""The demo app as a Space on the Hub, or anywhere else: `python app.py`.

Its settings are environment variables, on a Space those of its page "Settings":

    ARM     the preference-conditioned adapter: an id on the Hub, or a folder; `arm` beside this file if not given
    BASE    the frozen base model; the one that the adapter was trained on if not given
    BETA    β at the start; 1 if not given
    DTYPE   of the weights; as they were saved if not given. A CPU without units for bfloat16 wants float32
    ESCAPE_CONTROL_TOKENS   `true`: text of control tokens, such as <|im_end|>, in what a visitor writes stays text

A private ARM needs the secret HF_TOKEN too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio looks when it is imported

from trl_parm.decoding.methods import guidance_strength
from trl_parm.demo.answering import Answering
from trl_parm.demo.loading import load_models
from trl_parm.demo.page import Page


def build() -> Page:
    """Loads the models and makes the page. Raises `ValueError` if a setting is wrong, in one line."""
    arm = os.environ.get("ARM") or str(Path(__file__).parent / "arm")
    beta = float(os.environ.get("BETA") or 1.0)
    guidance_strength(beta)
    escape = (os.environ.get("ESCAPE_CONTROL_TOKENS") or "false").lower()
    if escape not in ("true", "false"):
        raise ValueError(f"ESCAPE_CONTROL_TOKENS is {escape!r}, but it must be true or false.")
    models = load_models(arm, os.environ.get("BASE") or None, os.environ.get("DTYPE") or "auto")
    return Page(Answering(models, escape == "true"), beta)


if __name__ == "__main__":
    try:
        page = build()
    except ValueError as error:
        sys.exit(f"error: {error}")
    # A Space sets this to all addresses; elsewhere the page is for this machine only.
    page.launch(os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
