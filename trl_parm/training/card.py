# SPDX-License-Identifier: Apache-2.0
"""What a trainer knows of its reward model, for the model card beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from peft.utils import CONFIG_NAME

from peft_pblora.card import ADAPTER_PAPERS, CardFacts, hub_id, save_card, write_card
from peft_pblora.config import PreferenceConfig
from trl_parm.records import plain, versions

from .data import JointPreferenceDataset, Pairs
from .diagnosis import diagnose
from .sample import make_sample


Trainer = Any
"""A [`PreferenceARMTrainer`], which calls what is here."""

NOT_OF_THE_MODEL = {
    "accelerator_config", "activation_checkpointing", "card_prompt", "dataloader_pin_memory", "disable_tqdm",
    "eval_data", "hub_token", "local_rank", "logging_dir", "output_dir", "resume", "run_name",
}  # fmt: skip
"""Arguments that say where and how a run went, not what it made."""
OWN = ("title", "tags", "license", "base_license", "base_model")
"""Facts that a user says of an adapter, which hold whatever trains it."""
OF_DATA = ("datasets", "data_license")
"""Facts that a user may say of the data, of which each run has its own."""


def first_facts(trainer: Trainer, given: Any, sources: Mapping[str, Pairs]) -> CardFacts:
    """What is known before training, of a `train_dataset` as it was `given`, with names of files, and as loaded."""
    names = given.values() if isinstance(given, Mapping) else [given]
    licences = dict.fromkeys(data.info.license for data in sources.values() if data.info.license)
    papers = ["parm" if trainer.preference_conditioned else "genarm"]
    papers += ["mo_odpo"] if trainer.preference_text is not None else []
    if isinstance(trainer.adapter_config, PreferenceConfig):
        papers.append(ADAPTER_PAPERS.get(cast(Any, trainer.adapter_config.peft_type).value, "parm"))
    papers += ["panacea"] if trainer.args.aggregation == "tchebycheff" else []
    papers += ["uniarm"] if trainer.args.global_weight else []
    facts: CardFacts = {
        "tags": ["generated_from_trainer", *trainer._tag_names],
        "training": _settings(trainer),
        "run": run_yaml(trainer.args),
        "versions": [list(pair) for pair in versions().items()],
        "citations": list(dict.fromkeys(papers)),
        **data_facts(trainer, list(sources), [name if isinstance(name, str) else None for name in names]),
    }
    if trainer.preference_text is not None:
        text = trainer.preference_text
        facts["preference_text"] = {"objectives": list(text.objectives), "template": text.template}
    return {**facts, "data_license": ", ".join(licences)} if licences else facts


def own_facts(config: Any) -> CardFacts:
    """What a user has said of an adapter in its configuration, without what an earlier run has noted there."""
    card = getattr(config, "card", None) or {}
    kept = OWN if "run" in card else (*OWN, *OF_DATA)
    return cast(CardFacts, {name: card[name] for name in kept if name in card})


def data_facts(trainer: Trainer, keys: Sequence[str], names: Sequence[str | None]) -> CardFacts:
    """The training data sets by their `keys`, with objectives, files or ids on the Hub if known, and sizes."""
    data: Any = trainer.train_dataset
    known = isinstance(data, JointPreferenceDataset)
    counts = [f"{len(part):,}" for part in data.datasets] if known else ["a stream"] * len(keys)
    rows = [
        [key if key in trainer.objectives else ", ".join(trainer.objectives), _public(name or "not named"), count]
        for key, name, count in zip(keys, names, counts, strict=True)
    ]
    hub = [name for name in names if name and hub_id(name)]
    return {"data": [["objective", "data", "pairs"], *rows], "datasets": list(dict.fromkeys(hub))}


def new_sample(trainer: Trainer) -> dict[str, Any] | None:
    """What the model answers at a few preferences; `None` if nothing is asked, or it has no preference."""
    if not (trainer.args.card_prompt and isinstance(trainer.adapter_config, PreferenceConfig)):
        return None
    model = cast(Any, trainer.accelerator.unwrap_model(trainer.model))
    return make_sample(model, cast(Any, trainer.processing_class), trainer.args.card_prompt)


def facts_with(trainer: Trainer, sample: dict[str, Any] | None) -> CardFacts:
    """What is known now. It goes into the adapter's configuration, which is saved with the weights."""
    facts = {**trainer.card, **trainer.own_card, **measured(trainer), **({"sample": sample} if sample else {})}
    if isinstance(trainer.adapter_config, PreferenceConfig):
        trainer.adapter_config.card = dict(facts)
    return cast(CardFacts, facts)


