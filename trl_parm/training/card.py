# SPDX-License-Identifier: Apache-2.0
"""The model card that a trainer writes beside its reward model."""

from __future__ import annotations

import textwrap
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData

from peft_pblora.card import loading_section
from peft_pblora.config import PreferenceConfig


if TYPE_CHECKING:
    from .trainer import PreferenceARMTrainer


PARM = """\
@inproceedings{lin2025parm,
  title     = {{PARM}: Multi-Objective Test-Time Alignment via Preference-Aware Autoregressive Reward Model},
  author    = {Lin, Baijiong and Jiang, Weisen and Xu, Yuancheng and Chen, Hao and Chen, Ying-Cong},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}"""
GENARM = """\
@inproceedings{xu2025genarm,
  title     = {{GenARM}: Reward Guided Generation with Autoregressive Reward Model for Test-Time Alignment},
  author    = {Xu, Yuancheng and Sehwag, Udari Madhushani and Koppel, Alec and Zhu, Sicheng and An, Bang and
               Huang, Furong and Ganesh, Sumitra},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
}"""
PANACEA = """\
@inproceedings{zhong2024panacea,
  title     = {Panacea: {Pareto} Alignment via Preference Adaptation for {LLMs}},
  author    = {Zhong, Yifan and Ma, Chengdong and Zhang, Xiaoyuan and Yang, Ziran and Chen, Haojun and
               Zhang, Qingfu and Qi, Siyuan and Yang, Yaodong},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
}"""
UNIARM = """\
@misc{uniarm2026,
  title         = {{UniARM}},
  eprint        = {2602.09538},
  archivePrefix = {arXiv},
  year          = {2026},
}"""
ADAPTER_PAPERS = {"SVDLORA": PANACEA, "MOSLORA": UNIARM}


def citations(trainer: PreferenceARMTrainer) -> list[str]:
    """BibTeX of the methods that a trainer used: the ARM's, the adapter's, the loss's."""
    found = [PARM if trainer.preference_conditioned else GENARM]
    config = _adapter_config(trainer)
    if config is not None:
        found.append(ADAPTER_PAPERS.get(str(config.peft_type), found[0]))
    if trainer.args.aggregation == "tchebycheff":
        found.append(PANACEA)
    if trainer.args.global_weight:
        found.append(UNIARM)
    return list(dict.fromkeys(found))


def arm_card(
    trainer: PreferenceARMTrainer, model_name: str | None, dataset_name: str | None, tags: list[str]
) -> ModelCard:
    """The card of a trained reward model.

    Args:
        trainer ([`PreferenceARMTrainer`]): The trainer.
        model_name (`str`, *optional*): The model's name.
        dataset_name (`str`, *optional*): Of the training data, as on the Hub.
        tags (`list[str]`): Tags of the card.
    """
    config = _adapter_config(trainer)
    base = getattr(config, "base_model_name_or_path", None) or cast(Any, trainer.model).config._name_or_path or None
    data = ModelCardData(
        base_model=base,
        datasets=dataset_name,
        library_name="peft" if config is not None else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({"generated_from_trainer", *tags}),
    )
    sections = [
        f"# {model_name or 'An autoregressive reward model'}",
        f"An autoregressive reward model (ARM) for {', '.join(trainer.objectives)}, trained on `{base}`. Its "
        "log-probabilities are rewards for each token; they guide a frozen language model while it decodes.",
        loading_section(config) if isinstance(config, PreferenceConfig) else "",
        _decoding(trainer),
        _training(trainer),
        "## Citation\n\n" + "\n\n".join(f"```bibtex\n{entry}\n```" for entry in citations(trainer)),
    ]
    body = "\n\n".join(section.strip() for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _adapter_config(trainer: PreferenceARMTrainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.peft_config[model.active_adapter] if is_peft_model(model) else None


def _decoding(trainer: PreferenceARMTrainer) -> str:
    preference = ""
    if trainer.preference_conditioned:
        share = round(1 / len(trainer.objectives), 3)
        preference = ", preference=[" + ", ".join([str(share)] * (len(trainer.objectives) - 1))
        preference += f"{', ' if len(trainer.objectives) > 1 else ''}{1 - share * (len(trainer.objectives) - 1):.3g}]"
    return textwrap.dedent(f"""\
        ## Guiding a model

        ```python
        from trl_parm import PARMLogitsProcessor

        guide = PARMLogitsProcessor(model{preference}, beta=1.0)
        output = base.generate(**inputs, logits_processor=[guide])
        ```

        `base` is any causal language model with the same tokenizer.""")


def _training(trainer: PreferenceARMTrainer) -> str:
    args = trainer.args
    rows = {
        "β of each objective": ", ".join(
            f"{o} {b:g}" for o, b in zip(trainer.objectives, trainer.arm_loss.beta.tolist(), strict=True)
        ),
        "loss": args.loss_type + (", mean log-probabilities" if args.length_normalized else ""),
        "aggregation": args.aggregation + (f", global term × {args.global_weight:g}" if args.global_weight else ""),
    }
    if trainer.preference_conditioned:
        drawn = "a fixed set" if args.train_preferences else f"Dirichlet({args.concentration:g})"
        rows["preferences in training"] = f"{drawn}, one for each {args.preference_per}"
    rows |= {"learning rate": f"{args.learning_rate:g}", "seed": str(args.seed)}
    packages = ("trl-parm", "trl", "peft", "transformers", "torch", "datasets")
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    versions = "\n".join(f"- {package}: {version(package)}" for package in packages)
    return f"## Training\n\n| | |\n|---|---|\n{table}\n\n### Framework versions\n\n{versions}"
