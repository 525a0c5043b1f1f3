# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny models as the demo reads them."""

from conftest import tiny_tokenizer
from tokenizers import decoders


OBJECTIVES = ["helpful", "brief"]


def spaced_tokenizer():
    """The tiny tokenizer, but words that it decodes have spaces between them, so that a text gives its tokens back."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return tokenizer


def save(folder, base, arm, base_name="base", arm_name="arm"):
    """Folders as training leaves them."""
    base.save_pretrained(folder / base_name)
    spaced_tokenizer().save_pretrained(folder / base_name)
    arm.peft_config["default"].base_model_name_or_path = str(folder / base_name)
    arm.save_pretrained(folder / arm_name)
