# SPDX-License-Identifier: Apache-2.0
"""What the models of a formula have read, and how they read on: one forward for each set of weights.

All state of guidance is here, in the cache that `generate` carries.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

from peft_pblora.adapter import check_rows, expand_rows
from peft_pblora.condition import Condition
from peft_pblora.kv_cache import cache_argument
from peft_pblora.rows import Entry

from .adapters import Adapters, same_stamp
from .incoming import New
from .prefix import can_take_back, holds, turning_length
from .probes import check_order, goes_on, tensors_on_modules
from .terms import LM


LEAST_COMMON = 8
"""Columns that all rows begin with which are worth a forward of their own."""
OUTPUTS = ("output_hidden_states", "output_attentions")
GIVEN = {"input_ids", "attention_mask", "position_ids"}
"""What a guide reads of these is worked out for it."""


class Part:
    """The terms of one set of weights, which read the same text, with what they have read.

    Their rows stand below each other in one forward, [term 1 | term 2 | ...], each with its own adapter.

    Args:
        terms (`list[LM]`): The terms; one, unless they act on rows.
        guides (`list[LM]`): Those of them that guide.
        adapters ([`Adapters`]): Those of the weights.
        on_rows (`bool`): Whether the terms' adapters can act on rows.
        is_base (`bool`): Whether the model that generates is among them, and so its inputs are theirs.
        cache (`Cache`, *optional*): An empty cache; without one whole texts are read at every call.
    """

    def __init__(
        self, terms: list[LM], guides: list[LM], adapters: Adapters, on_rows: bool, is_base: bool, cache: Cache | None
    ) -> None:
        self.terms, self.guides, self.adapters, self.on_rows = terms, guides, adapters, on_rows
        self.is_base, self.cache, self.model = is_base, cache, terms[0].backbone
        self.mask: torch.Tensor | None = None
        self.staying: torch.Tensor | None = None
        self._stamp = adapters.stamp(terms)
        self._planned: tuple[int, list[Entry]] | None = None
        self.turning_length = turning_length(self.model)
        self.longest, self.turned = 0, False  # of what was read, where there is such a length
        self._goes_on = self._keeps_order = False  # until it was found out

    @property
    def is_current(self) -> bool:
        """Whether its adapters, and preferences that are set in the model, are still those it began with."""
        read = self.cache is not None and holds(self.cache)
        return not read or same_stamp(self._stamp, self.adapters.stamp(self.terms))

    def rows_of(self, term: LM) -> int:
        """How many rows have a preference of their own, given or set in the model; 1 if all have the same."""
        return max((condition.rows for condition in self.adapters.conditions(term).values()), default=1)

    def read(
        self, new: New, inputs: dict[str, Any], last: int, compiled: Any = None
    ) -> tuple[dict[LM, torch.Tensor], Any]:
        """Reads what is new, and returns the logits after the `last` tokens of it (0: all), `(rows, last, vocab)`.

        Args:
            new ([`New`]): What is new.
            inputs (`dict`): What the base model is given beside, or in the place of it; of another model, what it sees
                of that too, if its forward names it.
            last (`int`): How many positions are wanted.
            compiled (`CompileConfig`, *optional*): Compile the model's forward with it.

        Returns:
            `tuple` of the logits of every term, and the model's output.
        """
        if not self.is_base:
            unread = new.own is not None and self.mask is None
            if unread and new.start + new.ids.shape[1] < new.prompt:
                return self._no_answer(len(new.ids), last or new.ids.shape[1]), None
            own_text = new.own is not None or self.terms[0].vocabulary is not None
            taken = _parameters(type(self.model)) - GIVEN
            inputs = {n: x.to(self.model.device) for n, x in inputs.items() if n in taken and holds_tensors(x)}
            new = new.for_guide(self.terms[0], self.mask)
            self.mask = new.mask if own_text else None
            if new.ids.shape[1] == 0:
                raise ValueError(
                    "The guiding model has nothing to read: with `inputs_embeds` it can't see the prompt. Give it one "
                    "with `guide_input_ids`."
                )
            count = last or new.ids.shape[1]
            if (columns := new.answered(count)) is not None:
                first = int(columns.min())
                found, output = self.forward(new, inputs, new.ids.shape[1] - first, compiled)
                columns = (columns - first)[..., None]
                return {t: x.gather(1, columns.expand(-1, -1, x.shape[-1])) for t, x in found.items()}, output
        return self.forward(new, inputs, last, compiled)

    def _no_answer(self, rows: int, last: int) -> dict[LM, torch.Tensor]:
        """What stands for logits within a prompt that is read in chunks: a prompt of the guide's own is read when the
        last one comes, and nobody asks for more."""
        head = cast(Any, self.model.get_output_embeddings())
        return dict.fromkeys(self.terms, torch.zeros(rows, last, head.weight.shape[0], device=self.model.device))

    def forward(
        self, new: New, inputs: dict[str, Any], last: int, compiled: Any = None
    ) -> tuple[dict[LM, torch.Tensor], Any]:
        """As `read`, of tokens that are the model's own already."""
        rows = len(new.ids)
        for term in self.terms:
            self.adapters.check(term)
            for condition in self.adapters.conditions(term).values():
                check_rows(condition.rows, rows)
        empty = fresh = self.cache is not None and not holds(self.cache)
        for term in self.terms if empty or self.cache is None else ():
            self.adapters.check_evaluates(term, self.on_rows)
        longest = 0 if self.turning_length is None else self._turn(new, inputs, last, empty)
        if empty:  # a cache may have been emptied, or been made long before
            self._stamp, self._planned = self.adapters.stamp(self.terms), None
        if empty and compiled is None and (common := self._common_start(new, inputs, last)):
            start, new = new.split(common)
            self.forward(start, inputs, 1)
            empty = False
        self.longest = longest
        places = self._places(new, inputs, rows) if fresh and type(self.cache) is DynamicCache else None
        chosen = None if places is None else places[0]
        if self.staying is not None:
            chosen = [self.staying.to(new.ids.device)] * len(self.terms)
        if places is not None and chosen is not None and not empty:
            read = torch.cat([i * rows + own for i, own in enumerate(chosen)])
            cast(Cache, self.cache).reorder_cache(cast(torch.LongTensor, read))
        copies = len(self.terms)
        stacked = None
        if chosen is not None or copies > 1:
            stacked = torch.cat(chosen or [torch.arange(rows, device=new.ids.device)] * copies)
        total = rows if stacked is None else len(stacked)
        given = {
            "input_ids": new.ids, "attention_mask": new.mask, "position_ids": self._positions(new, inputs), **inputs
        }  # fmt: skip
        beside = inputs if self.is_base and _takes_any(type(self.model)) else {}
        arguments = self._arguments({name: _rows(value, stacked, rows) for name, value in given.items()}, beside, last)
        forward = self.model if compiled is None else self.model.get_compiled_call(compiled)
        tokens = inputs.get("inputs_embeds", new.ids).shape[1]
        ahead = None
        if compiled is not None:
            ahead = torch.empty(total, tokens, 1, dtype=self.model.dtype, device=new.ids.device)
        groups = copies if chosen is None else None
        acting = self.adapters.acting(self._entries(rows, chosen), total, tokens, groups, ahead, self.on_rows)
        if self.cache is not None and not empty and new.ids.shape[1] > 1:
            self.check_goes_on()
        before = tensors_on_modules(self.model, total) if empty else {}
        with acting as plan:
            output = forward(**arguments)
        if plan is not None and plan.reshaped and not self._keeps_order:
            check_order(self.model, self.adapters)
            self._keeps_order = True
        if empty and any(before.get(key) is not x for key, x in tensors_on_modules(self.model, total).items()):
            raise ValueError(
                f"A {type(self.model).__name__} keeps its state on its modules, not in its cache, so that two texts "
                "would mix. Use a guided model such as `PARM(model, arm, ...)` with `use_cache=False`."
            )
        logits = output.logits if last == 0 else output.logits[:, -last:]
        if compiled is not None:
            logits = logits.clone()  # the next graph that runs may write over it
        if places is not None:
            order = torch.cat(places[1]).to(logits.device)
            cast(Cache, self.cache).reorder_cache(cast(torch.LongTensor, order))
            logits = logits[order]
        if self.staying is not None:
            whole = logits.new_zeros(copies * rows, *logits.shape[1:])
            whole[torch.cat([i * rows + self.staying.to(logits.device) for i in range(copies)])] = logits
            logits = whole
        if self.is_base and stacked is not None:
            own = places[1][0] if places is not None else slice(rows if chosen is None else len(chosen[0]))
            for name in ("hidden_states", "attentions"):
                if output.get(name) is not None:
                    output[name] = tuple(value[own] for value in output[name])
        return dict(zip(self.terms, logits.split(rows))), output

    def turns(self, tokens: int) -> bool:
        """Whether so many tokens more make what was read one whose keys are turned otherwise."""
        return self.turning_length is not None and self.turned != (self.longest + tokens > self.turning_length)

    def _turn(self, new: New, inputs: dict[str, Any], last: int, empty: bool) -> int:
        """The length of the longest text, by which all are turned. Raises `ValueError` where one would be read by two
        kinds of factors, or answers after shorter texts are asked for beside those after longer ones."""
        positions = self._positions(new, inputs)
        columns = inputs.get("inputs_embeds", new.ids).shape[1]
        longest = new.start + columns if positions is None else int(positions.max()) + 1
        most = cast(int, self.turning_length)
        turned = longest > most
        if self.cache is not None and ((not empty and turned != self.turned) or (turned and longest - last < most)):
            raise ValueError(
                f"A {type(self.model).__name__} turns its keys by other factors in texts of more than {most} tokens, "
                "so that a text can't be read in parts across this length, nor be drafted. Pass all of it at once, "
                "without a cache, `prefill_chunk_size` or an assistant; `SpeculativeDecoding` drafts up to it."
            )
        self.turned = turned
        return longest

    def check_goes_on(self) -> None:
        """Raises `ValueError` for a model that forgets where several tokens follow: a text that is read in two parts
        must be that text."""
        self._goes_on = self._goes_on or goes_on(self.model, self.adapters)
        if not self._goes_on:
            raise ValueError(
                f"A {type(self.model).__name__} forgets what it has read where several tokens follow at once, so that "
                "texts can't go on, be read in chunks or be drafted. Pass whole texts without a cache of them."
            )

    def reorder(self, rows: torch.Tensor, batch: int) -> None:
        """Takes these rows of the batch, of each term."""
        offsets = batch * torch.arange(len(self.terms), device=rows.device)
        if self.cache is not None:
            self.cache.reorder_cache(cast(torch.LongTensor, (offsets[:, None] + rows).flatten()))
        if self.mask is not None:
            self.mask = self.mask[rows.to(self.mask.device)]

    def leave(self, stays: torch.Tensor, staying: torch.Tensor) -> None:
        """Keeps the rows that stay of those that it holds, `(held,)`, which are the rows `staying` of the batch."""
        offsets = len(stays) * torch.arange(len(self.terms), device=stays.device)
        rows = (offsets[:, None] + stays.nonzero()[:, 0]).flatten()
        cast(Cache, self.cache).reorder_cache(cast(torch.LongTensor, rows))
        self.staying = staying

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` back."""
        cast(Cache, self.cache).crop(-tokens)
        self.longest -= tokens
        if self.mask is not None and tokens:
            self.mask = self.mask[:, :-tokens]

    def _entries(self, rows: int, chosen: list[torch.Tensor] | None) -> list[Entry]:
        """Which adapter acts on which groups of rows, or on which rows that were chosen of each term.

        Terms of one adapter, which stand together, become one entry.
        """
        if chosen is None and self._planned is not None and self._planned[0] == rows:
            return self._planned[1]
        entries: list[Entry] = []
        start = first = 0
        for adapters, run in itertools.groupby(self.terms, lambda term: term.adapters):
            same = list(run)
            own = None if chosen is None else chosen[first : first + len(same)]
            first += len(same)
            stop = start + (len(same) if own is None else sum(map(len, own)))
            entries += [(name, slice(start, stop), self._condition(name, same, rows, own)) for name in adapters]
            start = stop
        if chosen is None:
            self._planned = rows, entries
        return entries

    def _condition(self, name: str, terms: list[LM], rows: int, chosen: list[torch.Tensor] | None) -> Condition | None:
        """α of an adapter for the rows of some terms that have it; `None` for what is set in the model."""
        device = self.model.device
        if len(terms) == 1 and (chosen is None or self.rows_of(terms[0]) == 1):
            if terms[0].condition is not None:
                terms[0].condition.to(device)
            return terms[0].condition
        every = [self.adapters.conditions(term) for term in terms]
        if name not in every[0]:
            return None
        found = [conditions[name] for conditions in every]
        α = [torch.atleast_2d(condition.preference.to(device)) for condition in found]
        if chosen is not None:
            α = [expand_rows(one, rows)[own.to(device)] for one, own in zip(α, chosen)]
        elif any(len(one) > 1 for one in α):
            α = [expand_rows(one, rows) for one in α]
        return Condition.fixed(found[0].objectives, torch.cat(α))

    def _places(
        self, new: New, inputs: dict[str, Any], rows: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """For rows that repeat, as for beams, several sequences or a sweep over preferences: of each term the rows to
        read, and the place of every row among all that are read. `None` if no row repeats."""
        if rows == 1 or new.ids.shape[1] == 0 or any(map(holds_tensors, inputs.values())):
            return None
        parts = [new.ids]
        parts += [x.to(new.ids) for x in (new.mask, new.positions) if x is not None and len(x) == rows]
        text = torch.unique(torch.cat(parts, 1), dim=0, return_inverse=True)[1]
        kinds = [_kinds(self.adapters.conditions(term).values(), rows).to(text.device) for term in self.terms]
        keys = [text * rows + kind for kind in kinds]
        chosen, places, offset = [], [], 0
        for key in keys:
            found, inverse = torch.unique(key, return_inverse=True)
            numbers = torch.arange(rows, device=key.device)
            chosen.append(
                torch.full((len(found),), rows, device=key.device).scatter_reduce(0, inverse, numbers, "amin")
            )
            places.append(offset + inverse)
            offset += len(found)
        return (chosen, places) if offset < rows * len(keys) else None

    def _common_start(self, new: New, inputs: dict[str, Any], last: int) -> int:
        """How many columns all rows begin with, such as a system prompt, if it is worth while to read them by
        themselves: once for each adapter and α, in the place of once a row."""
        outputs = (inputs.get(name) or getattr(self.model.config, name, False) for name in OUTPUTS)
        if last == 0 or len(new.ids) == 1 or type(self.cache) is not DynamicCache or any(outputs) or self.turned:
            return 0
        if any(map(holds_tensors, inputs.values())) or not can_take_back(self.cache):  # as of recurrent layers
            return 0
        same = (new.ids == new.ids[:1]).all(0)
        if bool(same.all()) or new.mask is not None and new.mask.ndim != 2:
            return 0
        if new.mask is not None:
            same &= (new.mask[:, : len(same)] != 0).all(0)
        if new.positions is not None:
            same &= (new.positions == new.positions[:1]).all(0)
        found = min(int(same.int().cumprod(0).sum()), len(same) - last)
        return found if found >= LEAST_COMMON else 0

    def _positions(self, new: New, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Of what is new, `(rows or 1, new)`; `None` where the model has to find them, as with images."""
        columns = new.ids.shape[1]
        if new.positions is None and new.mask is not None and new.mask.ndim == 2:
            return (new.mask.cumsum(-1) - 1).clamp(min=0)[:, -columns:]
        if new.positions is None and new.mask is None and not any(map(holds_tensors, inputs.values())):
            # Some hybrid models would count from 0 at every call.
            return torch.arange(new.start, new.start + columns, device=new.ids.device)[None]
        return new.positions

    def _arguments(self, given: dict[str, Any], beside: Mapping[str, Any], last: int) -> dict[str, Any]:
        """The arguments of the model's forward, those that it names, and those `beside` that it takes without."""
        taken = _parameters(type(self.model))
        arguments = {n: value for n, value in given.items() if value is not None and (n in taken or n in beside)}
        if "logits_to_keep" in taken:
            arguments["logits_to_keep"] = last
        arguments["use_cache"] = self.cache is not None
        if self.cache is not None:
            arguments |= cache_argument(self.model, self.cache)
            # That of an encoder-decoder is the encoder's.
            own_mask = not self.model.config.is_encoder_decoder and self.cache.is_compileable
            if own_mask and not all(self.cache.is_linear):
                arguments["attention_mask"] = self._whole_mask(given)
        return arguments

    def _whole_mask(self, given: dict[str, Any]) -> Any:
        """The mask that a cache of fixed size needs, as `generate` makes it: of four dimensions, but where the model
        makes its alibi tensor of it."""
        ids = given["input_ids"]
        make = getattr(self.model, "create_masks_for_generate", None)
        if make is None and hasattr(self.model.base_model, "build_alibi_tensor"):
            return self._long_mask(given)
        return (make or create_masks_for_generate)(
            config=self.model.config,
            inputs_embeds=torch.empty((*ids.shape, 0), dtype=self.model.dtype, device=ids.device),
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            **cache_argument(self.model, self.cache),
        )

    def _long_mask(self, given: dict[str, Any]) -> torch.Tensor:
        """The mask of two dimensions, as long as a cache of fixed size: 0 where nothing is yet."""
        ids, cache, mask = given["input_ids"], cast(Cache, self.cache), given.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(len(ids), cache.get_seq_length() + ids.shape[1])
        return nn.functional.pad(mask, (0, cache.get_max_length() - mask.shape[1]))


def parts_of(
    base: LM | None, terms: Sequence[LM], own_prompt: bool, new_cache: Callable[[LM, int], Cache | None]
) -> list[Part]:
    """The parts of a formula.

    Args:
        base ([`LM`] or `None`): The model that generates, if it is to be read.
        terms (`Sequence[LM]`): The guides.
        own_prompt (`bool`): Whether guides read a prompt of their own.
        new_cache (`Callable`): Makes an empty cache for a model and a number of terms, or `None`.
    """
    groups: dict[Any, list[LM]] = {}
    adapters: dict[int, Adapters] = {}
    for term in ([] if base is None else [base]) + [term for term in terms if own_prompt or term != base]:
        weights = id(term.backbone)
        if weights not in adapters:
            adapters[weights] = Adapters(term.backbone)
        text = "prompt" if term is base or not own_prompt else "own prompt"
        alone = None if adapters[weights].act_on_rows(term.adapters) else term
        groups.setdefault((weights, text, id(term.vocabulary), alone), []).append(term)
    found = []
    for (weights, _, _, alone), group in groups.items():
        # Rows of one adapter stand together.
        ordered = sorted(group, key=lambda term: (term is not base, term.adapters))
        guides = [term for term in ordered if term is not base or (term in terms and not own_prompt)]
        cache = new_cache(group[0], len(group))
        found.append(Part(ordered, guides, adapters[weights], alone is None, ordered[0] is base, cache))
    return found


def holds_tensors(value: Any) -> bool:
    """Whether an input of a forward is made of tensors, such as an image, or what an encoder made of it."""
    if isinstance(value, Mapping):
        return any(map(holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_tensors, value))
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _kinds(conditions: Collection[Condition], rows: int) -> torch.Tensor:
    """A number for each row, `(rows,)`, the same where a term's preferences are the same."""
    α = [condition.preference.cpu() for condition in conditions if condition.rows > 1]
    if not α:
        return torch.zeros(rows, dtype=torch.long)
    return torch.unique(torch.cat([expand_rows(one, rows) for one in α], 1), dim=0, return_inverse=True)[1]


def _rows(value: Any, rows: torch.Tensor | None, batch: int) -> Any:
    """Rows of what a forward gets for each row of the batch."""
    if rows is None or not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != batch:
        return value
    return value[rows.to(value.device)]


@lru_cache(maxsize=64)
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@lru_cache(maxsize=64)
def _takes_any(kind: type) -> bool:
    """Whether a model's forward takes arguments that it does not name, such as `output_hidden_states`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind.forward).parameters.values())
