# SPDX-License-Identifier: Apache-2.0
"""Guidance on many architectures, in every mode, by both doors: the formula in float64 without cache, or one error.

What a model can't do, its row in `ARCHITECTURES` says: it is refused before the first token, not found out by names.
`make test` runs the corners of this table, `make test-slow` the rest.
"""

import functools

import pytest
import torch
from decoding.architectures import ARCHITECTURES, MASK, MODES, PROMPTS, Cell, NaiveProcessor, tiny
from torch import nn
from transformers import LogitsProcessor

from trl_parm import Guided, GuidedLogitsProcessor, Prompt


QUICK = {
    ("PBLoRA", "all-linear", True, "model"): ("greedy", "beam search", "prompt lookup", "static cache", "no cache"),
    ("LoRAs", "attention", True, "processor"): ("greedy", "beam search", "one prompt"),
    ("PBLoRA", "attention", False, "processor"): ("several sequences", "prompt lookup", "one prompt, beams"),
    ("LoRAs", "all-linear", False, "model"): ("beam search", "static cache"),
}


def table():
    for name, architecture in ARCHITECTURES.items():
        for adapter in ("PBLoRA", "LoRAs"):
            for targets in ("attention", "all-linear"):
                for on_base in (False, True) if architecture.guide is None else (False,):
                    for door in ("model", "processor"):
                        for mode in MODES:
                            place = "on the base" if on_base else "beside it"
                            quick = mode in QUICK.get((adapter, targets, on_base, door), ())
                            yield pytest.param(
                                name, adapter, targets, on_base, door, mode,
                                id="-".join((name, adapter, targets, place, door, mode)),
                                marks=[] if quick else pytest.mark.slow,
                            )  # fmt: skip


class Count(LogitsProcessor):
    """How many tokens were chosen."""

    tokens = 0

    def __call__(self, input_ids, scores):
        self.tokens += 1
        return scores


def inputs(mode: str) -> dict[str, torch.Tensor]:
    if mode.startswith("one prompt"):
        return {"input_ids": PROMPTS[:1]}
    rows = slice(1, 2) if mode == "prompt lookup" else slice(None)
    return {"input_ids": PROMPTS[rows], "attention_mask": MASK[rows]}


def settings(mode: str) -> dict:
    return {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, **MODES[mode]}


@functools.lru_cache(maxsize=32)
def naive(name: str, adapter: str, targets: str, on_base: bool, mode: str):
    """What the formula writes. All greedy modes write the same."""
    given = inputs(mode)
    cell = Cell.make(name, adapter, targets, on_base)
    mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    processor = NaiveProcessor(cell, mask, given["input_ids"])
    mode = mode if mode in ("several sequences", "beam search", "one prompt, beams") else "greedy"
    base = tiny(name)
    torch.manual_seed(0)
    return base.generate(**given, **settings(mode), logits_processor=[processor])


def guided(cell: Cell, door: str, mode: str, count: Count):
    given = inputs(mode)
    own = Prompt(guide=given, length=1)
    encodes = cell.base.config.is_encoder_decoder
    if door == "model":
        model, processors = Guided(cell.base, cell.formula), []
        given |= own.arguments if encodes else {}
    else:
        prompt = own if encodes else Prompt(given) if "attention_mask" in given else None
        model, processors = cell.base, [GuidedLogitsProcessor(cell.formula, prompt)]
    torch.manual_seed(0)
    return model.generate(**given, **settings(mode), logits_processor=[*processors, count])


@pytest.mark.parametrize(("name", "adapter", "targets", "on_base", "door", "mode"), list(table()))
def test_every_architecture_in_every_mode(name, adapter, targets, on_base, door, mode):
    cell, count = Cell.make(name, adapter, targets, on_base), Count()
    refused = ARCHITECTURES[name].refused.get((mode, door))
    if refused is not None:
        with pytest.raises((ValueError, NotImplementedError), match=refused):
            guided(cell, door, mode, count)
        assert count.tokens == 0
        return
    ours, expected = guided(cell, door, mode, count), naive(name, adapter, targets, on_base, greedy_like(mode))
    assert torch.equal(ours.sequences, expected.sequences)
    for found, wanted in zip(ours.scores, expected.scores, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def greedy_like(mode: str) -> str:
    """The mode itself, or another one that has the same text."""
    return "greedy" if mode in ("static cache", "no cache") else mode


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_text_depends_on_the_prompt_and_on_the_guides(name):
    """Else the table above would show nothing."""
    on_base = ARCHITECTURES[name].guide is None
    text = naive(name, "PBLoRA", "all-linear", on_base, "greedy").sequences[:, -5:]
    assert len({tuple(row) for row in text.tolist()}) == 3
    assert not torch.equal(text, tiny(name).generate(**inputs("greedy"), max_new_tokens=5)[:, -5:])
    other = naive(name, "LoRAs", "all-linear", on_base, "greedy").sequences[:, -5:]
    assert not torch.equal(text, other)


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.guide])
@pytest.mark.parametrize("door", ["model", "processor"])
def test_what_can_not_guide_is_refused_when_the_term_is_made(name, door):
    base = tiny(name)
    cell = Cell(base, Cell.adapted(base, "PBLoRA", ARCHITECTURES[name].attention), "PBLoRA")
    with pytest.raises(ValueError, match="Only causal language models can guide|has no key-value cache"):
        guided(cell, door, "greedy", Count())


class Experts(nn.Module):
    """A mixture whose experts are linear layers that get their tokens one by one, in an order of the router's."""

    def __init__(self, number: int, chosen: int) -> None:
        super().__init__()
        self.router = nn.Linear(32, number, bias=False)
        self.experts = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(number)])
        self.chosen = chosen
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        tokens = x.view(-1, 32)
        weights, chosen = self.router(tokens).softmax(-1).topk(self.chosen, -1)
        result = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(number == chosen.T)
            result.index_add_(0, token, weights[token, choice, None] * expert(tokens[token]))
        return result.view_as(x)


@pytest.mark.parametrize("chosen", [1, 2, 3], ids=lambda n: f"{n} of 3 experts")
@pytest.mark.parametrize("adapter", ["PBLoRA", "LoRAs"])
def test_adapters_of_experts_are_refused_also_where_every_expert_gets_every_token(adapter, chosen):
    """Sizes alone don't tell: an expert that gets all tokens gets them in an order of its own."""
    torch.manual_seed(0)
    base = tiny("Llama")
    for layer in base.model.layers:
        layer.mlp = Experts(3, chosen)
    cell, count = Cell(base, Cell.adapted(base, adapter, ["experts.0", "experts.1"]), adapter), Count()
    with pytest.raises(
        ValueError, match="can't tell the rows apart|gets tokens of several rows in an order of its own"
    ):
        guided(cell, "model", "greedy", count)
    assert count.tokens == 0
