# SPDX-License-Identifier: Apache-2.0
"""Texts that join a batch and leave it between two tokens, against each text alone, whole and without a cache."""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from decoding.architectures import ARCHITECTURES, Cell
from decoding.tables import lora_model

from peft_pblora.switch import backbone_of
from trl_parm.decoding import BASE, LM, PARM, GenARM, Guided, Vocabulary, genarm, parm
from trl_parm.decoding.joining import Held, can_join, joined, open_cache, read


ALPHAS = torch.tensor([[0.0, 1.0], [0.3, 0.7], [1.0, 0.0], [0.6, 0.4]])
BETAS = torch.tensor([0.5, 1.0, 2.0, 0.8])
STEPS = [("join", 0), ("go on", 2), ("join", 1), ("go on", 1), ("join", 2), ("go on", 3), ("leave", 0), ("go on", 1),
         ("leave", 1), ("join", 3), ("go on", 2), ("leave", 2), ("go on", 1)]  # fmt: skip
"""Who joins or leaves, or how many tokens are read: the longest leaves while others stay, and the shortest does."""


@dataclass
class Text:
    """A text: its tokens, and how many of them were read."""

    number: int
    tokens: list[int]
    length: int = 0
    found: list[torch.Tensor] = field(default_factory=list)


class Batch:
    """Texts with α and β of their own in one cache; `guided_at` gives the model for their numbers."""

    def __init__(self, guided_at, own=None) -> None:
        self.guided_at, self.own = guided_at, own
        self.here: list[Text] = []
        self.cache = None

    def regroup(self, kept: list[Text], new: Text | None = None) -> None:
        held = [(self.cache, text, self.here.index(text)) for text in kept]
        if new is not None:
            own = None if self.own is None else self.own[new.number]
            model = self.guided_at([new.number])
            alone = open_cache(model, own is not None)
            ids = torch.tensor([new.tokens[: new.length]])
            new.found.append(read(model, alone, ids, [0], own, new.length)[0])
            held.append((alone, new, 0))
        self.here = [text for _, text, _ in held]
        model = self.guided_at([text.number for text in self.here])
        groups = [Held(cache, [row], [text.length]) for cache, text, row in held]
        self.cache = joined(model, groups, self.own is not None) if groups else None

    def step(self) -> None:
        model = self.guided_at([text.number for text in self.here])
        ids = torch.tensor([[text.tokens[text.length]] for text in self.here])
        longest = max(text.length for text in self.here)
        assert self.cache.length == longest  # no column is padding alone
        own = None if self.own is None else self.own[0]
        logits = read(model, self.cache, ids, [longest - text.length for text in self.here], own)
        for text, row in zip(self.here, logits):
            text.length += 1
            text.found.append(row)


def texts(vocabulary: int = 64) -> list[Text]:
    generator = torch.Generator().manual_seed(2)
    return [
        Text(i, torch.randint(2, vocabulary, (24,), generator=generator).tolist(), length)
        for i, length in enumerate((7, 3, 11, 2))
    ]


def run(guided_at, everyone: list[Text], own=None) -> None:
    batch = Batch(guided_at, own)
    for action, number in STEPS:
        if action == "join":
            batch.regroup(batch.here, everyone[number])
        elif action == "leave":
            batch.regroup([text for text in batch.here if text.number != number])
        for _ in range(number if action == "go on" else 0):
            batch.step()


def check(guided_at, everyone: list[Text], own=None) -> None:
    """What was found at every position is what the whole text gives alone."""
    for text in everyone:
        model, start = guided_at([text.number]), text.length + 1 - len(text.found)
        for i, found in enumerate(text.found):
            length = start + i
            given = {} if own is None else {"guide_input_ids": own[text.number][0], "prompt_length": start}
            ids = torch.tensor([text.tokens[:length]])
            whole = model(input_ids=ids, use_cache=False, logits_to_keep=1, **given).logits[0, -1]
            torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-4)


def parm_at(base, arm):
    return lambda rows: PARM(base, arm, ALPHAS[rows], BETAS[rows])


JOIN = [name for name in ARCHITECTURES if name not in ("RecurrentGemma", "T5")]


