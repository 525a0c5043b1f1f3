# SPDX-License-Identifier: Apache-2.0
"""What a card says: Markdown made from an adapter's configuration and further facts and nothing else."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from huggingface_hub import ModelCard, ModelCardData

from .citations import ADAPTER_PAPERS, CITATIONS


Table = Sequence[Sequence[Any]]
"""Rows of plain values, the head first."""


class CardFacts(TypedDict, total=False):
    """Plain JSON values, all of them optional.

    - `title`, and `tags` and `datasets`, ids on the Hub, for the metadata.
    - `license` of the adapter, `base_license` and `data_license`, each as on the Hub, such as `apache-2.0`.
    - `data`, `accuracies` and `measures`: tables; `training` and `versions`: rows of a name and a value.
    - `diagnosis`: a paragraph on whether it follows α and has learned, by held-out pairs.
    - `figure`: the name of a PNG beside the card, see [`add_results`]; `run`: the YAML that made the adapter.
    - `citations`: keys of [`CITATIONS`]; the adapter's own paper if not given.
    - `sample`: `prompt`, `beta`, `chat` (whether a chat template was used), and `answers`, pairs of a preference's
      name and an answer, or `missing`, the reason for which there are none.
    - `preference_text`: of a model that reads its preference in the prompt, `objectives` and `template`, as in
      `preference_text.json` beside it.
    - `base_model`: the base model's id on the Hub; written with the card, as `base_license` where it is known here.
    """

    title: str
    base_model: str | None
    tags: list[str]
    datasets: list[str]
    license: str
    base_license: str
    data_license: str
    data: Table
    training: Table
    accuracies: Table
    diagnosis: str
    measures: Table
    figure: str
    run: str
    versions: Table
    citations: list[str]
    sample: dict[str, Any]
    preference_text: dict[str, Any]


FOLDER = "path/to/this/folder"
"""What stands for the adapter in a card's code, until it is pushed under a name."""
MARK = "<!-- Written by peft_pblora. Without this line, the words below are yours and stay as they are. -->"
PROMPT = "What do you think about a rainy Monday?"
"""What a sample answers, and the code of a card asks, unless another is given."""
METHODS = {"PBLORA": "PBLoRA", "SVDLORA": "SVD-LoRA", "MOSLORA": "MoSLoRA"}
"""As the papers write them."""


