# SPDX-License-Identifier: Apache-2.0
"""Every decoder in every mode of `generate`, by both doors, against its formula in float64, without any cache.

A new decoder is one row of `DECODERS`, a new mode one row of `MODES`. `make test` runs the corners of this table,
`make test-slow` the rest.
"""

import numpy as np
import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.tables import (
    BETAS,
    DECODERS,
    DOORS,
    MASK,
    MODES,
    PROMPTS,
    ROWS,
    Decoder,
    Models,
    NaiveProcessor,
    fed_tokens,
    generate,
)
from scipy.stats import chisquare

from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, MODLogitsProcessor, PARMLogitsProcessor
from trl_parm.decoding import MOD, PARM, GenARM, MODWeakToStrong, genarm, mod, mod_w2s, parm


IN_EVERY_MODE = ("PARM", "GenARM, α and β a row", "MOD-w2s")
FOR_EVERY_DECODER = {"model": ("greedy", "beam search"), "processor": ("several sequences", "prompt lookup")}


def table():
    """Every decoder in every mode. What differs from its neighbours in the formula alone is for `make test-slow`, and
    so is every second one: here an ARM on the base model comes by one door, one apart by the other.

    A preference for each of three rows needs three prompts. Assisted sampling drafts with other numbers in a guided
    model, whose assistant gets no processor.
    """
    for name, decoder in DECODERS.items():
        for mode, settings in MODES.items():
            for by, door in enumerate(DOORS):
                for on_base in (False, True) if decoder.has_arm else (False,):
                    place = "on the base" if on_base else "apart"
                    for_all = mode in FOR_EVERY_DECODER[door]
                    modes = tuple(MODES) if name in IN_EVERY_MODE else FOR_EVERY_DECODER[door]
                    quick = mode in modes and on_base == (modes.index(mode) + by) % 2
                    quick |= for_all and not decoder.has_arm
                    if decoder.rows and settings.get("prompts") == 1 or (door, mode) == ("model", "assisted sampling"):
                        continue
                    yield pytest.param(
                        name, mode, door, on_base, id="-".join((name, mode, door, place)),
                        marks=[] if quick else pytest.mark.slow,
                    )  # fmt: skip


def test_the_quick_part_of_the_table_leaves_no_place_and_no_door_out():
    quick = {tuple(cell.values) for cell in table() if not cell.marks}
    for name, decoder in DECODERS.items():
        doors, places = zip(*((door, on_base) for found, _, door, on_base in quick if found == name))
        assert set(doors) == set(DOORS), name
        assert set(places) == ({False, True} if decoder.has_arm else {False}), name
    assert {mode for name, mode, *_ in quick if name == "PARM"} == set(MODES)


@pytest.mark.parametrize(("name", "mode", "door", "on_base"), list(table()))
def test_every_decoder_in_every_mode(name, mode, door, on_base):
    decoder, settings = DECODERS[name], MODES[mode]
    models = Models.make(on_base)
    guided = generate(models, decoder, door, **settings)
    naive = generate(Models.make(on_base), decoder, f"naive {door}", **settings)
    assert torch.equal(guided.sequences, naive.sequences)
    for ours, theirs in zip(guided.scores, naive.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


SAMPLED = [name for name, decoder in DECODERS.items() if decoder.prompt is None]


@pytest.mark.parametrize(
    ("name", "door"),
    [
        pytest.param(name, door, marks=[] if (i + by) % 2 else pytest.mark.slow)
        for i, name in enumerate(SAMPLED)
        for by, door in enumerate(DOORS)
    ],
)
def test_sampling_is_unbiased(door, name):
    """The first two tokens of many samples against their exact joint distribution, a vocabulary of 8."""
    decoder, samples = DECODERS[name], 3000
    models = Models.make(vocab_size=8)
    prompt = torch.tensor([[2, 5, 3]]).repeat(decoder.rows or 1, 1)
    naive = NaiveProcessor(decoder, models, torch.ones_like(prompt))

    def distribution(ids):
        with torch.no_grad():
            scores = models.base(ids).logits[:, -1]
        return torch.softmax(naive(ids, scores), -1)[0]

    first = distribution(prompt)
    joint = torch.stack(
        [first[t] * distribution(torch.cat([prompt, torch.full((len(prompt), 1), t)], 1)) for t in range(8)]
    )
    formula = decoder.formula(models)
    model = Guided(models.base, formula) if door == "model" else models.base
    processors = [] if door == "model" else [GuidedLogitsProcessor(formula)]
    torch.manual_seed(1)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=processors, do_sample=True, top_k=0,
        max_new_tokens=2, num_return_sequences=samples, eos_token_id=-1,
    )[:samples, 3:]  # fmt: skip
    counts = torch.bincount(output[:, 0] * 8 + output[:, 1], minlength=64).double()
    expected = joint.flatten().double() * samples
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(observed[wanted > 0], wanted[wanted > 0] * samples / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("on_base", [False, True], ids=["apart", "on the base"])
def test_a_row_depends_on_its_own_prompt_preference_and_strength_alone(on_base, door):
    models = Models.make(on_base)

    def text(rows, preference, beta):
        given = {"input_ids": PROMPTS[rows], "attention_mask": MASK[rows], "max_new_tokens": 10}
        formula = parm(models.arm, preference, beta)
        if door == "model":
            return Guided(models.base, formula).generate(**given)
        return models.base.generate(**given, logits_processor=[GuidedLogitsProcessor(formula)])

    together = text([0, 1, 2], ROWS, BETAS)
    for i in range(3):
        alone = text([i], ROWS[i], BETAS[i].item())
        assert torch.equal(alone[0, 5:], together[i, 5 : alone.shape[1]])
    order = [2, 0, 1]
    assert torch.equal(text(order, ROWS[order], BETAS[order]), together[order])


@pytest.mark.parametrize("on_base", [False, True], ids=["apart", "on the base"])
def test_preference_and_strength_of_a_processor_change_between_calls(on_base):
    """As a new one for each would answer; two processors of one formula are two."""
    models = Models.make(on_base)
    processor, now = PARMLogitsProcessor(models.arm, [0.3, 0.7], beta=0.8), {"preference": [0.3, 0.7], "beta": 0.8}

    def text(one):
        return models.base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[one])

    other = GuidedLogitsProcessor(processor.formula)
    first = text(other)
    for change in ({}, {"preference": ROWS}, {"beta": BETAS}, {"preference": {"helpful": 1.0, "harmless": 0.0}}):
        processor.set(**change)
        now |= change
        fresh = PARMLogitsProcessor(models.arm, **now)
        assert repr(processor) == repr(fresh)
        assert torch.equal(text(processor), text(fresh))
    before = repr(processor)
    for bad in ({"preference": [0.5, 0.6]}, {"beta": 0.0}, {"preference": [0.5, 0.5], "beta": float("nan")}):
        with pytest.raises(ValueError, match="must"):
            processor.set(**bad)
    assert repr(processor) == before
    assert not torch.equal(text(processor), first)
    assert torch.equal(text(other), first)


def test_a_processor_keeps_no_more_however_often_it_is_set():
    processor = PARMLogitsProcessor(tiny_arm(), "worst_case")
    size = len(processor._aside)
    for beta in (1.0, 2.0, 3.0):
        processor.set(beta=beta)
    assert len(processor._aside) == size


def test_a_small_reward_model_guides_a_larger_base():
    models = Models.make()
    models.base = tiny_llama(0, hidden_size=96, num_attention_heads=4, intermediate_size=160, num_hidden_layers=4)
    settings = {"attention_mask": MASK, "max_new_tokens": 10}
    naive = models.base.generate(
        PROMPTS, **settings, logits_processor=[NaiveProcessor(DECODERS["PARM"], models, MASK)]
    )
    assert torch.equal(Guided(models.base, DECODERS["PARM"].formula(models)).generate(PROMPTS, **settings), naive)
    assert not torch.equal(models.base.generate(PROMPTS, **settings), naive)


def test_formulas_are_printed():
    models = Models.make()
    assert repr(GuidedLogitsProcessor(DECODERS["GenARM"].formula(models))) == (
        "GuidedLogitsProcessor(1 * BASE + 0.5 * LM(LlamaForCausalLM) + 1.5 * LM(LlamaForCausalLM))"
    )
    assert "-1 * LM" in repr(DECODERS["MOD-w2s"].formula(models))
    assert repr(DECODERS["MOD, α-divergence"].formula(models)) == (
        "PowerMean(0.3 * BASE, 0.7 * LM(LlamaForCausalLM); order=0.5)"
    )
    assert "[2, 1, 0.5] * LM(PeftModelForCausalLM, a preference for each of 3 rows)" in repr(
        DECODERS["PARM, α and β a row"].formula(models)
    )
    assert repr(LM(models.arm, disable_adapter=True)) == "LM(PeftModelForCausalLM, adapter off)"


@pytest.mark.parametrize("door", DOORS)
def test_objectives_of_weight_0_cost_nothing_and_a_shared_reference_runs_once(door):
    models = Models.make()
    fed = fed_tokens(models.first), fed_tokens(models.reference)
    for formula in (
        genarm({"helpful": models.first, "harmless": models.second}, [0.0, 1.0]),
        mod_w2s({"a": models.second, "b": models.arm}, models.reference, [0.5, 0.5]),
    ):
        generate(models, Decoder(lambda m, formula=formula: formula, DECODERS["PARM"].naive), door)
    assert fed[0] == []
    assert len(fed[1]) == 10


