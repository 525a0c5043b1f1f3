# SPDX-License-Identifier: Apache-2.0
"""Users in one batch, each with a prompt, a preference and a β of their own, who come and go between calls.

Whoever is in the batch, and whoever leaves or joins it, nobody's text changes.
"""

import logging
from dataclasses import dataclass, field

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from test_compiled_decoding import Compiler
from test_guides import lora_model
from transformers import GenerationConfig, StaticCache

from peft_pblora import preference_grid
from trl_parm import GenARMLogitsProcessor, PARMLogitsProcessor


TURN = 4


@dataclass
class User:
    """A prompt of its own length, α and β, and the tokens written so far."""

    prompt: list[int]
    preference: torch.Tensor
    beta: float
    written: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.prompt + self.written


def users(count: int = 6) -> list[User]:
    generator = torch.Generator().manual_seed(3)
    grid = preference_grid(["helpful", "harmless"], count - 1)
    prompts = [torch.randint(2, 64, (2 + 3 * i % 7,), generator=generator).tolist() for i in range(count)]
    return [User(prompt, grid[i], 0.5 + i / 2) for i, prompt in enumerate(prompts)]


MEMBERSHIP = [[0, 1, 2], [0, 1, 2, 3], [3, 1], [4, 1, 5, 3], [5], [5, 4, 0, 2]]
"""Who is in the batch in each call: rows leave, join, come back and change their places."""


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def take_turn(base, guide, members: list[User], **settings) -> None:
    """One call of `generate` for some users, at their preferences: each writes a few tokens more."""
    guide.set(torch.stack([user.preference for user in members]), [user.beta for user in members])
    inputs = padded([user.text for user in members])
    output = base.generate(
        **inputs, max_new_tokens=TURN, eos_token_id=-1, pad_token_id=0, logits_processor=[guide], **settings
    )
    for user, row in zip(members, output[:, inputs["input_ids"].shape[1] :]):
        user.written += row.tolist()


def alone(base, arm, user: User) -> list[int]:
    """What the user gets in one call without anybody else."""
    guide = PARMLogitsProcessor(arm, user.preference, user.beta)
    output = base.generate(
        torch.tensor([user.prompt]), max_new_tokens=len(user.written), eos_token_id=-1, logits_processor=[guide]
    )
    return output[0, len(user.prompt) :].tolist()


@pytest.mark.parametrize("shared", [True, False], ids=["one forward", "separate guide"])
def test_nobodys_text_depends_on_who_else_is_in_the_batch(shared):
    """One processor serves all calls: batches of one to four rows, of six users."""
    arm, everyone = tiny_arm(tiny_llama(0)), users()
    base = arm.get_base_model() if shared else tiny_llama(2)
    guide = PARMLogitsProcessor(arm, everyone[0].preference)
    for members in MEMBERSHIP:
        take_turn(base, guide, [everyone[i] for i in members])
    assert sorted(len(user.written) // TURN for user in everyone) == [2, 3, 3, 3, 3, 4]
    for user in everyone:
        assert user.written == alone(base, arm, user)
    assert len({tuple(user.written) for user in everyone}) == len(everyone)


def test_preferences_and_strengths_of_other_rows_do_not_reach_a_row():
    """The same prompt in all rows, so that nothing but α and β can tell them apart."""
    arm, everyone = tiny_arm(tiny_llama(0)), users()
    base, guide = arm.get_base_model(), PARMLogitsProcessor(arm, everyone[0].preference)
    for user in everyone:
        user.prompt = [7, 8, 20]
    for members in MEMBERSHIP:
        take_turn(base, guide, [everyone[i] for i in members])
    for user in everyone:
        assert user.written == alone(base, arm, user)


@pytest.mark.parametrize(
    ("slots", "graphs"),
    [
        pytest.param(4, 1, id="four slots"),
        pytest.param(None, 3, id="as many rows as users", marks=pytest.mark.slow),
    ],
)
def test_users_come_and_go_in_a_compiled_batch(slots, graphs):
    """Slots that nobody needs repeat a user, and one graph serves all calls. Without them there is a graph for the
    first number of rows, one for every other, and one for a single row, as there is without guidance."""
    arm, everyone, compiler = tiny_arm(tiny_llama(0, num_hidden_layers=1)), users(), Compiler()
    base, guide = arm.get_base_model(), PARMLogitsProcessor(arm, everyone[0].preference)
    cache = StaticCache(config=base.config, max_cache_len=32)
    for membership in MEMBERSHIP:
        members = [everyone[i] for i in membership]
        others = [User(members[0].text, members[0].preference, members[0].beta)] * ((slots or 0) - len(members))
        take_turn(base, guide, members + others, past_key_values=cache, **compiler.own_cache)
        cache.reset()
    assert len(compiler.graphs) == graphs
    for user in everyone:
        assert user.written == alone(base, arm, user)


def test_users_of_several_reward_models():
    """GenARM with two adapters on the base, both with some weight: α and β of a row weigh their answers."""
    model, everyone = lora_model("helpful", "harmless"), users()[1:5]
    base, arms = model.get_base_model(), {"helpful": "helpful", "harmless": "harmless"}

    def decode(members):
        preferences, betas = torch.stack([u.preference for u in members]), [u.beta for u in members]
        guide = GenARMLogitsProcessor(arms, preferences, betas, adapters_of=model)
        inputs = padded([user.prompt for user in members])
        output = base.generate(**inputs, max_new_tokens=8, eos_token_id=-1, logits_processor=[guide])
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = decode(everyone)
    assert together == [decode([user])[0] for user in everyone]


CONFIG = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=1)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING, logging.CRITICAL])
@pytest.mark.parametrize("warmup", [True, False])
def test_generate_batch_is_refused_and_does_not_drop_guidance(warmup, level):
    """transformers' continuous batching takes any argument, and ignores it."""
    base, root = tiny_llama(0), logging.getLogger()
    before = root.level
    root.setLevel(level)
    try:
        with pytest.raises(NotImplementedError, match="drops logits processors"):
            guide = PARMLogitsProcessor(tiny_arm(tiny_llama(0)))
            base.generate_batch([[5, 9, 33]], generation_config=CONFIG, warmup=warmup, logits_processor=[guide])
    finally:
        root.setLevel(before)


def test_the_last_tokens_alone_are_refused():
    """What a processor would get that was put into a `ContinuousBatchingManager`: not whose tokens they are."""
    guide = PARMLogitsProcessor(tiny_arm(tiny_llama(0)))
    with pytest.raises(
        NotImplementedError, match=r"all tokens of every row, of shape \(rows, length\), but got \(2,\)"
    ):
        guide(torch.tensor([33, 2]), torch.zeros(2, 64))


def test_listening_for_continuous_batching_leaves_its_log_as_it_was():
    logger, root = logging.getLogger("ContinuousBatchingLogger"), logging.getLogger()
    before = logger.level, root.level
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.levelno)
    logger.addHandler(handler)
    try:
        for above, chosen in ((logging.WARNING, None), (logging.INFO, None), (logging.ERROR, logging.INFO)):
            root.setLevel(above)
            if chosen is not None:
                logger.setLevel(chosen)
            seen.clear()
            for level in (logging.INFO, logging.WARNING, logging.ERROR):
                logger.log(level, "text")
            assert seen == [one for one in (logging.INFO, logging.WARNING, logging.ERROR) if one >= (chosen or above)]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        root.setLevel(before[1])