def render(config: Any, facts: CardFacts, tags: Iterable[str] = (), subfolder: str = "") -> ModelCard:
    """The card of an adapter, or of a whole model: a function of its arguments alone.

    Args:
        config (`PeftConfig` or `None`): The adapter's; `None` for a whole model.
        facts ([`CardFacts`]): What else is known.
        tags (`Iterable[str]`, *optional*): Further tags.
        subfolder (`str`, *optional*): Where below the card's folder the adapter is.
    """
    base, method = facts.get("base_model"), config.peft_type.value if config is not None else ""
    # PEFT's tags for the base may name a folder of this machine.
    metadata = {tag for tag in [*tags, *facts.get("tags", ())] if not tag.startswith("base_model:")}
    if hasattr(config, "objectives"):
        metadata |= {"preference-conditioned", method.lower()}
    if base:
        metadata.add(f"base_model:adapter:{base}")
    data = ModelCardData(
        base_model=base,
        datasets=list(facts.get("datasets", ())) or None,
        library_name="transformers" if config is None else "peft",
        license=facts.get("license"),
        pipeline_tag="text-generation" if getattr(config, "task_type", "CAUSAL_LM") == "CAUSAL_LM" else None,
        tags=sorted(metadata),
    )
    licences = [
        ["This model", facts.get("license") or "not stated"],
        [f"Base model, {_base(config)}", facts.get("base_license") or "not known here; see the base model's own page"],
        ["Data", facts.get("data_license") or "not known here; see the data sets' own pages"],
    ]
    papers = facts.get("citations") or [ADAPTER_PAPERS.get(method, "")]
    figure = facts.get("figure")
    sections = [
        f"# {facts.get('title') or 'An autoregressive reward model'}\n\n{MARK}",
        _introduction(config, facts),
        usage(config, facts, subfolder) if config is not None else "",
        _sample(facts),
        _section(
            "## Guided decoding, measured",
            f"![Mean rewards of guided responses at several preferences]({figure})" if figure else "",
            _table(facts.get("measures")),
        ),
        _section(
            "## Training",
            _table(facts.get("data")),
            _table([["", ""], *facts["training"]] if "training" in facts else None),
            _section(
                "### Held-out pairs\n\nHow often the chosen response of a held-out pair has the larger log π_ARM, at "
                "several preferences; in brackets, relative to the untrained model.",
                _table(facts.get("accuracies")),
            ),
            facts.get("diagnosis", ""),
        ),
        _section("## How it was made", f"```yaml\n{facts['run'].strip()}\n```" if "run" in facts else ""),
        _section("### Framework versions", _items(facts.get("versions", ()), " ")),
        _section("## Licence", _items(licences, ": ")),
        _section("## Citation", *(f"```bibtex\n{CITATIONS[key]}\n```" for key in papers if key in CITATIONS)),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def usage(config: Any, facts: CardFacts, subfolder: str = "") -> str:
    """How to load an adapter and guide its base model with it, as code that runs."""
    place = json.dumps(FOLDER) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
    weights, note, text = "", "`pip install trl-parm` brings the guidance.", facts.get("preference_text")
    if hasattr(config, "objectives"):
        pairs = zip(config.objectives, config.initial_preference, strict=True)
        weights = "{" + ", ".join(f"{json.dumps(name)}: {weight!r}" for name, weight in pairs) + "}"
        note = (
            f"`pip install trl-parm` brings `peft_pblora` and `trl_parm`. PEFT knows {_method(config)} after "
            "`import peft_pblora`; without it, loading ends in a `KeyError`."
        )
    if config.task_type != "CAUSAL_LM":
        return f"""## Loading this adapter

```python
import peft_pblora
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained({place})
peft_pblora.set_preference(model, {weights}, normalize=True)
```

{note}"""
    arguments, names, read = (f", {weights}" if weights else ""), "PARMLogitsProcessor", ""
    if text:
        even = dict.fromkeys(text["objectives"], 1 / len(text["objectives"]))
        arguments, names = ", prompt=prompt", "PARMLogitsProcessor, PreferenceText, Prompt"
        read = (
            f"text = PreferenceText.load({json.dumps(FOLDER)})\nprompt = Prompt.with_preference(inputs, "
            f"{json.dumps(even, ensure_ascii=False)}, text, tokenizer)\n"
        )
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
    return f"""## Loading this adapter

```python
import peft_pblora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_parm import {names}

base = AutoModelForCausalLM.from_pretrained({base})
tokenizer = AutoTokenizer.from_pretrained({base})
arm = PeftModel.from_pretrained(base, {place})

{inputs}
{read}guide = PARMLogitsProcessor(arm{arguments}, beta=1.0)
output = base.generate(**inputs, logits_processor=[guide], max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

{note} A larger model with the same tokenizer can be guided too: call its `generate` with the same `guide`."""


def _introduction(config: Any, facts: CardFacts) -> str:
    if not hasattr(config, "objectives"):
        said = (
            f"An autoregressive reward model (ARM) on {_base(config)}. Its log-probabilities are rewards for each "
            "token; they guide a frozen language model while it decodes:\n\n"
            "    log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t) − log Z"
        )
        text = facts.get("preference_text")
        if text is None:
            return said
        names = ", ".join(f"**{_cell(name)}**" for name in text["objectives"])
        return (
            f"{said}\n\nIt reads the preference α over its objectives, {names}, at the start of the prompt, as in "
            f"`{_cell(text['template'])}`, with weights rounded to two decimals; `preference_text.json` says how."
        )
    pairs, texts = zip(config.objectives, config.initial_preference, strict=True), _descriptions(config)
    listed = _items([[f"**{name}**", f"weight {weight:.3g} unless set{texts[name]}"] for name, weight in pairs], ", ")
    return (
        f"A {_method(config)} adapter on {_base(config)}: one small autoregressive reward model (ARM) for all "
        "preferences α over its objectives. Its log-probabilities are rewards for each token; they guide a frozen "
        "language model while it decodes, and α is chosen anew for each answer:\n\n"
        "    log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t; α) − log Z\n\n"
        f"## Objectives\n\n{listed}\n\nWeights are not negative and sum to 1."
    )


def _descriptions(config: Any) -> dict[str, str]:
    """What stands behind each objective in a list: its description, if it has one."""
    given = getattr(config, "objective_descriptions", None) or {}
    return {name: f": {_cell(given[name])}" if name in given else "" for name in config.objectives}


def _sample(facts: CardFacts) -> str:
    """One prompt at a few preferences, or why there is none."""
    found = facts.get("sample")
    if not found:
        return ""
    said = f"No answer was generated when the adapter was saved: {found.get('missing')}."
    if "missing" not in found:
        said = (
            f"{_table([['preference', 'answer'], *found['answers']])}\n\nGenerated when the adapter was saved, by its "
            f"own base model, greedily, with β = {found['beta']:g}; an ellipsis marks an answer that was longer."
        )
    return f"## One prompt, several preferences\n\n> {_cell(found['prompt'])}\n\n{said}"


def _section(head: str, *parts: str) -> str:
    """The parts below a heading; nothing where there are none."""
    found = [part for part in parts if part]
    return "\n\n".join([head, *found]) if found else ""


def _items(pairs: Table, between: str) -> str:
    return "\n".join(f"- {name}{between}{value}" for name, value in pairs)


def _table(rows: Table | None) -> str:
    """A table in Markdown; the first row is the head."""
    if rows is None:
        return ""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = "-" if text in ("nan", "None") else text
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _base(config: Any) -> str:
    name = getattr(config, "base_model_name_or_path", None)
    return f"`{name}`" if name else "a model without a name"


def _method(config: Any) -> str:
    name = str(config.peft_type.value)
    return METHODS.get(name, name)
