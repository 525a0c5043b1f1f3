# SPDX-License-Identifier: Apache-2.0
"""Terms of one set of weights run in one forward: half the forwards, the same answers."""

import copy

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from decoding.tables import (
    BETAS,
    MASK,
    MODES,
    PROMPTS,
    ROWS,
    fed_rows,
    fed_tokens,
    log_probs,
    lora_model,
    tiny_mistral,
)
from peft import LoraConfig, get_peft_model

from peft_pblora import MoSLoraConfig, SVDLoraConfig, set_preference
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, Prompt
from trl_parm.decoding import genarm, mod, mod_w2s, parm


def conditioned(config, **settings):
    torch.manual_seed(5)
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_weights": False, **settings}
    return get_peft_model(tiny_llama(0), config(objectives=["a", "b"], **settings)).eval()


ARMS = {"a": "helpful", "b": "harmless"}
FORMULAS = {
    "PARM": (lambda: tiny_arm(tiny_llama(0)), lambda m: parm(m, [0.3, 0.7], beta=0.8)),
    "PARM, α and β a row": (lambda: tiny_arm(tiny_llama(0)), lambda m: parm(m, ROWS, beta=BETAS)),
    "PARM, GPT-2": (lambda: tiny_arm(tiny_gpt2(0), target_modules=["c_attn"]), lambda m: parm(m, ROWS[1])),
    "PARM, sliding window": (lambda: tiny_arm(tiny_mistral(0)), lambda m: parm(m, ROWS[1])),
    "SVD-LoRA, α a row": (lambda: conditioned(SVDLoraConfig), lambda m: parm(m, ROWS)),
    "MoSLoRA": (lambda: conditioned(MoSLoraConfig), lambda m: parm(m, [0.5, 0.5])),
    "a preference that the model has": (lambda: tiny_arm(tiny_llama(0)), lambda m: parm(m)),
    "GenARM": (lambda: lora_model("helpful", "harmless"), lambda m: genarm(ARMS, [0.4, 0.6], adapters_of=m)),
    "MOD": (
        lambda: lora_model("helpful", "harmless"),
        lambda m: mod({**ARMS, "c": BASE}, [0.2, 0.3, 0.5], "forward_kl", adapters_of=m),
    ),
    "MOD-w2s": (
        lambda: lora_model("helpful", "harmless"),
        lambda m: mod_w2s(ARMS, LM(m, disable_adapter=True), [0.4, 0.6], adapters_of=m),
    ),
    "two preferences, one for each row, and none": (
        lambda: tiny_arm(tiny_llama(0)),
        lambda m: BASE + LM(m, ROWS) - 0.5 * LM(m, [0.5, 0.5]) + 0.2 * LM(m, disable_adapter=True),
    ),
}


def generate(guided, prompts=3, assistant=None, **mode):
    settings = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, **mode}
    if assistant:
        settings["assistant_model"] = tiny_llama(4)
    ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    torch.manual_seed(0)
    return guided.generate(input_ids=ids, attention_mask=mask, **settings)


def table():
    for name in FORMULAS:
        for mode in MODES:
            quick = name in ("PARM, α and β a row", "GenARM") or mode in ("greedy", "beam search")
            rows = MODES[mode].get("prompts") == 1 and "row" in name
            if not rows:
                yield pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mode"), list(table()))
def test_one_forward_answers_as_separate_models(name, mode):
    """Each adapter as a model of its own, read beside a base model of its own."""
    make, formula = FORMULAS[name]
    model, settings = make(), MODES[mode]
    joint = generate(Guided(model.get_base_model(), formula(model)), **settings)
    apart = generate(Guided(copy.deepcopy(model).unload(), formula(copy.deepcopy(model))), **settings)
    assert torch.equal(joint.sequences, apart.sequences)
    for ours, theirs in zip(joint.scores, apart.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["GenARM", "MOD-w2s", "two preferences, one for each row, and none"])
def test_each_token_costs_one_forward_of_all_rows(name):
    """Terms that are the base model, as MOD-w2s' reference is, have no rows of their own."""
    make, formula = FORMULAS[name]
    model = make()
    rows = fed_rows(model)
    generate(Guided(model.get_base_model(), formula(model)), max_new_tokens=6)
    assert rows == [9] * 6


@pytest.mark.parametrize(("name", "guides"), [("GenARM", 2), ("MOD-w2s", 3)])
def test_guides_on_one_small_model_run_in_one_forward(name, guides):
    """Weak to strong: a token costs the small model one forward of all its adapters."""
    small, base = FORMULAS[name][0](), tiny_llama(6)
    rows = fed_rows(small)
    text = Guided(base, FORMULAS[name][1](small)).generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=6, num_beams=2, eos_token_id=-1
    )
    assert rows == [3 * guides] + [6 * guides] * 5
    assert text.shape == (3, 11)


