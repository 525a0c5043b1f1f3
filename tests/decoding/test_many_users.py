# SPDX-License-Identifier: Apache-2.0
"""Users in one batch, each with a prompt, a preference and a β of their own, who come and go between calls.

Whoever is in the batch, and whoever leaves or joins it, nobody's text changes.
"""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.tables import DOORS, PROMPTS, ROWS, fed_rows, lora_model

from peft_pblora import PBLoraConfig, preference_grid, set_preference
from trl_parm.decoding import PARM, GenARM, GenARMLogitsProcessor, PARMLogitsProcessor


TURN = 4
# A processor takes a pad token in a prompt for padding, so nobody writes one.
SETTINGS = {"eos_token_id": -1, "pad_token_id": 0, "suppress_tokens": [0]}


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


def take_turn(base, arm, members: list[User], guide=None) -> None:
    """One call of `generate` for some users, at their preferences: each writes a few tokens more.

    By a processor if there is one, else by a guided model of this call's own.
    """
    inputs = padded([user.text for user in members])
    preferences, betas = torch.stack([user.preference for user in members]), [user.beta for user in members]
    model, processors = base, [guide]
    if guide is None:
        model, processors = PARM(base, arm, preferences, betas), []
    else:
        guide.set(preferences, betas)
    output = model.generate(**inputs, max_new_tokens=TURN, **SETTINGS, logits_processor=processors)
    for user, row in zip(members, output[:, inputs["input_ids"].shape[1] :]):
        user.written += row.tolist()


def alone(base, arm, user: User) -> list[int]:
    """What the user gets in one call without anybody else."""
    output = PARM(base, arm, user.preference, user.beta).generate(
        torch.tensor([user.prompt]), max_new_tokens=len(user.written), **SETTINGS
    )
    return output[0, len(user.prompt) :].tolist()


@pytest.mark.parametrize("same_prompt", [False, True], ids=["prompts of their own", "the same prompt"])
@pytest.mark.parametrize("shared", [True, False], ids=["on the base", "apart"])
@pytest.mark.parametrize("door", DOORS)
def test_nobodys_text_depends_on_who_else_is_in_the_batch(door, shared, same_prompt):
    """Batches of one to four rows, of six users; one processor serves all calls. With the same prompt in all rows
    nothing but α and β can tell them apart."""
    arm, everyone = tiny_arm(tiny_llama(0)), users()
    base = arm.get_base_model() if shared else tiny_llama(2)
    for user in everyone if same_prompt else ():
        user.prompt = [7, 8, 20]
    guide = PARMLogitsProcessor(arm, everyone[0].preference) if door == "processor" else None
    for members in MEMBERSHIP:
        take_turn(base, arm, [everyone[i] for i in members], guide)
    assert sorted(len(user.written) // TURN for user in everyone) == [2, 3, 3, 3, 3, 4]
    for user in everyone:
        assert user.written == alone(base, arm, user)
    assert len({tuple(user.written) for user in everyone}) >= 4


@pytest.mark.parametrize("door", DOORS)
def test_users_of_several_reward_models(door):
    """GenARM with two adapters on the base, both with some weight: α and β of a row weigh their answers."""
    model, everyone = lora_model("helpful", "harmless"), users()[1:5]
    base, arms = model.get_base_model(), {"helpful": "helpful", "harmless": "harmless"}

    def decode(members):
        preferences, betas = torch.stack([u.preference for u in members]), [u.beta for u in members]
        inputs = padded([user.prompt for user in members])
        if door == "model":
            guided, processors = GenARM(base, arms, preferences, betas, adapters_of=model), []
        else:
            guided, processors = base, [GenARMLogitsProcessor(arms, preferences, betas, adapters_of=model)]
        output = guided.generate(**inputs, max_new_tokens=8, **SETTINGS, logits_processor=processors)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = decode(everyone)
    assert together == [decode([user])[0] for user in everyone]


SAME = PROMPTS[1:2].repeat(3, 1)
WHERE = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "one prompt": {"ids": SAME},
    "one prompt, beams": {"ids": SAME, "num_beams": 2},
    "a common start": {"ids": torch.cat([torch.arange(20, 30).repeat(3, 1), (SAME + PROMPTS) % 60 + 2], 1)},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", WHERE)
@pytest.mark.parametrize("shared", [True, False], ids=["on the base", "apart"])
@pytest.mark.parametrize("door", DOORS)
def test_preferences_of_rows_that_are_set_in_the_model_are_those_that_are_given(door, shared, mode):
    arm = tiny_arm(tiny_llama(0))
    base = arm.get_base_model() if shared else tiny_llama(2)
    settings = {"ids": PROMPTS, **WHERE[mode], "max_new_tokens": 6, "eos_token_id": -1}
    ids = settings.pop("ids")
    settings["attention_mask"] = (ids != 0).long()
    expected = PARM(base, arm, ROWS, beta=0.5).generate(ids, **settings)
    set_preference(arm, ROWS)
    if door == "model":
        found = PARM(base, arm, beta=0.5).generate(ids, **settings)
    else:
        found = base.generate(ids, **settings, logits_processor=[PARMLogitsProcessor(arm, beta=0.5)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", WHERE)
@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]], ids=" ".join)
def test_several_adapters_of_one_guide_have_rows_of_their_own_preferences(order, mode):
    base, arm, three = tiny_llama(2), tiny_arm(tiny_llama(0)), ["helpful", "harmless", "brief"]
    arm.add_adapter("second", PBLoraConfig(objectives=three, target_modules=["q_proj"], r1=2, r2=3, lora_alpha=6))
    for name, weight in arm.named_parameters():
        if name.endswith("B.weight") and "second" in name:
            torch.nn.init.normal_(weight, std=0.5)
    arm.base_model.set_adapter(order)
    further = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    settings = {**WHERE[mode], "max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
    ids = settings.pop("ids", PROMPTS)
    expected = []
    for row, (α, α3) in enumerate(zip(ROWS, further)):
        set_preference(arm, α, "default")
        set_preference(arm, α3, "second")
        one = ids[row : row + 1]
        expected += PARM(base, arm, beta=0.5).generate(one, attention_mask=(one != 0).long(), **settings).tolist()
    set_preference(arm, ROWS, "default")
    set_preference(arm, further, "second")
    found = PARM(base, arm, beta=0.5).generate(ids, attention_mask=(ids != 0).long(), **settings)
    assert found.tolist() == expected


def test_rows_that_end_leave_others_at_the_preferences_that_are_set_in_the_model():
    base, arm, rows, ends = tiny_llama(0), tiny_arm(tiny_llama(1)), ROWS[[0, 1, 2, 1]], list(range(40, 64))
    ids = torch.tensor([[7, 8, 20, 41, 2], [3, 8, 20, 41, 2], [9, 8, 20, 41, 2], [4, 8, 20, 41, 2]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": ends}
    expected = PARM(base, arm, rows, beta=0.5).generate(ids, **settings)
    fed = fed_rows(arm)
    set_preference(arm, rows)
    assert torch.equal(PARM(base, arm, beta=0.5).generate(ids, **settings, end_tokens=ends), expected)
    assert fed[-1] < 4


def test_preferences_of_other_rows_that_are_set_in_the_model_are_refused():
    base, arm = tiny_llama(0), tiny_arm(tiny_llama(1))
    set_preference(arm, ROWS)
    with pytest.raises(ValueError, match="for 3 rows, but the batch has 6"):
        PARM(base, arm).generate(PROMPTS.repeat(2, 1), max_new_tokens=1)
