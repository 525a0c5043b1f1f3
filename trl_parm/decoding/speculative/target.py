# SPDX-License-Identifier: Apache-2.0
"""The distribution of the next token as `generate` would leave it, what drafts tokens, and how they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.generation import logits_process as known
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from trl_parm.algebra import BASE, Scorer, Step, guided_logits, sum_of

from ..model import Guided
from ..processor import GuidedLogitsProcessor
from ..prompt import OwnPrompt
from ..terms import LM, language_models
from .sampling import acceptance, verify
from .texts import Reader, Texts


Answers = dict[LM, torch.Tensor]
"""log π of language models in the base model's vocabulary."""

ANY_COLUMNS = (known.TemperatureLogitsWarper, known.TopKLogitsWarper, known.TopPLogitsWarper, known.MinPLogitsWarper)
"""The usual processors that don't look at the columns in which tokens stand."""
SCALES = (1.0, 0.8, 1.25)
"""Factors of a stand-in's scale that are compared."""
NGRAM = 2
"""How many last tokens a prompt lookup has to find again, at most."""


class Target:
    """What the base model, its guides and the settings of `generate` make of the next token.

    Args:
        model (`PreTrainedModel` or [`Guided`]): The model that generates.
        processors (`Sequence`): The logits processors.
        do_sample (`bool`): Whether tokens are sampled.
        own (`tuple`, *optional*): The prompts that the model's guides read in the place of its own, ids and mask.
        ends (`torch.Tensor`): The tokens that end a text.

    Raises:
        ValueError: a scorer that is no language model, or formulas whose guides read different prompts of their own.

    Attributes:
        guides (`list[LM]`): All guides.
        apart (`list[LM]`): Those that are not read with the base model, in one forward.
        own (`tuple`, *optional*): The guides' own prompts, ids and mask, the same for all.
        vocab (`int`): Size of the base model's vocabulary, known after the first round.
    """

    def __init__(
        self, model: Any, processors: Sequence[Any], do_sample: bool, own: OwnPrompt | None, ends: torch.Tensor
    ) -> None:
        self.do_sample, self.vocab, self._ends = do_sample, 0, ends
        self._steps: list[Any] = [model.formula] if isinstance(model, Guided) else []
        owns = [own] if isinstance(model, Guided) else []
        for processor in processors:
            guides = isinstance(processor, GuidedLogitsProcessor)
            self._steps.append(processor.formula if guides else processor)
            if guides:
                terms = language_models(processor.formula)
                owns.append(None if processor.prompt is None else processor.prompt.own_of(terms))
        read = [own and [part.tolist() for part in own] for own in owns]
        if any(prompts != read[0] for prompts in read):
            raise ValueError(
                f"{len(owns)} formulas guide, and not all of them read the same prompts of their own. Give all of "
                "them the same, or leave `custom_generate` out."
            )
        self.own = owns[0] if owns else None
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
                scores = _processed(step, texts, scores, self._ends)
            elif answers is not None:
                scores = guided_logits(step, Step(scores, answers))
        if self.do_sample:
            return torch.softmax(scores, -1)
        return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)

    def room(self, texts: Texts) -> int | None:
        """As [`Reader.room`](speculative.texts.Reader.room), of all models."""
        rooms = [reader.room(texts) for reader in (self._with_base, self._others)]
        return min((room for room in rooms if room is not None), default=None)

    def choose(self, distribution: torch.Tensor) -> torch.Tensor:
        """A token of each distribution, `(rows, 1)`."""
        return torch.multinomial(distribution, 1) if self.do_sample else distribution.argmax(-1, keepdim=True)

    def log_probs(self, read: dict[LM, torch.Tensor]) -> Answers:
        """What models say, from the logits that were read of them."""
        device = self.base.backbone.device
        return {term: term.log_probs(logits, self.vocab).to(device) for term, logits in read.items()}

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

        def target(i: int, drafted: Texts) -> torch.Tensor:
            """The distribution after the first i drafted tokens, which are at the ends of the texts `drafted`."""
            answers = {term: values[:, i] for term, values in found.items()}
            if asked is not None:
                answers |= asked.answers[i] if i < count else asked.ask(longer)
            return self.distribution(drafted, scores[:, i], answers)

        if q is None:
            counts, left = torch.zeros_like(texts.lengths), target(0, texts)
        else:
            p, drafted, going = [], texts, torch.ones_like(texts.lengths, dtype=torch.bool)
            for i in range(count):
                p.append(target(i, drafted))
                going = going & (p[i].gather(1, tokens[:, i : i + 1])[:, 0] > 0)
                if not bool(going.any()):
                    break
                # No text has a token that is excluded, after which a processor may allow nothing.
                drafted = drafted.extended(tokens[:, i : i + 1], going.long())
            if draft is not None:
                draft.learn(texts, p[0])
            tried = tokens[:, : len(p)]
            noise = torch.rand(tried.shape, device=tokens.device)
            counts, left = verify(torch.stack(p, 1), q[:, : len(p)], tried, noise)
            whole = counts == count
            if bool(whole.any()):
                left = torch.where(whole[:, None], target(count, drafted), left)
        last = self.choose(left)
        return torch.cat([tokens, last], 1).scatter(1, counts[:, None], last), counts + 1


