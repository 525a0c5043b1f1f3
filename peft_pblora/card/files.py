# SPDX-License-Identifier: Apache-2.0
"""Cards beside an adapter: written when asked for, completed by results, uploaded, never over a user's own words."""

import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_pblora.config import PreferenceConfig
from peft_pblora.output import output_file

from .text import FOLDER, MARK, CardFacts, Table, render, usage


TEMPLATE = "# Model Card for Model ID"
"""How the empty card begins that PEFT saves with every adapter."""
QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
OF_PEFT = {"base_model", "library_name", "pipeline_tag", "tags"}
"""The metadata that PEFT writes into it."""
WRITER = "add_results"
FILES = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.png", "*.txt", "*.model", "LICENSE*")
"""What an upload consists of: weights, tokenizer, card. Pickles, a trainer's `*.bin` and `*.pt`, stay behind."""
NEEDED = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
LOGS = ("trainer_state.json", "*_results.json")
"""What a trainer writes about a run, which may name folders of its machine."""


def write_card(folder: str | Path, subfolder: str = "", **facts: Any) -> None:
    """Writes the card of a saved adapter in the place of PEFT's empty one, without loading the model.

    Args:
        folder (`str` or `Path`): The folder of the adapter, where its `README.md` belongs.
        subfolder (`str`, *optional*): Where below it the adapter is; PEFT saves one that is not named `default` there.
        **facts: [`CardFacts`] such as `license="apache-2.0"`, which are kept in the adapter's configuration with
            those that it has already.

    Raises:
        ValueError: no preference-conditioned adapter in the folder, or an unknown fact.
    """
    known = CardFacts.__annotations__
    if unknown := sorted(set(facts) - set(known)):
        raise ValueError(f"A card has no {', '.join(unknown)}. Its facts are {', '.join(sorted(known))}.")
    saved = Path(folder, subfolder, CONFIG_NAME)
    if not saved.is_file():
        raise ValueError(f"There is no adapter in {str(saved.parent)!r}. Give the folder that has its {CONFIG_NAME}.")
    config: Any = PeftConfig.from_pretrained(str(saved.parent))
    if not isinstance(config, PreferenceConfig):
        raise ValueError(f"The adapter in {str(folder)!r} has no preference; only cards of those that do are kept.")
    kept = {**(config.card or {}), **facts}
    content = {**json.loads(saved.read_text(encoding="utf-8")), "card": kept}
    with output_file(saved) as file:
        json.dump(content, file, indent=2, sort_keys=True)
    save_card(folder, config, cast(CardFacts, kept), subfolder)


def add_results(
    folder: str | Path, measures: Table | None = None, figure: str | Path | None = None, **facts: Any
) -> None:
    """Adds results, or other facts, to the card of a saved adapter, without loading the model.

    Args:
        folder (`str` or `Path`): The adapter's folder.
        measures (`Table`, *optional*):
            Rows of plain values, the head first: `[["measure", "value"], ["hypervolume above (0, -40)", 18.8]]`.
        figure (`str` or `Path`, *optional*):
            A PNG, such as a Pareto front. It is copied into this folder, in the place of one that was copied here
            before, and left behind where the adapter is loaded and saved elsewhere.
        **facts: Further [`CardFacts`], such as `license="apache-2.0"`.

    Raises:
        ValueError: as [`write_card`]; no such figure, or another file of its name in the folder.
    """
    if measures is not None:
        facts["measures"] = measures
    if figure is not None:
        picture = Path(figure)
        if not picture.is_file():
            raise ValueError(f"There is no figure at {str(figure)!r}. Name a PNG file.")
        facts["figure"], beside = picture.name, Path(folder, picture.name)
        content = picture.read_bytes()
        if beside.parent.is_dir() and not (beside.is_file() and beside.read_bytes() == content):
            with output_file(beside, WRITER, binary=True) as file:
                file.write(content)
    write_card(folder, **facts)


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
        empty = not card.is_file() or is_template(card.read_text(encoding="utf-8"))
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


def save_card(folder: str | Path, config: Any, facts: CardFacts, subfolder: str = "") -> None:
    """Writes [`render`]'s card as `README.md`. Words of a user's own stay; if they lack it, [`usage`] is added."""
    path = Path(folder, "README.md")
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    if found and MARK not in found and not is_template(found):
        if "import peft_pblora" not in found:
            with output_file(path) as file:
                file.write(f"{found.rstrip()}\n\n{usage(config, facts, subfolder)}\n")
        return
    tags = (ModelCard(found).data.tags or []) if found else []
    with output_file(path) as file:
        file.write(str(render(config, _public(folder, config, facts), tags, subfolder)))


def is_template(text: str) -> bool:
    """Whether a card is the template that PEFT saves with every adapter, and nobody has filled anything in."""
    if TEMPLATE not in text:
        return False
    card, template = ModelCard(text), ModelCard.from_template(ModelCardData()).text
    known = {*map(str.strip, template.splitlines()), "## Training procedure", "### Framework versions", ""}
    written = re.sub(re.escape(QUANTIZED) + r"(\s*\n- .*)*", "", card.text)
    own = {line.strip() for line in written.splitlines() if not re.fullmatch(r"- PEFT [\w.+]+", line)} - known
    return not own and set(card.data.to_dict()) <= OF_PEFT


def exported_card(config: Any, preference: torch.Tensor) -> ModelCard:
    """The card of a plain LoRA that was exported at one preference, of shape `(k,)`."""
    pairs = zip(config.objectives, preference.tolist(), strict=True)
    weights = "\n".join(f"- {name}: {weight:g}" for name, weight in pairs)
    base, method = config.base_model_name_or_path, config.peft_type.value
    tags = ["lora", method.lower(), "preference-conditioned"]
    data = ModelCardData(library_name="peft", base_model=hub_id(base), tags=tags)
    return ModelCard(f"""---
{data.to_yaml()}
---

# A preference-conditioned adapter at one preference

A plain LoRA: the {method} adapter for `{base}` with its preference fixed to

{weights}

It equals the adapter at this preference exactly and loads with PEFT alone:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{FOLDER}")
```
""")


def hub_id(name: str | None) -> str | None:
    """The name if it can be an id on the Hub and is no folder of this machine; the Hub refuses a card with others."""
    with suppress(HFValidationError):
        if name and not os.path.exists(name):
            validate_repo_id(name)
            return name
    return None


def _public(folder: str | Path, config: Any, facts: CardFacts) -> CardFacts:
    """The facts with what can be looked up on this machine, without names and files that exist on it alone."""
    base = getattr(config, "base_model_name_or_path", None)
    known = {"base_model": hub_id(base), "base_license": _licence(base), **facts}
    known["datasets"] = [name for name in facts.get("datasets", ()) if hub_id(name)]
    if not Path(folder, facts.get("figure") or " ").is_file():
        known.pop("figure", None)
    return cast(CardFacts, known)


def _licence(base: str | None) -> str | None:
    """The licence of a base model, as its own card on this machine says it; `None` if there is no such card."""
    card: Any = None
    if base and os.path.isdir(base):
        card = os.path.join(base, "README.md")
    elif hub_id(base):
        card = try_to_load_from_cache(str(base), "README.md")
    if isinstance(card, str) and os.path.isfile(card):
        with suppress(OSError, ValueError):
            return ModelCard.load(card).data.license
    return None
