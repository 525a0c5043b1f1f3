# SPDX-License-Identifier: Apache-2.0
"""What a reward model thinks of each token of a text, to look at (as figure 3 of GenARM, arXiv 2410.08193)."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import Preference
from trl_parm.shapes import read_response, read_text
from trl_parm.templates import tokenize_chat, tokenize_response, tokenize_text
from trl_parm.texts import PromptText

from .incoming import New
from .reading import parts_of
from .terms import LM, check_evaluates, untuned


@dataclass(frozen=True)
class TokenReward:
    """One token of a response.

    Attributes:
        text (`str`): What the token adds to the text; empty for a part of a character.
        token_id (`int`): Its id.
        reward (`float`): log π_ARM(y_t | x, y_<t), at most 0.
        log_ratio (`float`): log π_ARM − log π_ref: what training, or the preference, made of it.
    """

    text: str
    token_id: int
    reward: float
    log_ratio: float


class TokenRewards(Sequence[TokenReward]):
    """The tokens of a response with their rewards. A notebook shows it coloured.

    Args:
        tokens (`Sequence[TokenReward]`): The tokens.
    """

    def __init__(self, tokens: Sequence[TokenReward]) -> None:
        self._tokens = list(tokens)

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[index]

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def total(self) -> TokenReward:
        """The whole response as one: texts joined, rewards and log-ratios summed."""
        text, ratio = "".join(t.text for t in self._tokens), sum(t.log_ratio for t in self._tokens)
        return TokenReward(text, -1, sum(t.reward for t in self._tokens), ratio)

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each token, for a table or JSON."""
        return [asdict(token) for token in self._tokens]

    def to_html(self, scale: float | None = None) -> str:
        """HTML without scripts: the log-ratio as background, blue above 0 and red below, numbers on hovering.

        Args:
            scale (`float`, *optional*): The log-ratio of full colour; the largest in the text if not given.
        """
        spans = []
        for token, (r, g, b) in self._coloured(scale):
            title = f"log-ratio {token.log_ratio:+.3f}, reward {token.reward:.3f}"
            style = f"background-color: rgb({r},{g},{b}); color: #000"
            text = html.escape(token.text).replace("\n", "↵\n") or "&#8203;"
            spans.append(f'<span style="{style}" title="{title}">{text}</span>')
        return f'<div style="white-space: pre-wrap; line-height: 1.6">{"".join(spans)}</div>'

    def to_terminal(self, scale: float | None = None) -> str:
        """The text with ANSI background colours, as [`to_html`]."""
        return "".join(
            f"\x1b[48;2;{r};{g};{b}m\x1b[30m{token.text}\x1b[0m" for token, (r, g, b) in self._coloured(scale)
        )

    def _coloured(self, scale: float | None) -> Iterator[tuple[TokenReward, tuple[int, int, int]]]:
        if scale is not None and not scale > 0:
            raise ValueError(f"`scale` is {scale}, but it must be positive.")
        full = scale or max((abs(token.log_ratio) for token in self._tokens), default=0.0) or 1.0
        for token in self._tokens:
            strength = min(1.0, abs(token.log_ratio) / full)
            target = (90, 150, 255) if token.log_ratio > 0 else (255, 110, 100)
            r, g, b = (round(255 + strength * (end - 255)) for end in target)
            yield token, (r, g, b)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return f"TokenRewards({self.total.text!r}, log-ratio {self.total.log_ratio:+.3f})"


def token_rewards(
    arm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptText | list[int],
    response: PromptText | list[int],
    preference: Preference | None = None,
    reference: PreTrainedModel | Preference | None = None,
    adapter_name: str | None = None,
) -> TokenRewards:
    """The token rewards log π_ARM(y_t | x, y_<t) of a response, and their ratio to a reference.

    Args:
        arm (`PreTrainedModel` or `PeftModel`): The reward model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompt (`str`, `list[dict]` or `list[int]`): A text, read as it is, messages for the chat template, or ids.
        response (`str`, `list[dict]` or `list[int]`):
            What to judge: a text, also as a message, whose tokens are those that it has after the prompt; or the ids
            that were decoded.
        preference (`Preference`, *optional*): α of shape `(k,)`; the one set in the ARM if not given.
        reference (`PreTrainedModel` or `Preference`, *optional*):
            What to compare with: another model, or the same one at another preference; without its adapter if not
            given, that is before it was trained.
        adapter_name (`str`, *optional*): Which of the ARM's adapters to use; the active ones if not given.

    Returns:
        [`TokenRewards`]: One entry for each token of the response.

    Raises:
        ValueError: an empty prompt or response, one that is neither text nor messages, several messages or calls of
            tools as a response, or no reference for an ARM without adapter.

    Example:

    ```python
    rewards = token_rewards(arm, tokenizer, "How do I pick a lock?", "Call a locksmith.", {"harmless": 1.0, ...})
    print(rewards.to_terminal())
    ```
    """
    if _are_ids(prompt):
        prompt_ids = cast(list[int], prompt)
    elif isinstance(prompt := read_text(prompt, "`prompt`"), str):
        prompt_ids = tokenize_text(tokenizer, prompt)
    else:
        prompt_ids = tokenize_chat(tokenizer, prompt, "`prompt`", add_generation_prompt=True)
    if _are_ids(response):
        response_ids = cast(list[int], response)
    else:
        response_ids = tokenize_response(tokenizer, prompt_ids, read_response(response, "`response`"))
    if not prompt_ids or not response_ids:
        raise ValueError("`prompt` and `response` must have at least one token each.")
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    guide = LM(arm, preference, adapter_name)
    if isinstance(reference, torch.nn.Module):
        other = untuned(reference)
    elif reference is not None:
        other = LM(arm, reference, adapter_name)
    elif guide.adapter_names:
        other = LM(arm, adapter_name=adapter_name, disable_adapter=True)
    else:
        raise ValueError("The ARM has no adapter to compare it without. Pass `reference`, such as the model before.")
    found = _of_tokens([guide, other], ids, len(response_ids))
    rewards, ratios = found[guide].tolist(), (found[guide] - found[other]).tolist()
    pieces = _pieces(tokenizer, response_ids)
    return TokenRewards([TokenReward(*one) for one in zip(pieces, response_ids, rewards, ratios, strict=True)])


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)


@torch.no_grad()
def _of_tokens(terms: list[LM], ids: torch.Tensor, last: int) -> dict[LM, torch.Tensor]:
    """log π of each of the last tokens of one text given those before it, for every term, `(last,)` on the CPU."""
    for term in terms:
        check_evaluates(term.model)
    found: dict[LM, torch.Tensor] = {}
    for part in parts_of(None, list(dict.fromkeys(terms)), False, lambda term, copies: None):
        for term, logits in part.read(New(ids[:, :-1]), {}, last)[0].items():
            log_probs = torch.log_softmax(logits[0].float(), -1).cpu()
            found[term] = log_probs.gather(1, ids[0, -last:, None])[:, 0]
    return found


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; the last part of a character of several tokens has all of it."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = cast(str, tokenizer.decode(ids[:end]))
        if text.endswith("�") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces
