# SPDX-License-Identifier: Apache-2.0
"""Guidance against a naive reference: float64, no cache, every model run on the whole prefix at every call."""

import copy

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from transformers import LogitsProcessor

from peft_pblora import set_preference
from trl_parm import BASE, LM, GuidedLogitsProcessor, PARMLogitsProcessor, Prompt


PROMPTS = torch.tensor([[0, 0, 5, 9, 33], [7, 8, 20, 41, 2], [0, 6, 6, 50, 11]])
MASK = (PROMPTS != 0).long()


class NaiveProcessor(LogitsProcessor):
    """log π_base + w · log π_ARM, computed anew from the whole prefix in float64."""

    def __init__(self, arm, preference, beta, mask=None):
        self.arm, self.preference, self.beta = copy.deepcopy(arm).double(), preference, beta
        self.mask = mask

    def __call__(self, input_ids, scores):
        mask = torch.ones_like(input_ids)
        if self.mask is not None:
            mask[:, : self.mask.shape[1]] = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)
        if self.preference is not None:
            set_preference(self.arm, self.preference)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = self.arm(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        return torch.log_softmax(scores.double(), -1) + torch.log_softmax(logits, -1) / self.beta


def generate(model, processor, prompts=PROMPTS, mask=MASK, seed=0, **mode):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True, **mode}
    return model.generate(input_ids=prompts, attention_mask=mask, logits_processor=[processor], **settings)


def test_guidance_changes_the_text():
    base, arm = tiny_llama(0), tiny_arm()
    texts = {
        tuple(generate(base, PARMLogitsProcessor(arm, p, beta=0.3)).sequences.flatten().tolist())
        for p in ([1.0, 0.0], [0.0, 1.0])
    }
    assert len(texts) == 2


def test_log_probabilities_are_the_formula():
    """One step, against the equation in float64: no division by the sum of weights, −inf kept."""
    base, arm = tiny_llama(0).double(), tiny_arm().double()
    ids = torch.randint(2, 64, (3, 6))
    set_preference(arm, [0.5, 0.5])
    with torch.no_grad():
        scores, guide = base(ids).logits[:, -1], arm(ids).logits[:, -1]
    scores[:, 7] = -torch.inf
    guided = PARMLogitsProcessor(arm, [0.5, 0.5], beta=2.0)(ids, scores)
    expected = torch.log_softmax(scores, -1) + 0.5 * torch.log_softmax(guide, -1)
    torch.testing.assert_close(guided.double(), expected, atol=1e-5, rtol=1e-5)
    assert (guided[:, 7] == -torch.inf).all()


def test_one_processor_serves_many_calls():
    """Other prompts, other batch sizes, the same prompt again: nothing leaks from one call to the next."""
    base, arm = tiny_llama(0), tiny_arm()
    processor = PARMLogitsProcessor(arm, [0.3, 0.7])
    naive = NaiveProcessor(arm, [0.3, 0.7], 1.0)
    full = PROMPTS.where(PROMPTS != 0, 3)
    for prompts in (full, full[:1], full[:2, :3], full, full[1:], full[:1]):
        mask = torch.ones_like(prompts)
        expected = generate(base, naive, prompts, mask).sequences
        assert torch.equal(generate(base, processor, prompts, mask).sequences, expected)


def test_two_preferences_on_one_arm_interleaved():
    base, arm = tiny_llama(0), tiny_arm()
    processors = [PARMLogitsProcessor(arm, p) for p in ([1.0, 0.0], [0.0, 1.0])]
    ids = torch.randint(2, 64, (2, 4))
    for _ in range(5):
        scores = base(ids).logits[:, -1].detach()
        for processor, preference in zip(processors, ([1.0, 0.0], [0.0, 1.0])):
            naive = NaiveProcessor(arm, preference, 1.0)(ids, scores)
            torch.testing.assert_close(processor(ids, scores).double(), naive, atol=1e-4, rtol=1e-5)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)


def test_preference_of_the_arm_is_used_and_its_change_noticed():
    base, arm = tiny_llama(0), tiny_arm()
    processor = PARMLogitsProcessor(arm)
    ids = torch.randint(2, 64, (2, 4))
    scores = base(ids).logits[:, -1].detach()
    for preference in ([1.0, 0.0], [0.0, 1.0]):
        set_preference(arm, preference)
        naive = NaiveProcessor(arm, preference, 1.0)(ids, scores)
        torch.testing.assert_close(processor(ids, scores).double(), naive, atol=1e-4, rtol=1e-5)


def test_trained_arm_is_noticed():
    base, arm = tiny_llama(0), tiny_arm()
    processor = PARMLogitsProcessor(arm, [0.5, 0.5])
    ids = torch.randint(2, 64, (2, 4))
    scores = base(ids).logits[:, -1].detach()
    before = processor(ids, scores)
    with torch.no_grad():
        arm.base_model.model.model.layers[1].self_attn.v_proj.adapters["default"].A.weight.mul_(3)
    after = processor(ids, scores)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.double(), NaiveProcessor(arm, [0.5, 0.5], 1.0)(ids, scores), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shift", ["roll back", "reorder", "fewer rows", "more rows", "fork"])
def test_any_prefix_in_any_order(shift):
    base, arm = tiny_llama(0), tiny_arm()
    processor, naive = PARMLogitsProcessor(arm, [0.2, 0.8]), NaiveProcessor(arm, [0.2, 0.8], 1.0)
    ids = torch.randint(2, 64, (3, 9))
    following = {
        "roll back": ids[:, :5],
        "reorder": torch.cat([ids[[2, 0, 0]], torch.full((3, 1), 9)], dim=1),
        "fewer rows": ids[[2, 1]],
        "more rows": ids[[0, 0, 1, 1, 2, 2]],
        "fork": torch.cat([ids[:, :6], torch.randint(2, 64, (3, 5))], dim=1),
    }[shift]
    for prefix in (ids[:, :4], ids[:, :5], ids, following, ids):
        scores = base(prefix).logits[:, -1].detach()
        expected = naive(prefix, scores)
        torch.testing.assert_close(processor(prefix, scores).double(), expected, atol=1e-4, rtol=1e-5)


