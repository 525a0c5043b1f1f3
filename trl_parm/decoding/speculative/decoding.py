# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of a guided distribution, for batches, through `generate(custom_generate=...)`."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from trl_parm.algebra import Scorer, sum_of

from ..model import OURS, Guided, own_prompt
from ..processor import GuidedLogitsProcessor
from ..terms import LM
from .draft_length import DraftLength
from .drafts import Draft, FromText, StandIn, language_models
from .judges import Judges
from .next_token import NextToken
from .reader import Reader
from .texts import Texts


PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids", *OURS)


class SpeculativeDecoding:
    """Drafts tokens with something cheap and lets base and guides judge them in one pass: the text is as without.

    It is as exact as speculative sampling (arXiv 2211.17192): tokens have the guided distribution, greedy text is the
    same, up to the last digits in which kernels for one and for several tokens differ. Rows of a batch accept as many
    drafts as each of them can. How many tokens are drafted follows from what rounds take and how many drafts are
    accepted, and nothing is drafted where that does not pay.

    Args:
        draft (`"auto"`, `"prompt"`, `PreTrainedModel` or [`Scorer`], *optional*, defaults to `"auto"`):
            - `"auto"`: a guide's own model, without its adapter if it has one. Needs a guide whose weights are not
              those of the base model: weak to strong. Since the guide tilts its own model, nothing else is loaded, and
              stronger guidance lowers no acceptance.
            - a model of the base model's vocabulary, or a scorer such as `LM(small, vocabulary=...)`, in its place.
            - `"prompt"`: what followed the last words where they stood before in the text (prompt lookup).
        draft_tokens (`int`, *optional*): Draft so many tokens in every round. Without it, sampled text depends on
            measured times, though its distribution does not.
        max_draft_tokens (`int`, *optional*, defaults to 8): The most that are drafted in a round.
        streamer (`BaseStreamer`, *optional*): Gets the tokens of a single prompt: `generate` hands its own streamer to
            no `custom_generate`.

    Attributes:
        rounds, drafted, accepted (`int`): Of the last call, over all rows.

    Raises:
        ValueError: numbers below 1, another `draft`; when called, settings that it can't follow (beams, an
            encoder-decoder model, `use_cache=False`, scores as output), a guide that is no language model, or
            `"auto"` where every guide has the base model's own weights.

    Example:

    ```python
    speculative = SpeculativeDecoding()
    PARM(base, arm, α).generate(**inputs, custom_generate=speculative)
    print(speculative.accepted / speculative.drafted)
    ```
    """

    def __init__(
        self,
        draft: Any = "auto",
        draft_tokens: int | None = None,
        max_draft_tokens: int = 8,
        streamer: BaseStreamer | None = None,
    ) -> None:
        if isinstance(draft, str) and draft not in ("auto", "prompt"):
            raise ValueError(f"`draft` is {draft!r}, but it must be 'auto', 'prompt', a model or a scorer.")
        if max_draft_tokens < 1 or (draft_tokens is not None and draft_tokens < 1):
            raise ValueError(
                f"`draft_tokens` is {draft_tokens} and `max_draft_tokens` {max_draft_tokens}, but they must be 1 or "
                "more. To draft nothing, leave `custom_generate` out."
            )
        self.draft, self.draft_tokens, self.max_draft_tokens = draft, draft_tokens, max_draft_tokens
        self.streamer = streamer
        self.rounds = self.drafted = self.accepted = 0

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The decoding loop; `generate` calls it."""
        _check(model, input_ids, generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        texts = Texts(input_ids, torch.ones_like(input_ids) if mask is None else mask)
        formula = [model.formula] if isinstance(model, Guided) else []
        next_token = NextToken([*formula, *logits_processor], bool(generation_config.do_sample))
        guided = model if formula else Guided(model, sum_of((1.0, one) for one in next_token.formulas))
        own = own_prompt(model_kwargs.get("guide_input_ids"), model_kwargs.get("guide_attention_mask"))
        for processor in logits_processor:
            if isinstance(processor, GuidedLogitsProcessor) and processor.prompt is not None:
                own = processor.prompt.own
        judges = Judges(guided, next_token, own)
        draft = self._make_draft(judges, next_token, own)
        length = DraftLength(self.max_draft_tokens, self.draft_tokens)
        self.rounds = self.drafted = self.accepted = 0
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        unfinished = torch.ones(len(texts), dtype=torch.bool, device=input_ids.device)
        while unfinished.any():
            room = int(generation_config.max_length or 0) - input_ids.shape[1] - int(texts.lengths[unfinished].max())
            # Rows that are done go on from their prompts, so that nothing is read beyond the longest text allowed.
            going_on = texts.only_prompts_of(~unfinished)
            tokens, counts = self._round(going_on, min(length.next(), room - 1), draft, judges, unfinished, length)
            texts, unfinished = self._write(texts, tokens, counts, unfinished, stopping_criteria)
        if self.streamer is not None:
            self.streamer.end()
        sequences = texts.padded(_pad_token(generation_config))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]
        return sequences

    def _round(
        self, texts: Texts, count: int, draft: Draft, judges: Judges, unfinished: torch.Tensor, length: DraftLength
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafts and judges: tokens, `(rows, count + 1)`, and how many of them each row writes."""
        start = time.perf_counter()
        if count > 0:
            tokens, q = draft.propose(texts, count, judges.vocab)
        else:
            tokens, q = texts.prompt.new_zeros(len(texts), 0), None
        drafted = time.perf_counter()
        counts, last = judges.judge(texts, tokens, q, draft)
        written = torch.cat([tokens, last], 1).scatter(1, counts[:, None], last)
        accepted = int(counts[unfinished].sum())
        tried = int((counts[unfinished] + 1).clamp(max=count).sum())
        length.record(count, accepted, tried, drafted - start, time.perf_counter() - drafted)
        self.rounds += 1
        self.drafted += count * int(unfinished.sum())
        self.accepted += accepted
        return written, torch.where(unfinished, counts + 1, 0)

    def _write(
        self,
        texts: Texts,
        tokens: torch.Tensor,
        counts: torch.Tensor,
        unfinished: torch.Tensor,
        stopping_criteria: StoppingCriteriaList,
    ) -> tuple[Texts, torch.Tensor]:
        """Appends tokens until a row is to stop: the texts, and which rows go on."""
        longer, kept, unfinished = texts.extended(tokens, counts), counts.tolist(), unfinished.clone()
        for row, count in enumerate(kept):
            before = int(texts.lengths[row])
            for new in range(1, count + 1):
                if bool(stopping_criteria(longer.row(row, before + new), None)):  # pyright: ignore[reportArgumentType]
                    kept[row], unfinished[row] = new, False
                    break
        if self.streamer is not None:
            self.streamer.put(tokens[0, : kept[0]].cpu())
        return texts.extended(tokens, torch.tensor(kept, device=tokens.device)), unfinished

    def _make_draft(self, judges: Judges, next_token: NextToken, own: Any) -> Draft:
        if self.draft == "prompt":
            return FromText()
        if self.draft == "auto":
            scorer = _stand_in(judges)
        else:
            scorer = self.draft if isinstance(self.draft, Scorer) else LM(self.draft)
        models = language_models(scorer)
        if len(judges.apart) < len(judges.guides):
            # Guides that have the base model's weights are too dear to draft with, so drafts are made without any.
            return StandIn(scorer, Reader(models, own), next_token.without_guides())
        return StandIn(scorer, Reader([*models, *judges.guides], own), next_token)


