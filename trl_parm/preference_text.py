# SPDX-License-Identifier: Apache-2.0
"""A preference as text at the start of a prompt: how it is written, put into tokens, and kept beside a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from peft_pblora import as_preference, sample_preferences
from peft_pblora.preference import Preference, check_objectives


FILE = "preference_text.json"
"""Beside a model: how the preferences are written that it was trained to read."""
PLACE = "{preference}"
DRAWN = 1000
"""So many preferences are written out to find how long their text gets."""


@dataclass(frozen=True)
class PreferenceText:
    """How α is written into prompts, for a model that is conditioned by what it reads instead of by its adapter.

    This is the rival of a preference-conditioned adapter: prompts that begin with the weights, as in RiC (arXiv
    2402.10207), DPA (arXiv 2402.18571) and MO-ODPO (arXiv 2503.00295), whose wordings are others. Weights are *rounded
    to two decimals*, each by itself, so that near preferences read the same, and a third reads 0.33. The text is
    tokenized on its own and stands before all tokens of the prompt but a beginning-of-text token.

    Args:
        objectives (`Sequence[str]`): Names of the k objectives, in the order of α.
        template (`str`, *optional*): A text with `{preference}` in it.

    Raises:
        ValueError: fewer than two objectives, or a template without `{preference}`.

    Example:

    ```python
    text = PreferenceText(["helpful", "harmless"])
    text.of([0.7, 0.3])  # "helpful: 0.70, harmless: 0.30\n"
    ```
    """

    objectives: Sequence[str]
    template: str = PLACE + "\n"

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", check_objectives(self.objectives))
        if len(self.objectives) < 2:
            raise ValueError(
                f"There is one objective, {self.objectives[0]!r}, whose weight is always 1. Writing preferences into "
                "prompts takes two objectives or more."
            )
        check_template(self.template)

    def of(self, preference: Preference, allow_off_simplex: bool = False) -> str:
        """The text of α, of shape `(k,)`. Raises `ValueError` for an invalid one, or one for each row."""
        return self._texts(preference, 1, allow_off_simplex)[0]

    def insert(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        preference: Preference,
        allow_off_simplex: bool = False,
    ) -> list[list[int]]:
        """Prompts, as token ids, with α at their start: α of shape `(k,)`, or `(rows, k)` with one for each prompt."""
        texts = self.ids(tokenizer, preference, len(prompts), allow_off_simplex)
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            start = int(len(prompt) > 0 and prompt[0] == tokenizer.bos_token_id)
            found.append([*prompt[:start], *text, *prompt[start:]])
        return found

    def ids(
        self, tokenizer: PreTrainedTokenizerBase, preference: Preference, rows: int, allow_off_simplex: bool = False
    ) -> list[list[int]]:
        """The tokens of α's text for each of so many rows.

        Raises:
            ValueError: an invalid preference, or preferences of another number of rows.
        """
        texts = self._texts(preference, rows, allow_off_simplex)
        of_text = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in dict.fromkeys(texts)}
        return [cast(list[int], of_text[text]) for text in texts]

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens α's text has at most, by the vertices and 1000 preferences that are drawn."""
        k = len(self.objectives)
        drawn = sample_preferences(DRAWN, self.objectives, 0.5, torch.Generator().manual_seed(0))
        return max(map(len, self.ids(tokenizer, torch.cat([torch.eye(k), drawn]), k + DRAWN)))

    def save(self, folder: str | Path) -> None:
        """Writes `preference_text.json` into a folder."""
        content = {**asdict(self), "objectives": list(self.objectives)}
        Path(folder, FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, name: str | Path) -> PreferenceText:
        """What a model was trained to read, by its folder or id on the Hub.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        try:
            path = cast(str, cached_file(str(name), FILE))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no {FILE} at {str(name)!r}, so it is not known how it reads preferences. Train it with "
                "`preference_template`, or use a preference-conditioned adapter with `parm`."
            ) from error
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["objectives"], content["template"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The file {path} does not say how preferences are written: {error}") from error

    def _texts(self, preference: Preference, rows: int, allow_off_simplex: bool) -> list[str]:
        weights = as_preference(preference, self.objectives, allow_off_simplex=allow_off_simplex)
        if weights.ndim == 2 and len(weights) != rows:
            raise ValueError(
                f"`preference` has {len(weights)} rows, but there are {rows} prompts. Give one preference, or one for "
                "each prompt."
            )
        texts = [self.template.replace(PLACE, self._line(row)) for row in torch.atleast_2d(weights).tolist()]
        return texts * rows if weights.ndim == 1 else texts

    def _line(self, weights: Sequence[float]) -> str:
        pairs = zip(self.objectives, weights, strict=True)
        return ", ".join(f"{name}: {round(weight, 2) + 0.0:.2f}" for name, weight in pairs)  # 0.0: no "-0.00"


def check_template(template: Any) -> None:
    """Raises `ValueError` for what is no text with a place for the preference."""
    if not isinstance(template, str) or PLACE not in template:
        raise ValueError(
            f"`preference_template` is {template!r}, but it must be a text with {PLACE} in it, where the weights go."
        )
