# SPDX-License-Identifier: Apache-2.0
"""Rewards by name: Python functions, sequence classifiers, and the score models of Safe-RLHF."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from .records import fingerprint
from .rewards import Reward
from .score_model import ScoreModel
from .texts import PromptText, as_messages, fill


@dataclass
class RewardSource:
    """Where a reward comes from, as a YAML file says it: a mapping, or just its `source`. It is that [`Reward`] too.

    Args:
        source (`str`):
            `module:function` for a function of prompts and responses, else a folder or an id on the Hub with a
            sequence classifier or a score model of Safe-RLHF.
        template (`str`, *optional*):
            The text that a model reads, with `{response}` and, unless it judges responses alone, `{prompt}`; the chat
            template of its tokenizer if not given.
        chat_template (`str`, *optional*):
            A template in Jinja for its tokenizer, where conversations have several messages and the model was trained
            with a format that its tokenizer does not know.
        label (`int`, *optional*, defaults to 0): Which of a model's outputs is the reward.
        negate (`bool`, *optional*, defaults to `False`): Whether it is a cost: the reward is minus the output.
        batch_size (`int`, *optional*, defaults to 8): Texts that a model reads at once.
        max_length (`int`, *optional*): Most tokens; a longer text is cut where the tokenizer cuts. The tokenizer's
            own limit if not given.
        dtype (`str`, *optional*, defaults to `"auto"`): Of a model's weights; as they were saved if not given.
        model_kwargs (`dict`, *optional*): Further arguments of `from_pretrained`, such as `device_map`.

    Raises:
        ValueError: no source, a template without `{response}`, or two templates.
    """

    source: str
    template: str | None = None
    chat_template: str | None = None
    label: int = 0
    negate: bool = False
    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.template is not None and "{response}" not in self.template:
            raise ValueError(f"The template {self.template!r} has no {{response}}, where the response belongs.")
        if self.template is not None and self.chat_template is not None:
            raise ValueError("A reward has a `template` and a `chat_template`. Give one of them.")

    @property
    def is_model(self) -> bool:
        """Whether it is a model, rather than a function."""
        return ":" not in self.source or Path(self.source).exists()

    @functools.cached_property
    def reward(self) -> Reward:
        """The reward, which is loaded when it is first asked for, and stays."""
        return self.load()

    @property
    def reads_messages(self) -> bool:
        """Whether it gets prompts as they are given; see [`Reward`]."""
        return getattr(self.reward, "reads_messages", False)

    def __call__(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> Sequence[float]:
        return self.reward(prompts, responses)

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | RewardSource) -> RewardSource:
        """From what stands in YAML, or in JSON on a command line. Raises `ValueError` for keys that are unknown."""
        if isinstance(given, str) and given.lstrip().startswith("{"):
            given = cast(dict[str, Any], json.loads(given))
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, RewardSource):
            return given
        known = [f.name for f in fields(cls)]
        if "source" not in given or not set(given) <= set(known):
            raise ValueError(
                f"A reward is given as {dict(given)}, but it needs `source`, and may have {', '.join(known[1:])}."
            )
        return cls(**given)

    def configuration(self) -> dict[str, Any]:
        """What the reward's numbers depend on, as JSON."""
        ignored = ("batch_size", "model_kwargs")
        settings = {key: value for key, value in asdict(self).items() if key not in ignored}
        return {**settings, "fingerprint": fingerprint(self.source)}

    def load(self) -> Reward:
        """The reward. A model is loaded, without code from elsewhere; on the GPU if there is one.

        Raises:
            ValueError: no such function, a model without such an output, or a text that can't be made.
        """
        if self.is_model:
            try:
                return ModelReward(self)
            except OSError as error:
                raise ValueError(f"The reward model {self.source!r} can't be loaded: {error}") from error
        function = load_function(self.source)
        return _negated(function) if self.negate else function


class ModelReward:
    """A model that reads prompt and response as one text: its output at the label.

    Args:
        source ([`RewardSource`]): The model, its template and label.
    """

    reads_messages = True

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.source)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.chat_template = source.chat_template or self.tokenizer.chat_template
        if source.template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of the reward model {source.source!r} has no chat template. Give a `template` with "
                "{prompt} and {response}, as the model was trained with."
            )
        config = AutoConfig.from_pretrained(source.source)
        of_safe_rlhf = any(name.endswith("ForScore") for name in config.architectures or ())  # as `LlamaForScore`
        kind = ScoreModel if of_safe_rlhf else AutoModelForSequenceClassification
        self.model: Any = kind.from_pretrained(source.source, dtype=source.dtype, **source.model_kwargs).eval()
        if "device_map" not in source.model_kwargs and torch.cuda.is_available():
            self.model.to("cuda")
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        outputs = self.model.config.num_labels
        if not 0 <= source.label < outputs:
            raise ValueError(
                f"`label` is {source.label}, but the reward model {source.source!r} has {outputs} outputs."
            )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> list[float]:
        size, values = self.source.batch_size, []
        for start in range(0, len(responses), size):
            texts = self._encode(prompts[start : start + size], responses[start : start + size]).to(self.model.device)
            scores = self.model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits
            values += scores[:, self.source.label].float().tolist()
        return [-value for value in values] if self.source.negate else values

    def _encode(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> Any:
        limit = self.source.max_length or self.tokenizer.model_max_length
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if limit < 10**9:  # a tokenizer without a limit of its own has a huge number
            options |= {"truncation": True, "max_length": limit}
        self.tokenizer.padding_side = "right"
        template = self.source.template
        if template is None:
            chats = [as_messages(p, "user") + as_messages(r, "assistant") for p, r in zip(prompts, responses)]
            return self.tokenizer.apply_chat_template(chats, return_dict=True, **options)
        if "{prompt}" in template:
            texts = [fill(template, prompt=p, response=r) for p, r in zip(prompts, responses)]
        else:
            texts = [fill(template, response=r) for r in responses]
        return self.tokenizer(texts, **options)


def load_function(path: str) -> Callable:
    """A function by its import path `module:function`; modules of the working directory are found too.

    Raises:
        ValueError: no such module, or nothing callable in it.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no function {path!r}: {error}. Give it as module:function.") from None
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, but a reward must be a function.")
    return found


def _negated(function: Callable) -> Reward:
    @functools.wraps(function)  # and so what it reads
    def cost(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [-value for value in function(prompts, responses)]

    return cost
