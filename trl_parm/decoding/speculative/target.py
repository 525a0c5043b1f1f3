# SPDX-License-Identifier: Apache-2.0
"""The distribution of the next token as `generate` would leave it, and how drafted tokens are judged by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import logits_process as known

from trl_parm.algebra import BASE, Scorer, Step, guided_logits, sum_of

from ..model import Guided
from ..processor import GuidedLogitsProcessor
from ..terms import LM
from .sampling import verify
from .texts import Reader, Texts


if TYPE_CHECKING:
    from .drafts import StandIn


Answers = dict[LM, torch.Tensor]
"""log π of language models in the base model's vocabulary."""

ANY_COLUMNS = (known.TemperatureLogitsWarper, known.TopKLogitsWarper, known.TopPLogitsWarper, known.MinPLogitsWarper)
"""The usual processors that don't look at the columns in which tokens stand."""


class Target:
    """What the base model, its guides and the settings of `generate` make of the next token.

    Attributes:
        guides (`list[LM]`): All guides.
        apart (`list[LM]`): Those that are not read with the base model, in one forward.
        own (`tuple`, *optional*): The guides' own prompts, ids and mask; those of a processor if it has any.
        vocab (`int`): Size of the base model's vocabulary, known after the first round.
    """

    def __init__(
        self, model: Any, processors: Sequence[Any], do_sample: bool, own: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        self.do_sample, self.own, self.vocab = do_sample, own, 0
        self._steps: list[Any] = [model.formula] if isinstance(model, Guided) else []
        for processor in processors:
            guides = isinstance(processor, GuidedLogitsProcessor)
            self._steps.append(processor.formula if guides else processor)
            if guides and processor.prompt is not None:
                self.own = processor.prompt.own
        formulas = [step for step in self._steps if isinstance(step, Scorer)]
        scorers = dict.fromkeys(scorer for formula in formulas for scorer in formula.scorers())
        others = [scorer for scorer in scorers if scorer != BASE and not isinstance(scorer, LM)]
        if others:
            raise ValueError(
                f"SpeculativeDecoding takes guides that are language models, but got {others[0]!r}, which would have "
                "to be asked for every drafted token. Leave `custom_generate` out."
            )
        guided = model if isinstance(model, Guided) else Guided(model, sum_of((1.0, formula) for formula in formulas))
        self.base = guided.own_term()
        self.guides = [scorer for scorer in scorers if isinstance(scorer, LM)]
        self.apart = [term for term in self.guides if self.own is not None or term.backbone is not self.base.backbone]
        self._with_base = Reader([self.base, *(term for term in self.guides if term not in self.apart)])
        self._others = Reader(self.apart, self.own)

    def distribution(self, texts: Texts, scores: torch.Tensor, answers: Answers | None) -> torch.Tensor:
        """The distribution after each text, `(rows, vocab)`; all on one token in greedy decoding.

        It follows from the base model's logits or log-probabilities and log π of all guides, of the same shape;
        without `answers` guides are left out.
        """
        scores = scores.float()
        for step in self._steps:
            if not isinstance(step, Scorer):
                scores = _processed(step, texts, scores)
            elif answers is not None:
                scores = guided_logits(step, Step(scores, answers))
        if self.do_sample:
            return torch.softmax(scores, -1)
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)

    def choose(self, distribution: torch.Tensor) -> torch.Tensor:
        """A token of each distribution, `(rows, 1)`."""
        return torch.multinomial(distribution, 1) if self.do_sample else distribution.argmax(-1, keepdim=True)

    def log_probs(self, read: dict[LM, torch.Tensor]) -> Answers:
        """What models say, from the logits that were read of them."""
        return {term: term.log_probs(logits, self.vocab) for term, logits in read.items()}

    def judge(
        self, texts: Texts, tokens: torch.Tensor, q: torch.Tensor | None, draft: StandIn | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each row writes, `(rows, drafted + 1)`, and how many of these tokens, `(rows,)`.

        They are the drafted tokens, `(rows, drafted)`, as far as they are accepted, and one more. `q` of shape
        `(rows, drafted, vocab)` is what they were drawn from.
        """
        count = tokens.shape[1]
        longer = texts.extended(tokens)
        read = self._with_base.read(longer, count + 1)
        scores = read[self.base]
        self.vocab = scores.shape[-1]
        asked = draft if q is not None and draft is not None and draft.asks_guides else None
        if asked is None:
            read |= self._others.read(longer, count + 1)
        found = self.log_probs({term: logits for term, logits in read.items() if term in self.guides})

        def target(i: int) -> torch.Tensor:
            """The distribution after the first i drafted tokens."""
            answers = {term: values[:, i] for term, values in found.items()}
            if asked is not None:
                answers |= asked.answers[i] if i < count else asked.ask(longer)
            return self.distribution(texts.extended(tokens[:, :i]), scores[:, i], answers)

        if q is None:
            counts, left = torch.zeros_like(texts.lengths), target(0)
        else:
            p = torch.stack([target(i) for i in range(count)], 1)
            if draft is not None:
                draft.learn(texts, p[:, 0])
            counts, left = verify(p, q, tokens, torch.rand(tokens.shape, device=tokens.device))
            whole = counts == count
            if bool(whole.any()):
                left = torch.where(whole[:, None], target(count), left)
        last = self.choose(left)
        return torch.cat([tokens, last], 1).scatter(1, counts[:, None], last), counts + 1


def _processed(processor: Any, texts: Texts, scores: torch.Tensor) -> torch.Tensor:
    """Scores as a processor leaves them, which takes the rows' last tokens to stand in one column."""
    lengths = texts.lengths.unique().tolist()
    if isinstance(processor, ANY_COLUMNS) or len(lengths) == 1:
        return processor(texts.ending_together(lengths[-1]), scores)
    processed = torch.empty_like(scores)
    for length in lengths:
        rows = texts.lengths == length
        processed[rows] = processor(texts.ending_together(length), scores.clone())[rows]
    return processed
