# SPDX-License-Identifier: Apache-2.0
"""Rewards by name: Python functions, sequence classifiers, and the score models of Safe-RLHF without their package."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.utils import logging

from .identity import known_by
from .judges import SOURCE as JUDGE
from .judges import Judge
from .loading import load_whole
from .records import plain, recorded
from .rewards import Reward, check_installed, score
from .sources import describe_function
from .templates import in_form
from .texts import PromptText, as_messages, fill


logger = logging.get_logger(__name__)

NORMALIZED = {"reward": "affine", "cost": "scale", "critic": "identity"}
"""What the kinds of score models do to a score where their configuration says `do_normalize`."""
NEUTRAL = {"mean": 0.0, "var": 1.0}
OF_MODELS = ("template", "chat_template", "label", "max_length", "dtype", "model_kwargs")
"""Settings of a reward that a function has no use for."""


@dataclass
class RewardSource:
    """Where a reward comes from, as a YAML file says it: a mapping, or just its `source`. It is that [`Reward`] too.

    Args:
        source (`str`): `module:function` for a function of prompts and responses, else a folder or an id on the Hub
            with a sequence classifier or a score model of Safe-RLHF.
        template (`str`, *optional*): The text that a model reads, with `{response}` and, unless it judges responses
            alone, `{prompt}`; the chat template of its tokenizer if not given.
        chat_template (`str`, *optional*): A template in Jinja in the place of its tokenizer's, for conversations of
            several messages.
        label (`int`, *optional*, defaults to 0): Which of a model's outputs is the reward.
        negate (`bool`, *optional*, defaults to `False`): Whether it is a cost: the reward is minus the output.
        batch_size (`int`, *optional*, defaults to 8): Texts that a model reads at once.
        max_length (`int`, *optional*): Most tokens; a longer text is cut where the tokenizer cuts. The tokenizer's
            own limit if not given.
        dtype (`str`, *optional*, defaults to `"auto"`): Of a model's weights; as they were saved if not given.
        model_kwargs (`dict`, *optional*): Further arguments of `from_pretrained`, such as `device_map`.

    Raises:
        ValueError: no source, a template without `{response}`, two templates, or settings of models for a function.
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
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (one.default, {})]
        unread = [] if self.is_model else [name for name in OF_MODELS if name in given]
        if unread:
            raise ValueError(
                f"The reward {self.source!r} is a function, which gets prompts and responses as they are, but has "
                f"{', '.join(unread)}, which only models have. Leave that out."
            )

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
        if given.get("source") == JUDGE:
            raise ValueError(
                "A judge (`source: openai`) scores whole responses: of `evaluate`, `relabel` and `rescore`."
            )
        known = [f.name for f in fields(cls)]
        if "source" not in given or not set(given) <= set(known):
            raise ValueError(
                f"A reward is given as {dict(given)}, but it needs `source`, and may have {', '.join(known[1:])}."
            )
        return cls(**given)

    def configuration(self) -> dict[str, Any]:
        """What the reward's numbers depend on, as JSON."""
        settings = {key: value for key, value in asdict(self).items() if key not in ("batch_size", "model_kwargs")}
        settings |= plain(recorded(self.model_kwargs))
        if not self.is_model:
            return {**settings, **describe_function(load_function(self.source))}
        return {**settings, "fingerprint": known_by(self.source)}

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
        return _negated(function, self.source) if self.negate else function


