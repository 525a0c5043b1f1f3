# SPDX-License-Identifier: Apache-2.0
"""A guided model for the tasks of lm-evaluation-harness: what guidance costs, or gains, on MMLU, GSM8K and their like.

Importing this registers the model `trl_parm` with the harness; `trl-parm lm_eval` does so before it hands on its
words. Needs the extra `lm_eval`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from transformers import BatchEncoding

from peft_pblora import as_preference
from trl_parm.decoding import BASE, Guided
from trl_parm.decoding.games import CommonAgency
from trl_parm.processes import Processes

from .decoding import Batch
from .methods import Entry
from .models import Models, positions_of


NEED_PROMPTS = ("args", "transfer_q", "parm_prompt")
"""Methods that judge whole texts or write into prompts, and need the prompts that they answer apart."""


@register_model("trl_parm")
class GuidedLM(HFLM):
    """A base model guided by a method at one preference, as the harness takes a model.

    Log-likelihoods are those of the guided distribution, log π_base + 1/β · log π_ARM(α) − log Z for PARM, and texts
    are decoded from it. Everything else is [`HFLM`]'s: few shots, chat templates, batches, caches.

    Args:
        base (`str`): The frozen base model, a folder or id on the Hub.
        preference (`dict` or `str`, *optional*):
            α by objective: a mapping, JSON, or a text such as `helpful:0.7+harmless:0.3`. Not for controls such as
            `base`, which have none.
        method (`str`, *optional*): A method of `trl-parm evaluate`; `parm` where an `arm` is given, else `base`.
        dtype (`str`, *optional*, defaults to `"auto"`): Of weights; as they were saved if not given.
        optimize_for_cpu (`bool`, *optional*, defaults to `False`): As in `trl-parm evaluate`.
        model_kwargs (`dict`, *optional*): Further arguments of `from_pretrained`.
        batch_size, max_batch_size, max_length, device, add_bos_token, prefix_token_id, softmax_dtype,
            think_end_token, enable_thinking, chat_template_args: As of the harness's `hf`.
        **settings: Those of the method, such as `arm` and `beta`. What is a mapping may be JSON.

    Raises:
        ValueError: an unknown method or setting; a preference that is missing, has no place, or is off the simplex; a
            method that needs prompts and responses apart; a `template`, since the harness says what a model reads.

    Example:

    ```python
    import lm_eval
    import trl_parm.evaluation.harness

    lm_eval.simple_evaluate(
        model="trl_parm",
        model_args={"base": "runs/base", "arm": "runs/arm", "preference": {"helpful": 0.7, "harmless": 0.3}},
        tasks=["arc_easy"],
    )
    ```
    """

    def __init__(
        self,
        base: str,
        preference: Mapping[str, float] | str | None = None,
        method: str | None = None,
        dtype: str = "auto",
        optimize_for_cpu: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        softmax_dtype: str | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        processes = Processes.launched()
        entry = _entry(method, settings)
        weights = _weights(preference, entry)
        place = {"device_map": {"": device}} if device and processes.count == 1 else {}
        models = Models(base, dtype, optimize_for_cpu, **{**place, **(model_kwargs or {})})
        processes.check_devices(models.kwargs)
        model = _guided(models, entry, weights)
        cast(Any, super()).__init__(
            pretrained=model,
            tokenizer=models.tokenizer,
            max_length=_shortest(model, max_length),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            softmax_dtype=softmax_dtype,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )
        self.pretrained = base  # a name, for what the harness writes
        self.described = {"method": entry.name, "preference": weights, **entry.configuration(base)}
        if processes.count > 1:  # each has its device and takes its requests, as with `hf`
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = processes.number, processes.count

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """As [`HFLM`]'s. Raises `ValueError` for CAGE among fewer tokens than all: most texts would have −inf."""
        self._check_candidates()
        return super().loglikelihood(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """As [`loglikelihood`]."""
        self._check_candidates()
        return super().loglikelihood_rolling(requests, *args, **kwargs)

    def _check_candidates(self) -> None:
        guided = cast(Any, self.model)
        tokens = guided.config.get_text_config().vocab_size
        if isinstance(guided.formula, CommonAgency) and guided.formula.k < tokens:
            raise ValueError(
                f"CAGE with `k` {guided.formula.k} chooses among so many tokens, and gives all others the "
                f"log-likelihood −inf, by which a task can't compare. Give `k={tokens}`, all of them, or take tasks "
                "that generate."
            )

    def get_model_info(self) -> dict[str, Any]:
        """As [`HFLM`]'s, with the method, its settings and hashes of its models."""
        return {**super().get_model_info(), "trl_parm": self.described}


def _entry(method: str | None, settings: Mapping[str, Any]) -> Entry:
    """The method and its settings, of which mappings may be JSON."""
    given = {name: _decoded(value) for name, value in settings.items()}
    entry = Entry.of({"method": method or ("parm" if "arm" in given else "base"), **given})
    if method in NEED_PROMPTS:
        raise ValueError(
            f"{method!r} needs prompts and responses apart, which the harness's requests don't tell. Use another "
            "method, or `trl-parm evaluate`."
        )
    if given.get("template") is not None:
        raise ValueError(
            "`template` has no place here: the harness says what a model reads, and its guides read that."
        )
    return entry


def _weights(preference: Mapping[str, float] | str | None, entry: Entry) -> dict[str, float]:
    """α by objective; none for a control."""
    if (preference is None) != entry.method.control:
        needs = "needs a `preference`, such as helpful:0.7+harmless:0.3" if preference is None else "has no preference"
        raise ValueError(f"The method {entry.name!r} {needs}.")
    found = _decoded(preference)
    if isinstance(found, str):
        try:
            found = {name: float(weight) for name, weight in (part.rsplit(":", 1) for part in found.split("+"))}
        except ValueError:
            raise ValueError(
                f"`preference` is {preference!r}, but it must be like helpful:0.7+harmless:0.3, or a mapping."
            ) from None
    weights = dict(found or {})
    return dict(zip(weights, as_preference(weights, list(weights)).tolist(), strict=True)) if weights else {}


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith(('{"', "{}")) else value


def _guided(models: Models, entry: Entry, weights: dict[str, float]) -> Guided:
    """The method's model at a preference, whatever is read."""
    α = torch.tensor(list(weights.values())) if weights else None
    found = entry.method.make(models, **entry.settings)(Batch(α, [], BatchEncoding(), weights))
    model = found[0] if isinstance(found, tuple) else found
    return model if isinstance(model, Guided) else Guided(model, BASE)


def _shortest(model: Guided, max_length: int | None) -> int | None:
    """The longest text that the base model and all guides can read."""
    read = [positions_of(one.config) for one in (model.backbone, *(term.backbone for term in model.terms))]
    return min((length for length in (max_length, *read) if length is not None), default=None)