def _processed(processor: Any, texts: Texts, scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Scores as a processor leaves them, which is shown texts as `generate` shows them: of one length, each in its
    row, and none that has ended. Rows of other lengths show one of these texts; scores after an end stay as they are.
    """
    if type(processor) in ANY_COLUMNS:
        return processor(texts.prompt, scores)
    ids, mask = texts.padded()
    columns = texts.prompt.shape[1]
    going = ~(torch.isin(ids, ends) & (mask != 0))[:, columns:].any(1)
    processed = scores.clone()
    for length in texts.lengths[going].unique().tolist():
        rows = going & (texts.lengths == length)
        shown = ids[:, : columns + length]
        if isinstance(processor, known.PrefixConstrainedLogitsProcessor):
            for row in rows.nonzero()[:, 0].tolist():
                one = slice(row, row + 1)
                processed[one] = _of_row(processor, row)(shown[one], scores[one])
            continue
        shown = torch.where(rows[:, None], shown, shown[rows][:1])
        processed[rows] = processor(shown, scores.clone())[rows]
    return processed


def _of_row(processor: Any, row: int) -> Any:
    """The constraint of one row of the batch, which may allow nothing after the text of another."""
    allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams
    return known.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(prompt, ids), 1)


class StandIn:
    """Drafts from the guided distribution in which another scorer stands for the base model.

    With the ARM's own backbone as the stand-in, the ratio of target and draft is that of base and backbone, up to
    normalisation, so that strong guidance lowers no acceptance. With the ARM itself, PARM's draft is the sharpened
    π_ARM^(scale + 1/β). The scale of the stand-in follows what would have been accepted.

    Args:
        scorer ([`Scorer`]): Stands for the base model.
        target ([`Target`]): The guided distribution.

    Attributes:
        asks_guides (`bool`): Whether it asks all guides before each token.
        answers (`list[Answers]`): What was said before each token that was proposed last.
    """

    def __init__(self, scorer: Scorer, target: Target) -> None:
        self.scorer, self.target, self.scale = scorer, target, 1.0
        # Guides that have the base model's weights are too dear to draft with, so drafts are made without any.
        self.asks_guides = len(target.apart) == len(target.guides)
        models = [one for one in scorer.scorers() if isinstance(one, LM)]
        self._reader = Reader([*models, *(target.guides if self.asks_guides else [])], target.own)
        self._gains = dict.fromkeys(SCALES, 0.0)
        self.answers: list[Answers] = []

    def propose(self, texts: Texts, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` tokens for each text, `(rows, count)`, and their distributions q, `(rows, count, vocab)`."""
        self.answers, tokens, distributions = [], [], []
        for _ in range(count):
            self.answers.append(self.ask(texts))
            distributions.append(self._distribution(texts, self.answers[-1], self.scale))
            tokens.append(self.target.choose(distributions[-1]))
            texts = texts.extended(tokens[-1])
        return torch.cat(tokens, 1), torch.stack(distributions, 1)

    def room(self, texts: Texts) -> int | None:
        """As [`Reader.room`](speculative.texts.Reader.room)."""
        return self._reader.room(texts)

    def ask(self, texts: Texts) -> Answers:
        """What the models that it reads say next, `(rows, vocab)`."""
        return self.target.log_probs({term: logits[:, -1] for term, logits in self._reader.read(texts, 1).items()})

    def learn(self, texts: Texts, p: torch.Tensor) -> None:
        """Learns from the target distribution of the first proposed token, `(rows, vocab)`."""
        if not self.target.do_sample:
            return
        for factor in SCALES:
            q = self._distribution(texts, self.answers[0], self.scale * factor)
            self._gains[factor] = 0.9 * self._gains[factor] + float(acceptance(p, q).mean())
        best = max(SCALES, key=lambda factor: self._gains[factor])
        if best != 1.0 and self._gains[best] > 1.02 * self._gains[1.0]:
            self.scale = min(max(self.scale * best, 0.1), 10.0)
            self._gains = dict.fromkeys(SCALES, 0.0)

    def _distribution(self, texts: Texts, answers: Answers, scale: float) -> torch.Tensor:
        nothing = torch.zeros(len(texts.prompt), self.target.vocab, device=texts.prompt.device)
        scores = scale * self.scorer(Step(nothing, answers))
        return self.target.distribution(texts, scores, answers if self.asks_guides else None)


def looked_up(texts: Texts, count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What followed the last words where they stood before in the same text (prompt lookup decoding), as
    [`StandIn.propose`]: q is 0 where nothing was found."""
    tokens = texts.prompt.new_zeros(len(texts.prompt), count)
    q = torch.zeros(*tokens.shape, vocab, device=tokens.device)
    for row, (ids, mask) in enumerate(zip(*texts.padded())):
        ids = cast(torch.LongTensor, ids[mask.bool()][None])
        lookup = PromptLookupCandidateGenerator(
            num_output_tokens=count, max_matching_ngram_size=NGRAM, max_length=ids.shape[1] + count + 1
        )
        new = lookup.get_candidates(ids)[0][0, ids.shape[1] :]
        tokens[row, : len(new)] = new
        q[row, torch.arange(len(new)), new] = 1
    return tokens, q
