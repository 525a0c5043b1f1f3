# SPDX-License-Identifier: Apache-2.0
"""Base and guides in one forward: the same answers as two, for every formula in every mode, and half the forwards."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from test_decoders import BETAS, MASK, MODES, PROMPTS, ROWS, fed_tokens
from test_guides import lora_model, tiny_mistral
from transformers.utils import logging

from peft_pblora import MoSLoraConfig, SVDLoraConfig, set_preference
from trl_parm import (
    BASE,
    LM,
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
)


def conditioned(config, **settings):
    torch.manual_seed(5)
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_weights": False, **settings}
    return get_peft_model(tiny_llama(0), config(objectives=["a", "b"], **settings)).eval()


FORMULAS = {
    "PARM": (lambda: tiny_arm(tiny_llama(0)), lambda m, **s: PARMLogitsProcessor(m, [0.3, 0.7], beta=0.8, **s)),
    "PARM, α and β a row": (
        lambda: tiny_arm(tiny_llama(0)), lambda m, **s: PARMLogitsProcessor(m, ROWS, beta=BETAS, **s)
    ),
    "PARM, GPT-2": (
        lambda: tiny_arm(tiny_gpt2(0), target_modules=["c_attn"]), lambda m, **s: PARMLogitsProcessor(m, ROWS[1], **s)
    ),
    "PARM, sliding window": (lambda: tiny_arm(tiny_mistral(0)), lambda m, **s: PARMLogitsProcessor(m, ROWS[1], **s)),
    "SVD-LoRA, α a row": (lambda: conditioned(SVDLoraConfig), lambda m, **s: PARMLogitsProcessor(m, ROWS, **s)),
    "MoSLoRA": (lambda: conditioned(MoSLoraConfig), lambda m, **s: PARMLogitsProcessor(m, [0.5, 0.5], **s)),
    "a preference that the model has": (lambda: tiny_arm(tiny_llama(0)), lambda m, **s: PARMLogitsProcessor(m, **s)),
    "GenARM": (
        lambda: lora_model("helpful", "harmless"),
        lambda m, **s: GenARMLogitsProcessor({"a": "helpful", "b": "harmless"}, [0.4, 0.6], adapters_of=m, **s),
    ),
    "MOD": (
        lambda: lora_model("helpful", "harmless"),
        lambda m, **s: MODLogitsProcessor(
            {"a": "helpful", "b": "harmless", "c": BASE}, [0.2, 0.3, 0.5], "forward_kl", adapters_of=m, **s
        ),
    ),
    "MOD-w2s": (
        lambda: lora_model("helpful", "harmless"),
        lambda m, **s: MODWeakToStrongLogitsProcessor(
            {"a": "helpful", "b": "harmless"}, LM(m, disable_adapter=True, **s), [0.4, 0.6], adapters_of=m, **s
        ),
    ),
    "two preferences, one for each row, and none": (
        lambda: tiny_arm(tiny_llama(0)),
        lambda m, **s: GuidedLogitsProcessor(
            BASE + LM(m, ROWS, **s) - 0.5 * LM(m, [0.5, 0.5], **s) + 0.2 * LM(m, disable_adapter=True, **s)
        ),
    ),
}  # fmt: skip
ALONE = [mode for mode, settings in MODES.items() if "assistant" in settings or mode == "no cache"]


def generate(model, processor, prompts=3, assistant=None, **mode):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, **mode}
    if assistant:
        settings["assistant_model"] = tiny_llama(4)
    ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    base = model.get_base_model()
    return base.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **settings)


def base_forwards(model) -> list[int]:
    """The rows of every forward of the base model, from now on: of its own ones, and of those of its guides."""
    rows = []
    decoder = model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", FORMULAS, ids=str)
def test_one_forward_answers_as_two(name, mode, monkeypatch):
    make, formula = FORMULAS[name]
    settings, model = MODES[mode], make()
    if settings.get("prompts") == 1 and "row" in name:
        pytest.skip("it has a preference for each of three rows")
    own = []
    feed = LM.feed
    monkeypatch.setattr(LM, "feed", lambda self, *args: (own.append(self), feed(self, *args))[1])
    joint = generate(model, formula(model), **settings)
    assert bool(own) == (mode in ALONE)
    separate = generate(model, formula(model, shared_forward=False), **settings)
    assert torch.equal(joint.sequences, separate.sequences)
    for ours, theirs in zip(joint.scores, separate.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_each_token_costs_one_forward_of_all_rows():
    model = lora_model("helpful", "harmless")
    rows = base_forwards(model)
    generate(model, FORMULAS["GenARM"][1](model), max_new_tokens=6)
    assert rows == [9] * 6
    rows.clear()
    generate(model, FORMULAS["MOD-w2s"][1](model), max_new_tokens=6)
    assert rows == [9] * 6


def test_guides_on_one_small_model_run_in_one_forward():
    """Weak to strong: each token costs the small model one forward of all its adapters."""
    small, base = lora_model("helpful", "harmless"), tiny_llama(6)
    rows = base_forwards(small)
    for name, guides in (("GenARM", 2), ("MOD-w2s", 3)):
        texts = []
        for shared in (True, False):
            rows.clear()
            processor = FORMULAS[name][1](small, shared_forward=shared)
            texts.append(
                base.generate(
                    PROMPTS, attention_mask=MASK, max_new_tokens=6, num_beams=2, eos_token_id=-1,
                    logits_processor=[processor],
                )
            )  # fmt: skip
            assert rows == ([6 * guides] * 6 if shared else [6] * 6 * guides)
        assert torch.equal(*texts)


def test_guides_on_one_small_model_follow_changes_between_calls():
    """The very same prompt tensor, with other weights and another preference."""
    base, small = tiny_llama(6), tiny_arm(tiny_llama(1))
    texts = []
    for shared in (True, False):
        first, second = LM(small, [0.9, 0.1], shared_forward=shared), LM(small, [0.2, 0.8], shared_forward=shared)
        guide, found = GuidedLogitsProcessor(BASE + first - 0.5 * second), []
        for preference in ([0.9, 0.1], [0.0, 1.0]):
            first.set_preference(preference)
            found.append(base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, logits_processor=[guide]))
        texts.append(found)
    assert not torch.equal(texts[0][0], texts[0][1])
    for ours, theirs in zip(*texts):
        assert torch.equal(ours, theirs)


def test_a_prompt_in_many_rows_is_read_once():
    """A sweep: one prompt at eleven preferences. The base model reads it once, the guide once for each preference."""
    model, grid = tiny_arm(tiny_llama(0)), torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
    fed = fed_tokens(model.get_base_model().get_decoder())
    rows = base_forwards(model)
    ids = PROMPTS[1:2].repeat(11, 1)
    sweep = model.get_base_model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, logits_processor=[PARMLogitsProcessor(model, grid)]
    )
    assert rows[0] == 12
    assert rows[1:] == [22] * (len(rows) - 1)
    assert fed[0] == 5
    for preference, row in zip(grid, sweep):
        alone = model.get_base_model().generate(
            PROMPTS[1:2], attention_mask=MASK[1:2], max_new_tokens=8,
            logits_processor=[PARMLogitsProcessor(model, preference)],
        )  # fmt: skip
        assert torch.equal(alone[0], row[: alone.shape[1]])
    rows.clear()
    generate(model, PARMLogitsProcessor(model, ROWS), num_beams=4)
    assert rows[0] == 6
    assert rows[1] == 24


def test_padded_prompts_that_differ_in_the_mask_alone_are_different():
    model, ids = tiny_arm(tiny_llama(0)), torch.tensor([[0, 0, 7, 8], [0, 0, 7, 8], [0, 0, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    base, processor = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    together = base.generate(ids, attention_mask=mask, max_new_tokens=6, logits_processor=[processor])
    for i in range(3):
        alone = base.generate(
            ids[i : i + 1], attention_mask=mask[i : i + 1], max_new_tokens=6,
            logits_processor=[PARMLogitsProcessor(model, [0.3, 0.7])],
        )  # fmt: skip
        assert torch.equal(alone[0], together[i, : alone.shape[1]])


def test_calls_with_other_preferences_and_weights_follow_each_other():
    model, separate = tiny_arm(tiny_llama(0)), []
    for shared in (True, False):
        processor = PARMLogitsProcessor(model, shared_forward=shared)
        texts = []
        for preference in ([1.0, 0.0], [0.0, 1.0]):
            set_preference(model, preference)
            texts.append(generate(model, processor).sequences)
        texts.append(generate(model, PARMLogitsProcessor(model, ROWS, shared_forward=shared)).sequences)
        texts.append(generate(model, PARMLogitsProcessor(model, [0.5, 0.5], shared_forward=shared)).sequences)
        separate.append(texts)
    for joint, two in zip(*separate):
        assert torch.equal(joint, two)


@pytest.mark.parametrize("change", ["preference", "weights"])
def test_a_change_while_generate_runs_is_noticed(change):
    """The rows of the guide were computed with the old one: they are given up, and the guide runs on its own."""

    def changing(model):
        def processor(input_ids, scores):
            if input_ids.shape[1] == 8:
                if change == "preference":
                    set_preference(model, [0.0, 1.0])
                else:
                    model.base_model.model.model.layers[0].self_attn.q_proj.adapters["default"].B.weight.data *= 3
                    torch.nn.init.ones_(
                        model.base_model.model.model.layers[1].self_attn.q_proj.adapters["default"].core.W1
                    )
            return scores

        return processor

    texts = []
    for shared in (True, False):
        model = tiny_arm(tiny_llama(0))
        set_preference(model, [1.0, 0.0])
        guide = PARMLogitsProcessor(model, beta=0.5, shared_forward=shared)
        texts.append(
            model.get_base_model().generate(
                PROMPTS, attention_mask=MASK, max_new_tokens=10, logits_processor=[guide, changing(model)]
            )
        )
    assert torch.equal(*texts)


def test_the_cache_that_generate_returns_goes_on_with_and_without_guidance():
    model = tiny_arm(tiny_llama(0))
    base, processor = model.get_base_model(), PARMLogitsProcessor(model, [0.3, 0.7])
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "eos_token_id": -1}
    first = base.generate(PROMPTS, attention_mask=MASK, logits_processor=[processor], **settings)
    ids = torch.cat([first.sequences, torch.full((3, 2), 9)], 1)
    mask = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    for guide in ([processor], []):
        cache = copy.deepcopy(first.past_key_values)
        with nullcontext() if guide else model.disable_adapter():
            went_on = base.generate(
                ids, attention_mask=mask, past_key_values=cache, logits_processor=guide, **settings
            )
            anew = base.generate(ids, attention_mask=mask, logits_processor=guide, **settings)
        assert torch.equal(went_on.sequences, anew.sequences)


def test_hidden_states_are_those_of_the_base_model():
    model = tiny_arm(tiny_llama(0))
    settings = {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 3}
    model.get_base_model().set_attn_implementation("eager")
    joint = generate(model, PARMLogitsProcessor(model, [0.3, 0.7]), **settings)
    two = generate(model, PARMLogitsProcessor(model, [0.3, 0.7], shared_forward=False), **settings)
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(joint, name), getattr(two, name)):
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "guide", "reason"),
    [
        ({"use_cache": False}, {}, "needs the default cache or a static one"),
        ({"prompts": 1, "assistant": True}, {}, "an assistant asks the guides"),
        ({}, {"shared_forward": False}, "was switched off"),
        ({}, {"prompt": Prompt({"input_ids": PROMPTS, "attention_mask": MASK})}, "has a prompt"),
    ],
)
def test_what_can_not_be_joined_says_so(settings, guide, reason, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("trl_parm.decoding.backbone"), "warning_once", said.append, raising=False)
    model = tiny_arm(tiny_llama(0))
    generate(model, PARMLogitsProcessor(model, [0.3, 0.7], **guide), **settings)
    assert said
    assert reason in said[0]
    assert "not in one forward with it" in said[0]


def dora():
    torch.manual_seed(5)
    settings = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False
    )
    return get_peft_model(tiny_llama(0), settings).eval()


def with_embeddings():
    torch.manual_seed(5)
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(tiny_llama(0), settings).eval()


def with_saved_modules():
    model = tiny_arm(tiny_llama(0), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dora, "is a variant of LoRA"),
        (with_embeddings, "has a Embedding"),
        (with_saved_modules, "has a ModulesToSave"),
    ],
)
def test_adapters_that_can_not_act_on_rows_run_on_their_own(make, reason, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("trl_parm.decoding.backbone"), "warning_once", said.append, raising=False)
    model = make()
    alone = copy.deepcopy(model)
    ours = generate(model, PARMLogitsProcessor(model)).sequences
    assert reason in said[0]
    expected = tiny_llama(0).generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=10, logits_processor=[PARMLogitsProcessor(alone)]
    )
    assert torch.equal(ours, expected)


def test_nothing_is_said_where_all_is_joined(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("trl_parm.decoding.backbone"), "warning_once", said.append, raising=False)
    model = tiny_arm(tiny_llama(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(model, PARMLogitsProcessor(model, [0.3, 0.7]))
        generate(model, PARMLogitsProcessor(model, ROWS), num_beams=3)
    assert said == []
