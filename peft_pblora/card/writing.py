# SPDX-License-Identifier: Apache-2.0
"""Cards as files: written with an adapter, completed by results, and left alone where a user wrote their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from peft_pblora.output import output_file

from . import sections
from .facts import CardFacts, Table, all_tags, hub_id, known_license, versions
from .sample import PROMPT, make_sample


if TYPE_CHECKING:
    from peft_pblora.config import PreferenceConfig

FOLDER = sections.FOLDER
MARK = "<!-- Written by peft_pblora. Without this line, the words below are yours and stay as they are. -->"
TEMPLATE = "# Model Card for Model ID"
"""How PEFT's empty card begins."""


def render(config: Any, facts: CardFacts, tags: Sequence[str] = ()) -> ModelCard:
    """The card of an adapter, or of a whole model.

    Args:
        config (`PeftConfig` or `None`): The adapter's; `None` for a whole model.
        facts ([`CardFacts`]): What else is known.
        tags (`Sequence[str]`, *optional*): Further tags.
    """
    data = ModelCardData(
        base_model=hub_id(getattr(config, "base_model_name_or_path", None)),
        datasets=[name for name in facts.get("datasets", ()) if hub_id(name)] or None,
        library_name="transformers" if config is None else "peft",
        license=facts.get("license"),
        pipeline_tag="text-generation" if getattr(config, "task_type", "CAUSAL_LM") == "CAUSAL_LM" else None,
        tags=all_tags(config, [*tags, *facts.get("tags", ())]),
    )
    found = [
        f"# {facts.get('title') or 'An autoregressive reward model'}\n\n{MARK}",
        sections.introduction(config, facts),
        sections.usage(config, facts) if config is not None else "",
        sections.sample(facts),
        sections.measures(facts),
        sections.training(facts),
        sections.run(facts),
        sections.licences(config, facts),
        sections.citation(config, facts),
    ]
    body = "\n\n".join(section for section in found if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def place_of_card(config: PreferenceConfig, folder: Path) -> Path | None:
    """Where the card of an adapter that is saved in this folder belongs, or `None` if PEFT has put none.

    PEFT saves adapters that are not named `default` in folders below its card. That one is of the first of them.
    """
    if (folder / "README.md").is_file():
        return folder
    tuner, above = config.tuner, folder.parent / "README.md"
    if tuner is None or tuner.peft_config.get(folder.name) is not config or not above.is_file():
        return None
    found = above.read_text(encoding="utf-8")
    return folder.parent if TEMPLATE in found or _quoted(FOLDER, Path(folder.name)) in found else None


def write_card(folder: str | Path, config: Any, facts: CardFacts, subfolder: Path = Path()) -> None:
    """Writes `README.md`. Words of a user's own are left as they are.

    Args:
        folder (`str` or `Path`): Where.
        config (`PeftConfig` or `None`): The adapter's; `None` for a whole model.
        facts ([`CardFacts`]): What else is known.
        subfolder (`Path`, *optional*): Where below the folder the adapter is, relative to it.
    """
    path = Path(folder) / "README.md"
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    if found and MARK not in found and TEMPLATE not in found:
        if "import peft_pblora" not in found:
            path.write_text(f"{found.rstrip()}\n\n{sections.usage(config, facts)}\n", encoding="utf-8")
        return
    tags = (ModelCard(found).data.tags or []) if found else []
    with output_file(path) as file:
        card = str(render(config, facts if _has_figure(folder, facts) else {**facts, "figure": ""}, tags))
        file.write(card.replace(_quoted(FOLDER), _quoted(FOLDER, subfolder)))


def refresh_facts(config: PreferenceConfig, folder: str | Path) -> None:
    """Puts what is known only while saving into a configuration: the sample, if the model is there, and licences."""
    facts = cast(CardFacts, dict(config.card or {}))
    tuner, prompt = config.tuner, facts.get("prompt", PROMPT)
    if tuner is not None:
        facts.pop("sample", None)
        facts.setdefault("versions", versions())
        if prompt:
            name = next(name for name, other in tuner.peft_config.items() if other is config)
            facts["sample"] = make_sample(tuner, name, prompt, Path(folder))
    found = known_license(config.base_model_name_or_path)
    if found:
        facts.setdefault("base_license", found)
    config.card = dict(facts)


def store_card(folder: str | Path, config: PreferenceConfig, sample: dict[str, Any] | None = None) -> None:
    """Writes the card into a folder where the adapter may have been saved already, and its facts beside the weights.

    Args:
        folder (`str` or `Path`): The folder.
        config ([`PreferenceConfig`]): The adapter's, with the facts.
        sample (`dict`, *optional*): A sample to keep; generated if not given.
    """
    if sample is None:
        refresh_facts(config, folder)
    else:
        config.card = {**(config.card or {}), "sample": sample}
    saved = Path(folder) / CONFIG_NAME
    if saved.is_file():
        content = {**json.loads(saved.read_text(encoding="utf-8")), "card": config.card}
        with output_file(saved) as file:
            json.dump(content, file, indent=2, sort_keys=True)
    write_card(folder, config, cast(CardFacts, config.card))


def add_results(
    folder: str | Path, measures: Table | None = None, figure: str | Path | None = None, **facts: Any
) -> None:
    """Adds results, or other facts, to the card of a saved adapter, without loading the model.

    Args:
        folder (`str` or `Path`): The adapter's folder.
        measures (`Table`, *optional*):
            Rows of plain values, the head first; a hypervolume's reference point belongs into its row.
        figure (`str` or `Path`, *optional*):
            A PNG, such as a Pareto front. It is copied into this folder and stays there:
            an adapter that is loaded and saved elsewhere leaves it behind.
        **facts: Further [`CardFacts`], such as `license="apache-2.0"`.

    Raises:
        ValueError: no preference-conditioned adapter in the folder, no such figure, or an unknown fact.

    Example:

    ```python
    add_results("runs/arm", [["measure", "value"], ["hypervolume above (0, -40)", 18.8]], "runs/pareto.png")
    ```
    """
    from peft_pblora.config import PreferenceConfig

    unknown = sorted(set(facts) - set(CardFacts.__annotations__))
    if unknown:
        known = ", ".join(sorted(CardFacts.__annotations__))
        raise ValueError(f"A card has no {', '.join(unknown)}. Its facts are {known}.")
    if not (Path(folder) / CONFIG_NAME).is_file():
        raise ValueError(f"There is no adapter in {str(folder)!r}. Give the folder that has its {CONFIG_NAME}.")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, PreferenceConfig):
        raise ValueError(f"The adapter in {str(folder)!r} has no preference; only cards of those that do are kept.")
    if figure is not None and not Path(figure).is_file():
        raise ValueError(f"There is no figure at {str(figure)!r}. Name a PNG file.")
    if figure is not None:
        facts["figure"] = _copied(Path(figure), Path(folder))
    given = {**facts, "measures": measures}
    config.card = {**(config.card or {}), **{name: value for name, value in given.items() if value is not None}}
    store_card(folder, config, config.card.get("sample", {}))


def exported_card(config: Any, preference: torch.Tensor) -> ModelCard:
    """The card of a plain LoRA that was exported at one preference, of shape `(k,)`."""
    weights = "\n".join(
        f"- {name}: {weight:g}" for name, weight in zip(config.objectives, preference.tolist(), strict=True)
    )
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


def _quoted(folder: str, subfolder: Path = Path()) -> str:
    """The arguments by which `from_pretrained` finds an adapter."""
    return json.dumps(folder) + (f", subfolder={json.dumps(subfolder.as_posix())}" if subfolder.parts else "")


def _has_figure(folder: str | Path, facts: CardFacts) -> bool:
    return bool(facts.get("figure")) and (Path(folder) / facts.get("figure", "")).is_file()


def _copied(figure: Path, folder: Path) -> str:
    """The name of a file that is in the folder now; where it was is nobody else's business."""
    if figure.resolve() != (folder / figure.name).resolve():
        shutil.copyfile(figure, folder / figure.name)
    return figure.name
