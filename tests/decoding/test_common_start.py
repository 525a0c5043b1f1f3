# SPDX-License-Identifier: Apache-2.0
"""What prompts begin with is read once, with padding after it, and every text is the one that it is alone."""

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.architectures import tiny
from decoding.tables import fed_rows, lora_model
from transformers import BatchEncoding

from trl_parm import BASE, LM, Guided
from trl_parm.decoding import PARM
from trl_parm.decoding.adapters import Adapters
from trl_parm.decoding.probes import sees_over_padding
from trl_parm.evaluation.decoding import with_common_start


START = [9, 41, 5, 33, 20, 7, 62, 14, 28, 3]
ENDS = [[50, 11, 46, 8], [17], [31, 12, 59], [12]]
OVER_PADDING = {"Llama": True, "GPT-2": True, "OPT": True, "BLOOM": True, "Mixtral": True, "Phi-3": False,
                "Gemma-3": False, "Qwen3-Next": False, "LFM2": False}  # fmt: skip


def padded(texts) -> BatchEncoding:
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})


def alone(make, texts, **settings) -> list[list[int]]:
    """What is written after each text by itself, by the model for its row."""
    found = []
    for row, text in enumerate(texts):
        ids = torch.tensor([text])
        output = make(row).generate(ids, attention_mask=torch.ones_like(ids), **settings)
        found.append(output[0, len(text) :].tolist())
    return found


def test_padding_moves_behind_what_all_begin_with():
    texts = [START + end for end in ENDS]
    given = padded(texts)
    moved = with_common_start(given)
    assert moved["input_ids"].shape == given["input_ids"].shape
    assert (moved["input_ids"][:, :10] == torch.tensor(START)).all()
    for row, text in enumerate(texts):
        assert moved["input_ids"][row][moved["attention_mask"][row] == 1].tolist() == text
        assert moved["attention_mask"][row, -1] == 1
    for same in ([[5, 6, 7], [8, 9]], [[5, 6, 7]], [[5], [5, 6]]):
        ids, mask = padded(same).values()
        found = with_common_start(padded(same))
        assert [r[m == 1].tolist() for r, m in zip(found["input_ids"], found["attention_mask"])] == same
        assert torch.equal(found["attention_mask"], mask) or same[0] == [5]


@pytest.mark.parametrize("name", OVER_PADDING)
def test_a_model_sees_over_padding_or_is_found_not_to(name):
    model = tiny(name)
    assert sees_over_padding(model, Adapters(model)) == OVER_PADDING[name]


@pytest.mark.parametrize("name", OVER_PADDING)
@pytest.mark.parametrize("length", ["one", "several"])
def test_texts_are_those_of_each_prompt_alone(name, length):
    """Also of architectures whose start can't be read by itself, on prompts of one length."""
    model = tiny(name)
    texts = [START + (end if length == "several" else end[:1]) for end in ENDS]
    inputs = padded(texts)
    if OVER_PADDING[name]:
        inputs = with_common_start(inputs)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    guided = Guided(model, BASE + 0.5 * LM(tiny_llama(1)))
    found = guided.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert found.tolist() == alone(lambda row: guided, texts, **settings)


def test_the_start_is_read_once_for_each_adapter_and_preference():
    arm = tiny_arm(tiny_llama(0))
    base, α = arm.get_base_model(), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    rows = fed_rows(base)
    inputs = with_common_start(padded([START + end for end in ENDS] * 2))
    each = α.repeat_interleave(len(ENDS), 0)
    settings = {"max_new_tokens": 5, "pad_token_id": 0}
    found = PARM(base, arm, each).generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert rows[:3] == [1 + 2, 4 + 8, 8 + 8]
    expected = alone(lambda row: PARM(base, arm, each[row]), [START + end for end in ENDS] * 2, **settings)
    ended = [row[: len(one)] for row, one in zip(found.tolist(), expected)]
    assert ended == expected


def test_loras_on_one_backbone():
    model = lora_model("a", "b")
    base = model.get_base_model()
    formula = (
        BASE + 0.6 * LM(model, adapter_name="a") + torch.tensor([0.2, 0.0, 1.0, 0.5]) * LM(model, adapter_name="b")
    )
    texts = [START + end for end in ENDS]
    inputs = with_common_start(padded(texts))
    guided = Guided(base, formula)
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    found = guided.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    plain = guided.generate(**padded(texts), **settings, use_cache=False)[:, inputs["input_ids"].shape[1] :]
    assert found.tolist() == plain.tolist()
    hidden = guided(**inputs, output_hidden_states=True).hidden_states[-1]
    assert hidden.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Mixtral", "Phi-3", "Qwen3-Next", "LFM2"])
def test_rows_that_have_ended_leave_the_batch(name):
    """Each at another step, and nobody else's text changes; so where every row has an α and a weight of its own."""
    model, arm = tiny(name), tiny_arm(tiny_llama(1))
    α = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    formula = lambda rows: BASE + torch.tensor([0.5, 1.0, 2.0, 0.7])[rows] * LM(arm, α[rows])  # noqa: E731
    texts = [START + end for end in ENDS]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(range(40, 64))}
    guided, inputs = Guided(model, formula(slice(4))), padded(texts)
    rows = fed_rows(arm)
    found = guided.generate(**inputs, **settings, end_tokens=settings["eos_token_id"])
    assert rows[-1] < len(texts)
    rows.clear()
    stayed = guided.generate(**inputs, **settings)
    assert set(rows[1:]) == {4}
    assert found.tolist() == stayed.tolist()
    expected = alone(lambda row: Guided(model, formula(slice(row, row + 1))), texts, **settings)
    assert [
        row[: len(one)] for row, one in zip(found[:, inputs["input_ids"].shape[1] :].tolist(), expected)
    ] == expected
    assert len({len(one) for one in expected}) > 1


def test_a_cache_whose_rows_have_left_does_not_go_on():
    guided, inputs = Guided(tiny_llama(0), BASE), padded([START + end for end in ENDS])
    ends = list(range(4, 40))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    found = guided.generate(**inputs, **settings, end_tokens=ends, return_dict_in_generate=True)
    settings["past_key_values"] = found.past_key_values
    assert settings["past_key_values"].staying is not None
    for further in (1, 3):
        ids = torch.cat([found.sequences, torch.full((len(ENDS), further), 41)], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1])], 1
        )
        for option in ({}, {"end_tokens": ends}):
            with pytest.raises(ValueError, match="rows of this GuidedCache have left after one of the `end_tokens`"):
                guided.generate(ids, attention_mask=mask, **settings, **option)


def test_rows_that_have_left_can_not_change_places():
    model = tiny_llama(0)
    inputs = padded([START + end for end in ENDS])
    with pytest.raises(ValueError, match="Leave them out where rows change places"):
        ends = list(range(4, 40))
        Guided(model, BASE).generate(**inputs, num_beams=2, max_new_tokens=6, eos_token_id=1, end_tokens=ends)
