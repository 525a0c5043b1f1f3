# SPDX-License-Identifier: Apache-2.0
"""The sections of a card, each a text in Markdown; empty where nothing is known."""

from __future__ import annotations

import json
from typing import Any

from .citations import ADAPTER_PAPERS, CITATIONS
from .facts import CardFacts, Table
from .sample import PROMPT


FOLDER = "path/to/this/folder"
"""What stands for the adapter in a card's code, until it is pushed under a name."""
METHODS = {"PBLORA": "PBLoRA", "SVDLORA": "SVD-LoRA", "MOSLORA": "MoSLoRA"}
"""As the papers write them."""
IMPORT = (
    "`pip install trl-parm` brings `peft_pblora` and `trl_parm`. PEFT knows {method} after `import peft_pblora`; "
    "without it, loading ends in a `KeyError`."
)


def introduction(config: Any, facts: CardFacts) -> str:
    """What it is."""
    base = _named(getattr(config, "base_model_name_or_path", None))
    objectives = getattr(config, "objectives", None)
    if objectives is None:
        return (
            f"An autoregressive reward model (ARM) on {base}. Its log-probabilities are rewards for each token; they "
            "guide a frozen language model while it decodes:\n\n"
            "    log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t) − log Z"
        )
    listed = "\n".join(
        f"- **{name}**, weight {weight:.3g} unless set"
        for name, weight in zip(objectives, config.initial_preference, strict=True)
    )
    return (
        f"A {_method(config)} adapter on {base}: one small autoregressive reward model (ARM) for all preferences "
        "α over its objectives. Its log-probabilities are rewards for each token; they guide a frozen language model "
        "while it decodes, and α is chosen anew for each answer:\n\n"
        "    log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t; α) − log Z\n\n"
        f"## Objectives\n\n{listed}\n\nWeights are not negative and sum to 1."
    )


def usage(config: Any, facts: CardFacts) -> str:
    """How to load an adapter and guide its base model with it, as code that runs."""
    weights = ""
    if hasattr(config, "objectives"):
        pairs = zip(config.objectives, config.initial_preference, strict=True)
        weights = "{" + ", ".join(f"{json.dumps(name)}: {weight!r}" for name, weight in pairs) + "}"
    if config.task_type != "CAUSAL_LM":
        return _loading(config, weights)
    base = json.dumps(config.base_model_name_or_path or "name/of-the-base-model")
    sample = facts.get("sample", {})
    prompt = json.dumps(sample.get("prompt", PROMPT), ensure_ascii=False)
    inputs = f'inputs = tokenizer({prompt}, return_tensors="pt")'
    if sample.get("chat"):
        inputs = (
            f'chat = [{{"role": "user", "content": {prompt}}}]\n'
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)"
        )
    note = IMPORT.format(method=_method(config)) if weights else "`pip install trl-parm` brings the guidance."
    return f"""## Loading this adapter

```python
import peft_pblora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_parm import PARMLogitsProcessor

base = AutoModelForCausalLM.from_pretrained({base})
tokenizer = AutoTokenizer.from_pretrained({base})
arm = PeftModel.from_pretrained(base, "{FOLDER}")

{inputs}
guide = PARMLogitsProcessor(arm{f", {weights}" if weights else ""}, beta=1.0)
output = base.generate(**inputs, logits_processor=[guide], max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

{note} A larger model with the same tokenizer can be guided too: call its `generate` with the same `guide`."""


def sample(facts: CardFacts) -> str:
    """One prompt at a few preferences, or why there is none."""
    found = facts.get("sample")
    if not found:
        return ""
    head = f"## One prompt, several preferences\n\n> {_cell(found['prompt'])}\n\n"
    if "missing" in found:
        return f"{head}No answer was generated when the adapter was saved: {found['missing']}."
    rows = [["preference", "answer"], *found["answers"]]
    return (
        f"{head}{table(rows)}\n\nGenerated when the adapter was saved, by its own base model, greedily, with "
        f"β = {found['beta']:g}; an ellipsis marks an answer that was longer."
    )


def training(facts: CardFacts) -> str:
    """Data and settings, and how well held-out pairs are ranked."""
    parts = []
    if "data" in facts:
        parts.append(table(facts["data"]))
    if "training" in facts:
        parts.append(table([["", ""], *facts["training"]]))
    if "accuracies" in facts:
        parts.append(
            "### Held-out pairs\n\nHow often the chosen response of a held-out pair has the larger log π_ARM, at "
            "several preferences; in brackets, relative to the untrained model.\n\n" + table(facts["accuracies"])
        )
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def measures(facts: CardFacts) -> str:
    """Measures of guided decoding with their reference point, and the Pareto front."""
    parts = []
    if facts.get("figure"):
        parts.append(f"![Mean rewards of guided responses at several preferences]({facts.get('figure')})")
    if "measures" in facts:
        parts.append(table(facts["measures"]))
    return "## Guided decoding, measured\n\n" + "\n\n".join(parts) if parts else ""


def run(facts: CardFacts) -> str:
    """The YAML that made the adapter, and with which versions."""
    parts = []
    if "run" in facts:
        parts.append(f"## How it was made\n\n```yaml\n{facts['run'].strip()}\n```")
    if "versions" in facts:
        lines = "\n".join(f"- {name} {version}" for name, version in facts["versions"])
        parts.append(f"### Framework versions\n\n{lines}")
    return "\n\n".join(parts)


def licences(config: Any, facts: CardFacts) -> str:
    """Of the adapter, of its base model and of the data; what is not known is said to be so."""
    base = getattr(config, "base_model_name_or_path", None)
    rows = {
        "This model": facts.get("license") or "not stated",
        f"Base model, {_named(base)}": facts.get("base_license") or "not known here; see the base model's own page",
        "Data": facts.get("data_license") or "not known here; see the data sets' own pages",
    }
    return "## Licence\n\n" + "\n".join(f"- {name}: {text}" for name, text in rows.items())


def citation(config: Any, facts: CardFacts) -> str:
    """BibTeX of the methods used."""
    own = ADAPTER_PAPERS.get(getattr(getattr(config, "peft_type", None), "value", ""))
    keys = facts.get("citations") or ([own] if own else [])
    entries = "\n\n".join(f"```bibtex\n{CITATIONS[key]}\n```" for key in keys if key in CITATIONS)
    return f"## Citation\n\n{entries}" if entries else ""


def table(rows: Table) -> str:
    """A table in Markdown; the first row is the head."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _named(base: str | None) -> str:
    return f"`{base}`" if base else "a model without a name"


def _method(config: Any) -> str:
    name = str(config.peft_type.value)
    return METHODS.get(name, name)


def _loading(config: Any, weights: str) -> str:
    return f"""## Loading this adapter

```python
import peft_pblora
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("{FOLDER}")
peft_pblora.set_preference(model, {weights}, normalize=True)
```

{IMPORT.format(method=_method(config))}"""
