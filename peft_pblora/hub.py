# SPDX-License-Identifier: Apache-2.0
"""Adapters over the Hub, with their card, as safetensors and text alone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import FOLDER, TEMPLATE, write_card
from .config import PreferenceConfig


FILES = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.png", "*.txt", "*.model", "LICENSE*")
"""What an upload consists of: weights, tokenizer, card. Pickles, a trainer's `*.bin` and `*.pt`, stay behind."""
NEEDED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
LOGS = ("trainer_state.json", "*_results.json")
"""What a trainer writes about a run, which may name folders of its machine."""


def push_to_hub(
    model: Any,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads an adapter with its card, in one commit: after an upload that breaks off nothing of it is there.

    `model.push_to_hub` works too, but puts transformers' general card in the place of the one that shows how to load
    the adapter.

    Args:
        model (`PeftModel`, `str` or `Path`):
            The model with its adapters; or the folder of a saved adapter, with all that was added to its card, such as
            a figure. Where the card is PEFT's empty one, [`write_card`]'s stands in its place.
        repo_id (`str`): The repository, as `user/name`; it is created if it does not exist.
        private, token, revision, commit_message, create_pr (*optional*):
            As of [`HfApi.create_repo`] and [`HfApi.upload_folder`].

    Raises:
        ValueError: the folder has no adapter, or has its weights as a pickle.
    """
    saved = Path(model) if isinstance(model, str | Path) else None
    lacking = [file for file in NEEDED if not (saved / file).is_file()] if saved is not None else []
    if lacking:  # said before anything is created on the Hub
        raise ValueError(
            f"There is no {' and no '.join(lacking)} in {str(saved)!r}. Give the folder of an adapter that was saved "
            "as safetensors; a pickle is not uploaded, since loading it can run code."
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder, subfolder = Path(name), ""
        if saved is None:
            model.save_pretrained(name)
            first = next(iter(model.peft_config))
            subfolder = "" if first == "default" else first
        else:
            # The files of the folder itself, links among them by their content; checkpoints and other folders stay.
            for path in (path for pattern in FILES for path in saved.glob(pattern) if path.is_file()):
                shutil.copyfile(path, folder / path.name)
        card = folder / "README.md"
        empty = not card.is_file() or TEMPLATE in card.read_text(encoding="utf-8")
        if empty and isinstance(PeftConfig.from_pretrained(str(folder / subfolder)), PreferenceConfig):
            write_card(folder, subfolder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if card.is_file():
            card.write_text(card.read_text(encoding="utf-8").replace(FOLDER, repo_id), encoding="utf-8")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=name,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=list(FILES),
            ignore_patterns=list(LOGS),
        )