def _stand_in(judges: Judges) -> LM:
    """A guide's own model without its adapter, or the guide itself if it has none."""
    if len(judges.apart) < len(judges.guides) or not judges.apart:
        raise ValueError(
            "There is nothing to draft with: no guide has weights of its own, smaller than the base model's. Pass "
            "`draft=small_model`, or `draft='prompt'` where texts repeat their prompt."
        )
    guide = judges.apart[0]
    if not guide.adapters:
        return guide
    return LM(guide.model, adapter_name=guide.adapter_name, disable_adapter=True, vocabulary=guide.vocabulary)


def _check(
    model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    others = [name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor) and name not in PER_ROW]
    wrong = {
        "beams": (config.num_beams or 1) > 1,
        "an encoder-decoder model": bool(model.config.is_encoder_decoder),
        "`use_cache=False`": not model_kwargs.get("use_cache", True),
        "`inputs_embeds`": "inputs_embeds" in model_kwargs or input_ids.shape[1] == 0,
        "`output_scores` and other outputs beside the sequences": any(
            (config.output_scores, config.output_logits, config.output_attentions, config.output_hidden_states)
        ),
        **{f"the input `{name}`": True for name in others},
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"SpeculativeDecoding does not work with {found[0]}. Leave it or `custom_generate` out.")


def _pad_token(config: GenerationConfig) -> int:
    pad = getattr(config, "_pad_token_tensor", None)
    return int(pad) if pad is not None else 0
