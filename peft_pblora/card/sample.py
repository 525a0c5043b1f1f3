# SPDX-License-Identifier: Apache-2.0
"""The sample in a card: one prompt, answered by the base model at a few preferences while its adapter is saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from peft_pblora.control import use_preference
from peft_pblora.kv_cache import cache_argument
from peft_pblora.preference import name_preference
from peft_pblora.switch import AdapterSwitch


PROMPT = "What do you think about a rainy Monday?"
NEW_TOKENS = 32
SECONDS = 30.0
"""After so long the answers end where they are: a model may be too large for the machine that saves it."""
LEAST_TOKENS = 8
"""Shorter answers for want of time are none."""


def make_sample(tuner: Any, adapter_name: str, prompt: str, folder: Path) -> dict[str, Any]:
    """The facts `sample` of a card. Whatever goes wrong, saving goes on, and the card says what it was.

    Args:
        tuner (`PreferenceTuner`): The tuner of the model that is saved.
        adapter_name (`str`): Its adapter.
        prompt (`str`): The prompt.
        folder (`Path`): Where it is saved; the tokenizer is looked for here, then at the base model.

    Returns:
        `dict` with `prompt`, `beta`, `chat`, whether a chat template was used, and either `answers`, pairs of a
        preference's name and an answer, or `missing`, the reason for which there are none.
    """
    found: dict[str, Any] = {"prompt": prompt, "beta": 1.0}
    try:
        config = tuner.peft_config[adapter_name]
        _check(config, AdapterSwitch.of(tuner.model))
        tokenizer = _tokenizer(config, folder)
        found["chat"] = tokenizer.chat_template is not None
        preferences = sample_preferences(config.objectives)
        with _in_evaluation(tuner.model), torch.no_grad():
            answers = guided_answers(tuner.model, adapter_name, tokenizer, prompt, preferences)
        names = ["(the base model alone)", *(name_preference(row, config.objectives) for row in preferences)]
        return {**found, "answers": [list(pair) for pair in zip(names, answers, strict=True)]}
    except Exception as error:  # a card is never worth a lost adapter
        return {**found, "missing": " ".join(str(error).split())[:300] or type(error).__name__}


def sample_preferences(objectives: list[str]) -> torch.Tensor:
    """Three preferences, of shape `(3, k)`: the first objective alone, all alike, the last one alone; or `(1, 1)`."""
    corners = torch.eye(len(objectives))
    return corners if len(objectives) == 1 else torch.stack([corners[0], corners.mean(0), corners[-1]])


def guided_answers(
    model: Any,
    adapter_name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    preferences: torch.Tensor,
    beta: float = 1.0,
    max_new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy answers of π_base alone, and of π_base · π_ARM(α)^(1/β) at each preference (arXiv 2505.06274, eq. 5).

    The plain form of what `trl_parm.PARMLogitsProcessor` does, for models whose adapter lies on the base itself.

    Args:
        model (`PreTrainedModel`): With the adapter in it.
        adapter_name (`str`): The adapter.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompt (`str`): The prompt, put into the chat template if there is one.
        preferences (`torch.Tensor` of shape `(n, k)`): α of each answer.
        beta (`float`, *optional*, defaults to 1.0): β; guidance has strength 1/β.
        max_new_tokens (`int`, *optional*, defaults to 32): Most tokens of an answer.

    Returns:
        `list[str]` of n + 1 answers, the base model's own first; an ellipsis marks one that did not end, for want of
        tokens or after half a minute.

    Raises:
        TimeoutError: there are less than eight tokens after half a minute.
    """
    device, deadline = model.get_input_embeddings().weight.device, time.monotonic() + SECONDS
    switch, ends = AdapterSwitch.of(model), torch.tensor(_end_tokens(model, tokenizer), device=device)
    tokens = _encode(tokenizer, prompt).to(device).repeat(len(preferences) + 1, 1)
    start, read = tokens.shape[1], 0
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    while tokens.shape[1] < start + max_new_tokens and not ended.all():
        new, read = tokens[:, read:], tokens.shape[1]
        with switch.only([]):
            scores = _log_probs(model, new, caches[0])
        with switch.only([adapter_name]), use_preference(model, preferences, adapter_name):
            scores[1:] += _log_probs(model, new[1:], caches[1]) / beta
        chosen = scores.argmax(-1).masked_fill(ended, int(ends[0]))
        ended |= torch.isin(chosen, ends)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if time.monotonic() > deadline:
            if tokens.shape[1] < start + LEAST_TOKENS:
                raise TimeoutError(f"it took longer than {SECONDS:.0f} seconds")
            break
    answers = cast(list[str], tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True))
    return [answer.strip() + ("" if end else " …") for answer, end in zip(answers, ended.tolist(), strict=True)]


def _log_probs(model: Any, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    output = model(input_ids=tokens, use_cache=True, **cache_argument(model, cache))
    return output.logits[:, -1].float().log_softmax(-1)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    if tokenizer.chat_template is None:
        return cast(torch.Tensor, tokenizer(prompt, return_tensors="pt")["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    found: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return found["input_ids"]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    found = [token for token in [*own, tokenizer.eos_token_id] if token is not None]
    if not found:
        raise ValueError("the tokenizer has no end token")
    return found


def _check(config: Any, switch: AdapterSwitch) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # A forward of one process alone would wait for the others forever.
        raise ValueError("it was saved by one of several processes; save it again in a single one")
    if config.task_type != "CAUSAL_LM":
        raise ValueError(f"the adapter's task is {config.task_type}, not CAUSAL_LM")
    if switch.merged:  # a forward without adapters would take them out of the weights
        raise ValueError("an adapter is merged into the base model")


def _tokenizer(config: Any, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, or its base model's; nothing is asked of the net while saving."""
    beside = (folder / "tokenizer_config.json").exists()
    name = str(folder) if beside else config.base_model_name_or_path
    if not name:
        raise ValueError("the base model has no name, and so no tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, revision=None if beside else config.revision, local_files_only=True)
    except (OSError, ValueError, ImportError):
        raise ValueError("the base model's tokenizer is not on the machine that saved the adapter") from None


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
