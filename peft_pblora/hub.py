# SPDX-License-Identifier: Apache-2.0
"""Adapters over the Hub, with their card."""

from __future__ import annotations

import tempfile
from typing import Any

from huggingface_hub import CommitInfo, HfApi


def push_to_hub(
    model: Any,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads what `model.save_pretrained` writes, the model card included.

    `model.push_to_hub` works too, but puts transformers' general card in the place of the one that shows how to load
    the adapter.

    Args:
        model (`PeftModel`): The model with its adapters.
        repo_id (`str`): The repository, as `user/name`; it is created if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; the account's default if not given.
        token (`str` or `bool`, *optional*): A token of the Hub; the stored one if not given.
        revision (`str`, *optional*): The branch to push to; the main one if not given.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`): Message of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of pushing to the branch.

    Returns:
        `huggingface_hub.CommitInfo`: The commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr
        )