@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "beside it"])
@pytest.mark.parametrize("name", JOIN)
def test_texts_of_every_architecture(name, on_base):
    if on_base and ARCHITECTURES[name].guide:
        pytest.skip("it can't guide itself")
    cell = Cell.make(name, "PBLoRA", "attention", on_base)
    for model in (cell.base, cell.arm):
        model.double()
        if hasattr(backbone_of(model), "set_experts_implementation"):
            backbone_of(model).set_experts_implementation("eager")
    at = parm_at(cell.base, cell.arm)
    assert can_join(lambda rows: at([0] * rows))
    everyone = texts()
    run(at, everyone)
    check(at, everyone)


def test_several_adapters():
    model = lora_model("helpful", "harmless").double()
    base, arms = model.get_base_model(), {"helpful": "helpful", "harmless": "harmless"}
    weights = ALPHAS.clamp(0.1, 0.9)

    def at(rows):
        return GenARM(base, arms, weights[rows] / weights[rows].sum(-1, keepdim=True), BETAS[rows], adapters_of=model)

    everyone = texts()
    run(at, everyone)
    check(at, everyone)


@pytest.mark.parametrize("vocabulary", [False, True], ids=["same vocabulary", "another vocabulary"])
def test_guides_with_prompts_of_their_own(vocabulary):
    base, arm = tiny_llama(0).double(), tiny_arm(tiny_llama(3, vocab_size=64)).double()
    align = {"vocabulary": Vocabulary(tiny_tokenizer(), tiny_tokenizer())} if vocabulary else {}
    own = [
        (torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        for ids in ([9, 8, 7], [5], [4, 6, 8, 10, 12, 3, 2, 9], [11, 13])
    ]

    def at(rows):
        return Guided(base, parm(arm, ALPHAS[rows], BETAS[rows], **align))

    everyone = texts()
    run(at, everyone, own)
    check(at, everyone, own)


def test_guide_of_another_vocabulary():
    base, arm = tiny_llama(0).double(), tiny_arm(tiny_llama(3)).double()
    align = Vocabulary(tiny_tokenizer(), tiny_tokenizer())

    def at(rows):
        return Guided(base, parm(arm, ALPHAS[rows], BETAS[rows], vocabulary=align))

    everyone = texts()
    run(at, everyone)
    check(at, everyone)


def test_several_rows_of_one_text():
    """As the choices of one request: its prompt is read once."""
    base = tiny_llama(0).double()
    arm = tiny_arm(base).double()
    base = arm.get_base_model()
    one, three = PARM(base, arm, ALPHAS[[1]], BETAS[[1]]), PARM(base, arm, ALPHAS[[1] * 3], BETAS[[1] * 3])
    cache, ids = open_cache(one), torch.tensor([[5, 6, 7, 8]])
    read(one, cache, ids, [0])
    before = [layer.keys.clone() for layer in cache.layers]
    three_rows = joined(three, [Held(cache, [0, 0, 0], [4, 4, 4])])
    found = read(three, three_rows, torch.tensor([[9], [10], [11]]), [0, 0, 0])
    for token, row in zip((9, 10, 11), found):
        whole = one(input_ids=torch.tensor([[5, 6, 7, 8, token]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(row, whole, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))


def test_a_model_that_keeps_its_state_on_its_modules_is_refused():
    cell = Cell.make("RecurrentGemma", "PBLoRA", "attention", on_base=False)
    with pytest.raises(ValueError, match="keeps its state on its modules"):
        can_join(lambda rows: parm_at(cell.base, cell.arm)([0] * rows))


def test_layers_that_cannot_be_joined_are_no_silent_mistake(monkeypatch):
    """A kind of layer that nobody has looked at yet is refused, and the model then decodes texts one by one."""
    from transformers.cache_utils import DynamicLayer

    class Strange(DynamicLayer):
        pass

    arm = tiny_arm(tiny_llama(0))
    base = arm.get_base_model()

    def strange(model):
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        cache.layers = [Strange() for _ in cache.layers]
        return cache

    monkeypatch.setattr("trl_parm.decoding.joining.rewindable_cache", strange)
    assert not can_join(lambda rows: parm_at(base, arm)([0] * rows))
    monkeypatch.undo()
    assert can_join(lambda rows: Guided(base, BASE + LM(arm, ALPHAS[[1] * rows])))
    assert genarm({"a": BASE}, [1.0]) is not None
