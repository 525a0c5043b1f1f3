# SPDX-License-Identifier: Apache-2.0
"""Model cards: what a reader of an adapter's page needs to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData


if TYPE_CHECKING:
    from .config import PreferenceConfig


def loading_section(config: PreferenceConfig) -> str:
    """The section of a card that shows how to load an adapter of this config, with the import that PEFT needs."""
    weights = ", ".join(
        f'"{objective}": {weight:.3g}'
        for objective, weight in zip(config.objectives, config.initial_preference, strict=True)
    )
    method = cast(Any, config.peft_type).value
    return f"""## Loading this adapter

A {method} adapter, conditioned on a preference over {", ".join(config.objectives)}. PEFT knows the
method after `import peft_pblora` (`pip install trl-parm`); without it, loading ends in a `KeyError`.

```python
import peft_pblora
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
peft_pblora.set_preference(model, {{{weights}}}, normalize=True)
```
"""


def add_loading_section(folder: str | Path, config: PreferenceConfig) -> None:
    """Appends [`loading_section`] to the card that PEFT wrote to this folder, unless it shows the import already."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if "import peft_pblora" not in text:
        path.write_text(f"{text.rstrip()}\n\n{loading_section(config)}", encoding="utf-8")


def exported_card(config: Any, preference: torch.Tensor) -> ModelCard:
    """The card of a plain LoRA that was exported at one preference, of shape `(k,)`."""
    weights = "\n".join(
        f"- {name}: {weight:g}" for name, weight in zip(config.objectives, preference.tolist(), strict=True)
    )
    base, method = config.base_model_name_or_path, config.peft_type.value
    data = ModelCardData(library_name="peft", base_model=base, tags=["lora", method.lower(), "preference-conditioned"])
    return ModelCard(f"""---
{data.to_yaml()}
---

# A preference-conditioned adapter at one preference

A plain LoRA: the {method} adapter for `{base}` with its preference fixed to

{weights}

It equals the adapter at this preference exactly and loads with PEFT alone:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
""")