def measured(trainer: Trainer) -> CardFacts:
    """Accuracies and diagnosis by the last evaluation of the weights as they are; nothing if there is none."""
    evaluations = _evaluations(trainer)
    facts = {"accuracies": _accuracies(trainer, evaluations), "diagnosis": _diagnosis(trainer, evaluations)}
    return cast(CardFacts, {name: fact for name, fact in facts.items() if fact})


def rewrite(trainer: Trainer, folder: str | Path) -> None:
    """Writes the card once more, with what has become known since the model was saved, and the sample of then."""
    config, subfolder = trainer.adapter_config, subfolder_of(trainer)
    former = (getattr(config, "card", None) or {}).get("sample")
    facts = facts_with(trainer, former or new_sample(trainer))
    if isinstance(config, PreferenceConfig) and Path(folder, subfolder, CONFIG_NAME).is_file():
        write_card(folder, subfolder, **facts)
    else:
        save_card(folder, config, facts, subfolder)


def subfolder_of(trainer: Trainer) -> str:
    """Where below its folder PEFT saves the adapter."""
    return "" if trainer.adapter_config is None or trainer.adapter == "default" else str(trainer.adapter)


def run_yaml(*configurations: Any) -> str:
    """The arguments that are not at their defaults, as YAML; of a path on this machine the name alone."""
    found: dict[str, Any] = {}
    for configuration in configurations:
        values = configuration.to_dict() if hasattr(configuration, "to_dict") else dataclasses.asdict(configuration)
        for field in dataclasses.fields(configuration):
            value, default = values.get(field.name), field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if field.name not in NOT_OF_THE_MODEL and value not in (None, [], {}) and value != plain(default):
                found[field.name] = value
    return yaml.safe_dump(_public(plain(found)), sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _settings(trainer: Trainer) -> list[list[str]]:
    args = trainer.args
    betas = zip(trainer.objectives, trainer.arm_loss.beta.tolist(), strict=True)
    weight = f", global term × {args.global_weight:g}" if args.global_weight else ""
    rows = [
        ["β of each objective", ", ".join(f"{objective} {beta:g}" for objective, beta in betas)],
        ["loss", args.loss_type + (", mean log-probabilities" if args.length_normalized else "")],
        ["aggregation", args.aggregation + weight],
    ]
    if trainer.preference_conditioned or trainer.preference_text is not None:
        drawn = "a fixed set" if args.train_preferences else f"Dirichlet({args.concentration:g})"
        rows.append(["preferences in training", f"{drawn}, one for each {args.preference_per}"])
    return [*rows, ["learning rate", f"{args.learning_rate:g}"], ["seed", str(args.seed)]]


def _evaluations(trainer: Trainer) -> list[dict[str, float]]:
    """The entries of the log that are of the weights as they are, newest first. Where the best model was loaded these
    are those of its step, and those since then."""
    history, loaded = trainer.state.log_history, trainer.best_loaded
    if loaded is None:
        return history[::-1]
    step, known = loaded
    return [*(entry for entry in history[:known] if entry.get("step") == step), *history[known:]][::-1]


def _accuracies(trainer: Trainer, evaluations: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """The accuracy of each objective at each preference by the first evaluation that has any; nothing if none has."""
    names = list(trainer.eval_preferences)

    def cell(entry: Mapping[str, float], objective: str, preference: str) -> str:
        accuracy = entry.get(f"eval_{objective}_accuracy@{preference}")
        relative = entry.get(f"eval_{objective}_ratio_accuracy@{preference}")
        if accuracy is None:
            return "-"
        return f"{accuracy:.3f}" + ("" if relative is None else f" ({relative:.3f})")

    for entry in evaluations:
        rows = [[objective, *(cell(entry, objective, name) for name in names)] for objective in trainer.objectives]
        if any(text != "-" for row in rows for text in row[1:]):
            return [["objective", *(f"at {name}" for name in names)], *rows]
    return []


def _diagnosis(trainer: Trainer, evaluations: Sequence[Mapping[str, float]]) -> str:
    """Whether the model follows α and has learned, by the first evaluation that measured it; empty if none did."""
    said = (diagnose(entry, trainer.objectives, trainer.adapter_config) for entry in evaluations)
    return next(filter(None, said), "")
