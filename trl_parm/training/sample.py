# SPDX-License-Identifier: Apache-2.0
"""The sample in a card: one prompt, answered by the base model alone and guided at a few preferences."""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from peft import PeftModel
from torch import distributed
from transformers import PreTrainedTokenizerBase
from trl.data_utils import _tokenize

from peft_pblora import name_preference, use_preference
from peft_pblora.switch import AdapterSwitch, check_below

from .model import in_evaluation


NEW_TOKENS = 32
SECONDS = 30.0
"""After so long the answers end where they are: a model may be too large for the machine that saves it."""
LEAST_TOKENS = 8
"""Shorter answers for want of time are none."""


def make_sample(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Any]:
    """The fact `sample` of a card, see [`peft_pblora.card.CardFacts`], from a preference-conditioned adapter.

    Whatever goes wrong, saving goes on, and the card says what it was.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    found: dict[str, Any] = {"prompt": prompt, "beta": 1.0, "chat": chat}
    try:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # A forward of one process alone would wait for the others forever.
            raise ValueError("it was saved by one of several processes; save it again in a single one")
        if AdapterSwitch.of(model).merged:  # a forward without adapters would take them out of the weights
            raise ValueError("an adapter is merged into the base model")
        check_below(model)
        objectives = cast(Any, model.active_peft_config).objectives
        corners = torch.eye(len(objectives))
        middle = corners.mean(0, keepdim=True) if len(objectives) > 1 else corners[1:]
        preferences = torch.cat([corners[:1], middle, corners[1:]])
        with in_evaluation(model), torch.no_grad():
            answers = guided_answers(model, tokenizer, prompt, preferences)
        names = ["(the base model alone)", *(name_preference(row, objectives) for row in preferences)]
        return {**found, "answers": [list(pair) for pair in zip(names, answers, strict=True)]}
    except Exception as error:  # a card is never worth a lost adapter
        return {**found, "missing": " ".join(str(error).split())[:300] or type(error).__name__}


def guided_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    preferences: torch.Tensor,
    beta: float = 1.0,
    max_new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy answers of π_base alone, and of π_base · π_ARM(α)^(1/β) at each preference (arXiv 2505.06274, eq. 5).

    The plain form of what `trl_parm.PARMLogitsProcessor` does, for an adapter on the base itself and a short prompt.
    An ellipsis marks an answer that did not end, for want of tokens or after `SECONDS`.

    Args:
        preferences (`torch.Tensor` of shape `(n, k)`): α of each answer but the first.

    Raises:
        TimeoutError: there are less than `LEAST_TOKENS` by then.
    """
    base: Any = model.get_base_model()
    text = prompt if tokenizer.chat_template is None else [{"role": "user", "content": prompt}]
    ids = _tokenize(tokenizer, text, add_generation_prompt=True)["input_ids"]
    tokens = torch.tensor([ids] * (len(preferences) + 1), device=base.get_input_embeddings().weight.device)
    ends = base.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    ends = [token for token in ends if token is not None]
    if not ends:
        raise ValueError("the tokenizer has no end token")
    switch, name, start = AdapterSwitch.of(base), cast(str, model.active_adapter), time.monotonic()

    def guide(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guides all rows but the first, reading the whole text anew at every token."""
        with switch.only([name]), use_preference(model, preferences, name):
            logits = base(input_ids=input_ids[1:], use_cache=False).logits[:, -1]
        scores = scores.float().log_softmax(-1)
        scores[1:] += logits.float().log_softmax(-1) / beta
        return scores

    with switch.only([]):
        output = base.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            logits_processor=[guide],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            max_time=SECONDS,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    new = output[:, tokens.shape[1] :]
    ended = torch.isin(new, torch.tensor(ends, device=new.device)).any(1).tolist()
    if time.monotonic() - start > SECONDS and new.shape[1] < LEAST_TOKENS and not all(ended):
        raise TimeoutError(f"it took longer than {SECONDS:.0f} seconds")
    answers = cast(list[str], tokenizer.batch_decode(new, skip_special_tokens=True))
    return [answer.strip() + ("" if end else " …") for answer, end in zip(answers, ended, strict=True)]