NAMED = {
    "PARM": (PARM, parm, lambda m: ((m.arm, [0.3, 0.7]), {"beta": 0.8})),
    "GenARM": (GenARM, genarm, lambda m: (({"a": m.first, "b": m.second}, [0.3, 0.7]), {"beta": 2.0})),
    "MOD": (MOD, mod, lambda m: (({"a": BASE, "b": m.second}, [0.3, 0.7], "forward_kl"), {})),
    "MOD-w2s": (MODWeakToStrong, mod_w2s, lambda m: (({"a": m.first}, m.reference, [1.0]), {})),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_models_are_their_formulas(name):
    models = Models.make()
    kind, formula, arguments = NAMED[name]
    given, settings = arguments(models)
    assert repr(kind(models.base, *given, **settings).formula) == repr(formula(*given, **settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: genarm({}, []), "`arms` is empty"),
        (lambda m: genarm({"a": m.first}, {"b": 1.0}), "b"),
        (lambda m: genarm({"a": m.first, "b": m.second}, [0.5]), "has 1 entries"),
        (lambda m: genarm({"a": m.first, "b": m.second}, [1.4, -0.4]), "negative weight.*allow_off_simplex=True"),
        (lambda m: genarm({"a": "one", "b": "two"}, [0.5, 0.5]), "Pass `adapters_of=peft_model`"),
        (lambda m: mod({"a": BASE}, [1.0], "jensen"), "must be one of reverse_kl, forward_kl, alpha"),
        (lambda m: MODLogitsProcessor({"a": BASE}, [1.0], "alpha", order=0.0), "`order` is 0.0"),
        (lambda m: mod({"a": BASE}, [1.0], "alpha", order=-1.0), "`order` is -1.0, but it must be a positive"),
        (lambda m: mod({"a": BASE}, [1.0], "alpha", order="2"), "`order` is '2', but it must be a positive"),
        *(
            (
                lambda m, α=α: mod({"a": BASE, "b": m.first}, α, "forward_kl", allow_off_simplex=True),
                "`divergence` is 'forward_kl', whose mean has no meaning at the weights .*, off the simplex",
            )
            for α in ([0.0, 0.0], [1.5, 0.5], [1.5, -0.5], torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
        ),
        (lambda m: mod({"a": BASE}, [1.0], order=7.0), "`divergence` is 'reverse_kl', which has none"),
        (lambda m: mod({"a": BASE}, [1.0], "forward_kl", order=7.0), "`divergence` is 'forward_kl', which has none"),
        (lambda m: genarm({"a": m.first, "b": m.second}, torch.eye(2), BETAS), "weights for 3 and for 2 rows"),
        (lambda m: parm(m.arm, ROWS, beta=[1.0, float("nan"), 1.0]), "positive, finite number"),
        (lambda m: parm(m.arm, ROWS, beta=torch.ones(2, 2)), "positive, finite number"),
        *((lambda m, b=b: parm(m.arm, beta=b), "must be a positive, finite number") for b in (0, -1.0, "1", True)),
        (lambda m: parm(m.arm, {"helpful": 1.0, "harm": 0.0}), "Did you mean 'harmless'"),
        (lambda m: parm(m.arm, [0.2, 0.2]), "must sum to 1"),
        (lambda m: parm(m.arm, [0.2, 0.2, 0.6]), "has 3 entries, but this adapter was trained for 2"),
        (lambda m: parm(m.first, [0.5, 0.5]), "has no preference-conditioned adapter"),
    ],
)
def test_bad_decoders(make, message):
    with pytest.raises(ValueError, match=message):
        make(Models.make())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("preference", "beta", "message"),
    [(ROWS[:2], 1.0, "for 2 rows, but the batch has 3"), ([0.5, 0.5], BETAS[:2], "for 2 rows, but the batch has 3")],
)
def test_rows_that_do_not_fit_the_batch(preference, beta, message, door):
    decoder = Decoder(lambda m: parm(m.arm, preference, beta), DECODERS["PARM"].naive)
    with pytest.raises(ValueError, match=message):
        generate(Models.make(), decoder, door)


def test_preferences_of_fewer_rows_than_there_are_prompts_are_refused():
    models, α, settings = Models.make(), ROWS[:2], {"max_new_tokens": 2, "do_sample": False}
    guided, prompts = PARM(models.base, models.arm, α), PROMPTS[1:]
    with pytest.raises(ValueError, match="for 2 rows, but the batch has 4. Give one for each prompt"):
        guided.generate(prompts.repeat(2, 1), **settings)
    assert len(guided.generate(prompts, num_beams=2, num_return_sequences=2, **settings)) == 4


def test_strengths_of_numpy_are_strengths():
    arm = tiny_arm()
    for beta in (np.float32(2.0), np.array([1.0, 2.0, 4.0], dtype=np.float32)):
        assert repr(parm(arm, [0.5, 0.5], beta)) == repr(parm(arm, [0.5, 0.5], beta.tolist()))
    assert repr(np.float32(0.5) * LM(arm, [0.5, 0.5])) == repr(0.5 * LM(arm, [0.5, 0.5]))


@pytest.mark.parametrize("make", [Guided, lambda base, formula: GuidedLogitsProcessor(formula)], ids=DOORS)
def test_what_is_no_formula(make):
    models = Models.make()
    with pytest.raises(TypeError, match="must be a scorer such as BASE"):
        make(models.base, models.arm)