def test_arm_is_fed_every_token_once(monkeypatch):
    base, arm = tiny_llama(0), tiny_arm()
    fed = []
    forward = arm.base_model.model.forward
    monkeypatch.setattr(
        arm.base_model.model, "forward", lambda *a, **k: (fed.append(k["input_ids"].shape[1]), forward(*a, **k))[1]
    )
    sequences = generate(base, PARMLogitsProcessor(arm, [0.3, 0.7]), max_new_tokens=12).sequences
    assert sum(fed) == sequences.shape[1] - 1
    assert len(fed) == 12


def test_left_padding_with_absolute_positions():
    """GPT-2 is not shift-invariant, so a wrong position shows."""
    base, arm = tiny_gpt2(0), tiny_gpt2(1)
    guided = generate(base, PARMLogitsProcessor(arm))
    naive = generate(base, NaiveProcessor(arm, None, 1.0, MASK))
    assert torch.equal(guided.sequences, naive.sequences)


def test_explicit_mask_where_padding_can_not_be_told():
    """A single row, padded: only the mask knows."""
    base, arm = tiny_llama(0), tiny_arm()
    processor = PARMLogitsProcessor(arm, [0.3, 0.7], prompt=Prompt({"attention_mask": MASK[:1]}))
    naive = NaiveProcessor(arm, [0.3, 0.7], 1.0, MASK[:1])
    guided = generate(base, processor, PROMPTS[:1], MASK[:1], num_beams=2)
    assert torch.equal(guided.sequences, generate(base, naive, PROMPTS[:1], MASK[:1], num_beams=2).sequences)
    with pytest.raises(ValueError, match="does not fit input ids"):
        PARMLogitsProcessor(arm, prompt=Prompt({"attention_mask": MASK[:2]}))(PROMPTS, torch.zeros(3, 64))


def test_inputs_are_not_changed():
    arm = tiny_arm()
    ids, scores = torch.randint(2, 64, (2, 4)), torch.randn(2, 64)
    ids_before, scores_before = ids.clone(), scores.clone()
    PARMLogitsProcessor(arm, [0.3, 0.7])(ids, scores)
    assert torch.equal(ids, ids_before)
    assert torch.equal(scores, scores_before)


def test_bfloat16_arm_guides_float32_base():
    arm = tiny_arm().to(torch.bfloat16)
    assert generate(tiny_llama(0), PARMLogitsProcessor(arm, [0.3, 0.7])).scores[0].dtype == torch.float32


def test_sharpened_control_is_the_untrained_arm():
    arm = tiny_arm()
    ids, scores = torch.randint(2, 64, (2, 4)), torch.randn(2, 64)
    untrained = GuidedLogitsProcessor(BASE + LM(arm, disable_adapter=True))(ids, scores)
    torch.testing.assert_close(untrained, GuidedLogitsProcessor(BASE + LM(tiny_llama(1)))(ids, scores))


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), "1"])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="must be a positive, finite number"):
        PARMLogitsProcessor(tiny_arm(), [0.5, 0.5], beta=beta)


@pytest.mark.parametrize(
    ("arm", "preference", "message"),
    [
        (tiny_arm, {"helpful": 1.0, "harm": 0.0}, "Did you mean 'harmless'"),
        (tiny_arm, [0.2, 0.2], "must sum to 1"),
        (tiny_arm, [0.2, 0.2, 0.6], "has 3 entries, but this adapter was trained for 2"),
        (tiny_llama, [0.5, 0.5], "has no preference-conditioned adapter"),
    ],
)
def test_bad_preference(arm, preference, message):
    with pytest.raises(ValueError, match=message):
        PARMLogitsProcessor(arm(), preference)


def test_another_vocabulary_is_refused_before_the_first_token():
    with pytest.raises(ValueError, match="vocabulary of 80, but the base model one of 64"):
        generate(tiny_llama(0), PARMLogitsProcessor(tiny_arm(tiny_llama(1, vocab_size=80)), [0.5, 0.5]))


def test_a_batch_for_a_model_without_pad_token():
    arm = tiny_llama(1, pad_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="names neither a pad token nor an end token"):
        PARMLogitsProcessor(arm)(PROMPTS, torch.zeros(3, 64))
    PARMLogitsProcessor(arm)(PROMPTS[:1], torch.zeros(1, 64))
    PARMLogitsProcessor(arm, prompt=Prompt({"attention_mask": MASK}))(PROMPTS, torch.zeros(3, 64))


def test_formulas():
    arm = tiny_arm()
    guide, other = LM(arm), LM(tiny_llama(2))
    ids, scores = torch.randint(2, 64, (2, 4)), torch.randn(2, 64)
    formula = 2 * (BASE + guide / 4 - other) - BASE + 0 * LM(tiny_llama(3)) + other
    assert repr(formula) == "1 * BASE + 0.5 * LM(PeftModelForCausalLM) + -1 * LM(LlamaForCausalLM)"
    direct = BASE(ids, scores) + 0.5 * guide(ids, scores) - other(ids, scores)
    torch.testing.assert_close(formula(ids, scores), direct)
    assert (guide - guide).terms() == []
    with pytest.raises(TypeError):
        BASE + 1
    with pytest.raises(ValueError, match="must be finite"):
        BASE * float("nan")
    with pytest.raises(TypeError, match="must be a scorer"):
        GuidedLogitsProcessor(arm)