def test_a_prompt_in_many_rows_is_read_once():
    """A sweep: one prompt at eleven preferences. The base model reads it once, the guide once for each preference."""
    model, grid = tiny_arm(tiny_llama(0)), torch.stack([torch.linspace(0, 1, 11), torch.linspace(1, 0, 11)], 1)
    fed, rows, base = fed_tokens(model), fed_rows(model), model.get_base_model()
    ids = PROMPTS[1:2].repeat(11, 1)
    sweep = Guided(base, parm(model, grid)).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert rows == [12] + [22] * (len(rows) - 1)
    assert fed[0] == 5
    for preference, row in zip(grid, sweep):
        alone = Guided(base, parm(model, preference)).generate(
            PROMPTS[1:2], attention_mask=MASK[1:2], max_new_tokens=8
        )
        assert torch.equal(alone[0], row[: alone.shape[1]])
    rows.clear()
    generate(Guided(base, parm(model, ROWS)), num_beams=4)
    assert rows[:2] == [6, 24]


def test_padded_prompts_that_differ_in_the_mask_alone_are_different():
    model, ids = tiny_arm(tiny_llama(0)), torch.tensor([[0, 0, 7, 8], [0, 0, 7, 8], [0, 0, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    guided = Guided(model.get_base_model(), parm(model, [0.3, 0.7]))
    together = guided.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert len({tuple(row) for row in together.tolist()}) >= 2
    for i in range(3):
        alone = guided.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], max_new_tokens=6)
        assert torch.equal(alone[0], together[i, : alone.shape[1]])


def test_hidden_states_and_attentions_are_those_of_the_base_model():
    model = tiny_arm(tiny_llama(0))
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    settings = {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 3}
    joint = generate(Guided(base, parm(model, [0.3, 0.7])), **settings)
    alone = Guided(copy.deepcopy(model).unload(), parm(copy.deepcopy(model), [0.3, 0.7]))
    apart = generate(alone, **settings)
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(getattr(joint, name), getattr(apart, name), strict=True):
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x[: len(y)], y, atol=1e-5, rtol=1e-5)
                assert x.shape == y.shape


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


def with_bias():
    torch.manual_seed(5)
    settings = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_bias=True, use_rslora=True,
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny_llama(0), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def with_saved_modules():
    model = tiny_arm(tiny_llama(0), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    return model


@pytest.mark.parametrize("mode", ["greedy", "beam search", "static cache"])
@pytest.mark.parametrize(
    ("make", "forwards"), [(dora, 2), (with_embeddings, 2), (with_saved_modules, 2), (with_bias, 1)]
)
def test_adapters_that_can_not_act_on_rows_run_on_their_own(make, forwards, mode):
    model = make()
    twin, rows = copy.deepcopy(model), fed_rows(model)
    ours = generate(Guided(model.get_base_model(), parm(model)), max_new_tokens=4, **MODES[mode])
    apart = generate(Guided(tiny_llama(0), parm(twin)), max_new_tokens=4, **MODES[mode])
    assert torch.equal(ours.sequences, apart.sequences)
    assert len(rows) == forwards * 4


SAVING = {
    "Llama": with_saved_modules,
    "GPT-2": lambda: tiny_arm(tiny_gpt2(0), target_modules=["c_attn"], modules_to_save=["wpe"]),
    "SVD-LoRA": lambda: conditioned(SVDLoraConfig, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("make", SAVING.values(), ids=SAVING)
@pytest.mark.parametrize("preference", [[1.0, 0.0], [0.0, 1.0], ROWS, None], ids=["first", "second", "rows", "set"])
def test_a_preference_acts_beside_modules_that_were_saved(make, preference):
    """Which can't act on rows, so that the guide has a forward of its own."""
    arm = make()
    with torch.no_grad():
        for name, weight in arm.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1.5)
    set_preference(arm, [0.2, 0.8])
    twin, base = copy.deepcopy(arm), arm.get_base_model()
    with twin.disable_adapter():
        own = log_probs(twin, PROMPTS, mask=MASK)
    expected = torch.log_softmax(own + log_probs(twin, PROMPTS, preference, MASK), -1)
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK}
    for cache in (True, False):
        found = Guided(base, parm(arm, preference))(**inputs, logits_to_keep=1, use_cache=cache).logits[:, -1]
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    scores = own.float()
    found = GuidedLogitsProcessor(parm(arm, preference), Prompt(inputs))(PROMPTS, scores)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
