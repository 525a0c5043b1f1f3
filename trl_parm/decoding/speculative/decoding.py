# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of a guided distribution, for batches, through `generate(custom_generate=...)`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import logits_process as known
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from peft_pblora.kv_cache import cache_in
from trl_parm.algebra import Scorer

from ..cache import GuidedCache
from ..model import OURS, own_prompt
from ..prefix import holds
from ..processor import GuidedLogitsProcessor
from ..terms import untuned
from .draft_length import DraftLength
from .target import StandIn, Target, looked_up
from .texts import Texts


PER_ROW = ("input_ids", "attention_mask", "position_ids", *OURS)
STATEFUL = (known.UnbatchedClassifierFreeGuidanceLogitsProcessor, known.SynthIDTextWatermarkLogitsProcessor)
"""Processors that take every call for the next token of the text."""


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
            encoder-decoder model, `use_cache=False`, scores as output, classifier-free guidance), inputs beside ids
            and mask, a cache of text that the ids don't repeat, a guide that is no language model, different prompts
            of the guides' own, several rows across the length beyond which LongRoPE turns all keys otherwise, or
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
        _check(model, input_ids, logits_processor, generation_config, model_kwargs)
        own = own_prompt(model_kwargs.get("guide_input_ids"), model_kwargs.get("guide_attention_mask"))
        ends = getattr(generation_config, "_eos_token_tensor", None)
        ends = input_ids.new_empty(0) if ends is None else ends
        target = Target(model, logits_processor, bool(generation_config.do_sample), own, ends)
        draft = None if self.draft == "prompt" else self._make_draft(target)
        length = DraftLength(self.max_draft_tokens, self.draft_tokens)
        mask = model_kwargs.get("attention_mask")
        texts = Texts(input_ids, torch.ones_like(input_ids) if mask is None else mask)
        most = int(generation_config.max_length or 0) - input_ids.shape[1]
        _check_rows(target.room(texts), len(input_ids), most)
        self.rounds = self.drafted = self.accepted = 0
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        while unfinished.any():
            count = max(0, min(length.next(), most - int(texts.lengths[unfinished].max()) - 1))
            # Rows that are done go on from their prompts, so that nothing is read beyond the longest text allowed.
            going_on = Texts(texts.prompt, texts.mask, texts.new, torch.where(unfinished, texts.lengths, 0))
            rooms = (one.room(going_on) for one in (target, draft) if one is not None)
            count = min((count, *(room for room in rooms if room is not None)))
            start = time.perf_counter()
            if count == 0:
                tokens, q = texts.new[:, :0], None
            elif draft is None:
                tokens, q = looked_up(going_on, count, target.vocab)
            else:
                tokens, q = draft.propose(going_on, count)
            drafted = time.perf_counter()
            tokens, counts = target.judge(going_on, tokens, q, draft)
            accepted, tried = (int(n[unfinished].sum()) for n in (counts - 1, counts.clamp(max=count)))
            length.record(count, accepted, tried, drafted - start, time.perf_counter() - drafted)
            self.rounds += 1
            self.drafted += count * int(unfinished.sum())
            self.accepted += accepted
            counts, unfinished = _until_stop(texts, tokens, counts * unfinished, stopping_criteria)
            texts = texts.extended(tokens, counts)
            if self.streamer is not None:
                self.streamer.put(tokens[0, : int(counts[0])].cpu())
        if self.streamer is not None:
            self.streamer.end()
        pad = getattr(generation_config, "_pad_token_tensor", None)
        sequences, _ = texts.padded(0 if pad is None else int(pad))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]
        return sequences

    def _make_draft(self, target: Target) -> StandIn:
        if self.draft != "auto":
            return StandIn(self.draft if isinstance(self.draft, Scorer) else untuned(self.draft), target)
        if not target.guides or len(target.apart) < len(target.guides):
            raise ValueError(
                "There is nothing to draft with: no guide has weights of its own, smaller than the base model's. Pass "
                "`draft=small_model`, or `draft='prompt'` where texts repeat their prompt."
            )
        guide = target.guides[0]
        return StandIn(replace(guide, preference=None, disable_adapter=True) if guide.adapters else guide, target)


def _check_rows(room: int | None, rows: int, most: int) -> None:
    """Raises `ValueError` for several rows that may write up to `most` tokens, where all have to be read anew after so
    many, see [`Reader.room`](speculative.texts.Reader.room): at their own pace they would not be at once."""
    if rows > 1 and room is not None and room < most:
        raise ValueError(
            f"A model turns its keys by other factors {room} tokens after these prompts, in all rows at once, which "
            f"can't grow at their own pace then. Decode the {rows} rows one at a time, give a `max_new_tokens` up to "
            "that, or leave `custom_generate` out."
        )


def _until_stop(
    texts: Texts, tokens: torch.Tensor, counts: torch.Tensor, stopping_criteria: StoppingCriteriaList
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of its first `counts` tokens each row writes until a criterion stops it, and which rows go on."""
    ids, _ = texts.extended(tokens, counts).padded()
    ends = texts.prompt.shape[1] + texts.lengths
    written, unfinished = counts.clone(), counts > 0
    for row, (end, count) in enumerate(zip(ends.tolist(), counts.tolist())):
        for new in range(1, count + 1):
            if bool(stopping_criteria(ids[row : row + 1, : end + new], None)):  # pyright: ignore[reportArgumentType]
                written[row], unfinished[row] = new, False
                break
    return written, unfinished


def _check(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    columns, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    # That of the text: `generate` drops a mask that is all ones, and notes its length.
    length = getattr(config, "_mask_length", columns) if mask is None else mask.shape[1]
    cache = cache_in(model_kwargs)
    if cache is not None and holds(cache):
        length = max(length, cache.get_seq_length() + 1)
    replaced = [model_kwargs.get("prompt_length")] if model_kwargs.get("guide_input_ids") is not None else []
    replaced += [cache.replaced] if isinstance(cache, GuidedCache) and cache.own is not None else []
    prompts = [one.prompt for one in processors if isinstance(one, GuidedLogitsProcessor) and one.prompt is not None]
    replaced += [prompt.length for prompt in prompts if prompt.own is not None]
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
        "a prompt of the guides' own for a part of the prompt": any(
            length not in (None, columns) for length in replaced
        ),
        "a cache, unless `input_ids` repeat the text that it has read": length > columns,
        "`position_ids`, unless they are those of the mask": _moved(model_kwargs.get("position_ids"), input_ids, mask),
        "`guidance_scale` and other processors with a state": any(isinstance(one, STATEFUL) for one in processors),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"SpeculativeDecoding does not work with {found[0]}. Leave it or `custom_generate` out.")


def _moved(positions: torch.Tensor | None, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether these are positions, `(..., rows, columns)`, that tokens do not have by the mask."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions is None or positions.shape[-1] != mask.shape[1]:
        return positions is not None
    return bool(((positions - mask.cumsum(1) + 1) * mask).any())