class ModelReward:
    """A model that reads prompt and response as one text: its output at the label. For a text without tokens it reads
    the one that begins or ends texts."""

    reads_messages = is_model = True

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.source)
        self.tokenizer.truncation_side = "left"  # of a text that is too long the response is what must stay
        self.limit = source.max_length or self.tokenizer.model_max_length
        self.tokenizer.chat_template = source.chat_template or self.tokenizer.chat_template
        if source.template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of the reward model {source.source!r} has no chat template. Give a `template` with "
                "{prompt} and {response}, as the model was trained with."
            )
        config = AutoConfig.from_pretrained(source.source)
        of_safe_rlhf = any(name.endswith("ForScore") for name in config.architectures or ())  # as `LlamaForScore`
        kind = ScoreModel if of_safe_rlhf else AutoModelForSequenceClassification
        settings = {"config": config, "dtype": source.dtype, **source.model_kwargs}
        self.model: Any = load_whole(kind.from_pretrained, source.source, **settings).eval()
        if "device_map" not in source.model_kwargs and torch.cuda.is_available():
            self.model.to("cuda")
        own = self._config.pad_token_id
        self._own_pad = own is not None and 0 <= own < self._config.vocab_size
        self._set_pad({cast("int | None", self.tokenizer.eos_token_id)})
        outputs = self.model.config.num_labels
        if not 0 <= source.label < outputs:
            raise ValueError(
                f"`label` is {source.label}, but the reward model {source.source!r} has {outputs} outputs."
            )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> list[float]:
        size, values = self.source.batch_size, []
        for start in range(0, len(responses), size):
            texts = self._encode(prompts[start : start + size], responses[start : start + size])
            if max(map(len, texts)) >= self.limit:
                logger.warning_once(
                    f"Texts for the reward model {self.source.source!r} reach {self.limit} tokens, and longer ones "
                    "are cut on the left, the prompt first. `max_length` allows more, where the model does."
                )
            self._set_pad({text[-1] for text in texts if text})
            rows = [torch.tensor(text, dtype=torch.long, device=self.model.device) for text in texts]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._config.pad_token_id)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            scores = self.model(input_ids=ids, attention_mask=mask).logits
            values += scores[:, self.source.label].float().tolist()
        return [-value for value in values] if self.source.negate else values

    @property
    def _config(self) -> Any:
        """Of the transformer, which has the pad token."""
        return self.model.config.get_text_config()

    def _set_pad(self, ends: set[int | None]) -> None:
        """Has a model that knows no pad token take one that is none of the `ends`: a classifier reads the last token
        that is no padding, as it reads the last one of a text by itself."""
        if not self._own_pad:
            self._config.pad_token_id = next(i for i in reversed(range(self._config.vocab_size)) if i not in ends)

    def _encode(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        options: dict[str, Any] = {}
        if self.limit < 10**9:  # a tokenizer without a limit of its own has a huge number
            options |= {"truncation": True, "max_length": self.limit}
        template = self.source.template
        if template is None:
            chats = [
                in_form(self.tokenizer, as_messages(p, "user") + as_messages(r, "assistant"))
                for p, r in zip(prompts, responses)
            ]
            found = self.tokenizer.apply_chat_template(chats, return_dict=True, **options)
            return self._with_a_token(cast(Any, found)["input_ids"])
        if "{prompt}" in template:
            texts = [fill(template, prompt=p, response=r) for p, r in zip(prompts, responses)]
        else:
            texts = [fill(template, response=r) for r in responses]
        return self._with_a_token(cast(Any, self.tokenizer(texts, **options))["input_ids"])

    def _with_a_token(self, texts: list[list[int]]) -> list[list[int]]:
        """As padding alone a text would have the score of whatever token pads it. Raises `ValueError` for a tokenizer
        without a token that begins or ends texts."""
        tokenizer = self.tokenizer
        ends = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        alone = [[cast(int, end)] for end in ends if end is not None][:1]
        if not all(texts) and not alone:
            raise ValueError(
                f"The reward model {self.source.source!r} got a text without any token, such as an empty response, "
                "and its tokenizer has none that begins or ends texts. Give a `template` with words beside {response}."
            )
        return [text or alone[0] for text in texts]


class ScoreModel(PreTrainedModel):
    """A score model of Safe-RLHF (arXiv 2310.12773): a transformer with a linear `score_head` at the last token.

        score = W h_last + b;  with `do_normalize`: (score − mean) / std for rewards, score / std for costs

    Their checkpoints hold the transformer as a causal language model's would, `score_head.weight` and perhaps
    `score_head.bias`, and perhaps running moments `normalizer.mean` and `normalizer.var`; their configuration has the
    keys `score_dim`, `score_type` and `do_normalize`. Beaver's reward is higher for better texts, its cost for worse.
    """

    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"normalizer"}
    _keys_to_ignore_on_load_missing = [r"score_head\.bias", r"normalizer\."]
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.", r"normalizer\.count"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        backbone: Any = AutoModel.from_config(config)
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        config.num_labels = getattr(config, "score_dim", 1)
        self.score_head = nn.Linear(config.get_text_config().hidden_size, config.num_labels)
        moments = {name: torch.zeros(config.num_labels) for name in NEUTRAL}
        self.normalizer = nn.ParameterDict({name: nn.Parameter(value, False) for name, value in moments.items()})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks: no bias, and the moments that the configuration has."""
        super()._init_weights(module)
        for name, neutral in NEUTRAL.items() if module is self.normalizer else ():
            given = getattr(self.config, name, None)
            init.copy_(self.normalizer[name], torch.tensor(neutral if given is None else given))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Scores of shape `(rows, scores)`, as `logits` of the answer, for texts padded on either side."""
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * places).argmax(-1).to(hidden.device)
        end = hidden[torch.arange(len(hidden), device=hidden.device), last]
        scores = self.score_head(end.to(self.score_head.weight)).float()
        kind = NORMALIZED[getattr(self.config, "score_type", "reward")]
        if getattr(self.config, "do_normalize", False) and kind != "identity":
            shift = self.normalizer["mean"].to(scores) if kind == "affine" else 0.0
            scores = (scores - shift) / (self.normalizer["var"].to(scores).sqrt() + 1e-8)
        return SimpleNamespace(logits=scores)


def reward_configuration(reward: Reward | None) -> dict[str, Any] | None:
    """What the numbers of any reward depend on, as JSON: of a [`RewardSource`], its model, a judge, or a function."""
    if isinstance(reward, ModelReward):
        reward = reward.source
    return reward.configuration() if isinstance(reward, RewardSource | Judge) else reward and describe_function(reward)


def load_function(path: str) -> Callable:
    """A function by its import path `module:function`; modules of the working directory are found too. Raises
    `ValueError` if there is no such module, or nothing callable in it, or another module of this name is imported, and
    `ImportError` if it needs an extra."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        own = Path(*module.split(".")).resolve()
        files = [file for file in (own / "__init__.py", own.with_suffix(".py")) if file.is_file()]
        taken = getattr(found, "__file__", None) or "built in"
        known = Path(taken).read_bytes() if Path(taken).is_file() else None
        if files and known != files[0].read_bytes():
            raise ImportError(f"{module} is {taken}, which hides {files[0]}. Rename that file")
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no function {path!r}: {error}. Give it as module:function.") from None
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, but a reward must be a function.")
    check_installed(found)
    return found


def _negated(function: Callable, name: str) -> Reward:
    @functools.wraps(function)  # and so what it reads
    def cost(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [-value for value in score(name, function, prompts, responses)]

    return cost
