# SPDX-License-Identifier: Apache-2.0
"""Coupled requests: the guided distribution, the rows of a family joined in step, and nothing said of it unguided.

`fake_vllm` stands in for the engine; `test_vllm.py` runs on vLLM itself.
"""

import asyncio
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from fake_vllm import VOCAB, FakeEngine, Request, SamplingParams, V1Batch, V2Batch, config_of_engine, logits_of
from scipy.stats import chisquare
from vllm_interfaces import CALLS, NAMES, SNAPSHOT, V1, V2, names, parameters

from trl_parm.noise import Sampling
from trl_parm.serving import Guidance, Mixture, combine
from trl_parm.serving.engine import Capacity, check_engine, check_lora_slots
from trl_parm.serving.families import Family, Member
from trl_parm.serving.guidance import coupled_requests
from trl_parm.serving.rows import Row, join


BATCHES = [V1Batch, V2Batch]


def logits(*shape, seed=0, excluded=0.2):
    """Random logits, some of them −inf."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(*shape, generator=generator)
    return values.masked_fill(torch.rand(shape, generator=generator) < excluded, -torch.inf)


def lora(number):
    return SimpleNamespace(lora_int_id=number, lora_name=f"lora {number}")


# The distribution


@pytest.mark.parametrize("strengths", [[0.5], [2.0], [0.0], [0.3, 1.7], [0.0, 0.0, 3.0]])
def test_combine_is_the_formula_in_float64(strengths):
    base, guides = logits(3, 50), [logits(3, 50, seed=seed) for seed in range(1, 1 + len(strengths))]
    given = [base.clone(), *[guide.clone() for guide in guides]]
    found = combine(base, guides, strengths)
    twin = torch.log_softmax(base.double(), -1)
    for guide, strength in zip(guides, strengths):
        if strength:
            twin += strength * torch.log_softmax(guide.double(), -1)
    twin[base == -torch.inf] = -torch.inf
    twin = torch.log_softmax(twin, -1)
    torch.testing.assert_close(found.double(), twin, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(given, [base, *guides]))
    for row in range(3):
        torch.testing.assert_close(found[row], combine(base[row], [guide[row] for guide in guides], strengths))
    if len(guides) == 1:
        assert torch.equal(found, combine(base, guides[0], strengths[0]))


def test_combine_takes_a_strength_for_each_row():
    base, arm, strengths = logits(3, 20), logits(3, 20, seed=1), torch.tensor([0.0, 0.5, 2.0])
    expected = torch.stack([combine(base[i], arm[i], strengths[i].item()) for i in range(3)])
    assert torch.equal(combine(base, arm, strengths), expected)


def test_tokens_that_the_base_excludes_stay_excluded():
    """Also under a negative strength, where −inf of a guide counts as +∞."""
    base = logits(3, 20)
    found = combine(base, base, -0.5)
    assert torch.equal(found == -torch.inf, base == -torch.inf)
    assert not found.isnan().any()


def test_combine_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 guides, but 1 strengths"):
        combine(logits(1, 8), [logits(1, 8), logits(1, 8)], [1.0])
    with pytest.raises(ValueError, match=r"shape \(1, 8\), a guide's \(1, 9\)"):
        combine(logits(1, 8), logits(1, 9), 1.0)


def filtered(scores, temperature, top_k, top_p):
    """The distribution of one row by hand, in float64."""
    kept = torch.softmax(scores.double() / temperature, -1)
    order = kept.argsort(descending=True)
    if top_k:
        kept[order[top_k:]] = 0
    kept /= kept.sum()
    before = kept[order].cumsum(0) - kept[order]
    kept[order[before >= top_p]] = 0
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 5, 1.0), (1.2, 9, 0.9)]
)
def test_tokens_are_drawn_from_the_distribution(temperature, top_k, top_p):
    scores, samples = combine(logits(VOCAB) / 9, logits(VOCAB, seed=1) / 9, 0.5), 4000
    assert (scores == -torch.inf).any()
    keys = [number // 40 for number in range(samples)], [number % 40 for number in range(samples)]
    tokens = Sampling(temperature, top_k, top_p).noisy(scores.expand(samples, -1), *keys).argmax(-1)
    expected = samples * filtered(scores, temperature, top_k, top_p)
    observed = torch.bincount(tokens, minlength=VOCAB).double()
    assert not observed[expected == 0].any()
    often = expected >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    wanted = expected > 0
    assert wanted.sum() > 3
    assert chisquare(observed[wanted], expected[wanted]).pvalue > 1e-3


def test_a_token_is_a_function_of_its_seed_and_number_alone():
    scores = logits(1, VOCAB).expand(6, -1)
    keys = [(1, 2), (2, 1), (1, 3), (7, 7), (1, 2), (2, 2)]
    draw = lambda *given: Sampling().noisy(*given).argmax(-1)  # noqa: E731
    tokens = draw(scores, [seed for seed, _ in keys], [written for _, written in keys])
    for row, (seed, written) in enumerate(keys):
        assert draw(scores[:1], [seed], [written]) == tokens[row]
    # Neighbouring seeds and numbers have noise of their own: 1 of 12 tokens agrees by chance, 400 have all 12.
    many = draw(torch.zeros(400, VOCAB), [i // 20 for i in range(400)], [i % 20 for i in range(400)]).view(20, 20)
    assert len(many.unique()) == VOCAB
    assert (many[1:, :-1] == many[:-1, 1:]).float().mean() < 0.2


# The rows of a family


def member_rows(written=(3, 3), last=(5, 5), roles=(0, 1), at=(0, 1), **settings):
    family = Family("a", (0.5,), **settings)
    return [Row(i, Member(family, role), w, t) for i, role, w, t in zip(at, roles, written, last)]


def test_rows_of_all_families_are_joined_and_others_left_alone():
    """Families of one size and of another, with settings of all kinds, in rows of any order."""
    settings = [{}, {"temperature": 0.7}, {"temperature": 0.7, "seed": 4}, {"temperature": 1.5}]
    settings += [{"temperature": 0.7, "top_k": 4}, {"temperature": 0.7, "top_p": 0.6}]
    families = [Family(f"a{i}", (0.2 + 0.3 * i,), **own) for i, own in enumerate(settings)]
    families += [Family(f"b{i}", (0.3, 1.1 + i), **own) for i, own in enumerate(settings)]
    members = [Member(family, role) for family in families for role in range(family.size)]
    step = logits(len(members) + 3, VOCAB) / 3
    before = step.clone()
    order = torch.randperm(len(step), generator=torch.Generator().manual_seed(0)).tolist()
    place = dict(zip(members, order))
    assert join(step, [Row(at, member, 4, 7) for member, at in place.items()]) is step
    for family in families:
        base, *guides = (place[Member(family, role)] for role in range(family.size))
        scores = combine(before[base], [before[at] for at in guides], family.strengths)
        if family.temperature:
            sampling = Sampling(family.temperature, family.top_k, family.top_p)
            token = sampling.noisy(scores[None], [family.seed], [4]).argmax(-1)
            scores = torch.full_like(scores, -torch.inf)
            scores[token] = 0.0
        for at in (base, *guides):
            torch.testing.assert_close(step[at], scores)
    others = order[len(members) :]
    assert torch.equal(step[others], before[others])


APART = {
    "no guide": (lambda: member_rows()[:1], "guide 1 missing"),
    "no base": (lambda: member_rows()[1:], "the base missing"),
    "a base twice": (lambda: member_rows(roles=(0, 0)), "guide 1 missing"),
    "a guide twice": (
        lambda: member_rows((3, 3, 3), (5, 5, 5), (0, 1, 1), (0, 1, 2)), "3 requests for 2 roles"
    ),
    "another length": (
        lambda: member_rows(written=(3, 2)), "the base has written 3 tokens, the last 5; guide 1 has written 2"
    ),
    "another last token": (lambda: member_rows(last=(5, 6)), "the last 5; guide 1 has written 3 tokens, the last 6"),
    "nothing written": (lambda: member_rows((1, 0), (5, None)), "guide 1 has written 0 tokens"),
    "other settings": (
        lambda: [member_rows()[0], member_rows(temperature=1.0)[1]], "requests with different settings"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_a_family_that_is_apart_is_an_error_before_anything_is_written(case):
    rows, message = APART[case]
    step = logits(5, VOCAB)
    before = step.clone()
    whole = [Row(3, Member(Family("whole", (1.0,)), 0), 0), Row(4, Member(Family("whole", (1.0,)), 1), 0)]
    with pytest.raises(RuntimeError, match=message) as error:
        join(step, whole + rows())
    assert "The family 'a' of coupled requests" in str(error.value)
    assert "docs/serving.md" in str(error.value)
    assert torch.equal(step, before)


# The requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_strengths": None}, "guidance_strengths is missing"),
        ({"guidance_name": ""}, "`guidance_name` is ''"),
        ({"guidance_strengths": [], "guidance_base_strength": 0.0}, "not 0 where there is no guide"),
        ({"guidance_strengths": [0.5, 0.0]}, "a list of numbers other than 0"),
        ({"guidance_strengths": [float("nan")]}, "a list of numbers other than 0"),
        ({"guidance_strengths": 0.5}, "a list of numbers other than 0"),
        ({"guidance_min_p": 2}, "`guidance_min_p` is 2"),
        ({"guidance_scored": 1}, "`guidance_scored` is 1"),
        ({"guidance_role": 2}, "at most 1"),
        ({"guidance_role": "base"}, "`guidance_role` is 'base'"),
        ({"guidance_temperature": -0.1}, "0 or more"),
        ({"guidance_top_k": 1.5}, "`guidance_top_k` is 1.5"),
        ({"guidance_top_p": 0.0}, "above 0"),
        ({"guidance_seed": -1}, "`guidance_seed` is -1"),
        ({"guidance_beta": 1.0}, "guidance_beta is unknown"),
        ({"temperature": 0.7}, "`temperature`=0.7, but it must be 0.0"),
        ({"n": 2}, "`n`=2"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty`=1.1"),
        ({"structured_outputs": object()}, "`structured_outputs`"),
    ],
)
def test_bad_arguments_of_a_request_are_refused(changes, message):
    arguments = {"guidance_name": "a", "guidance_strengths": [0.5], "guidance_role": 0}
    arguments |= {name: value for name, value in changes.items() if name.startswith("guidance_")}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    own = {name: value for name, value in changes.items() if not name.startswith("guidance_")}
    params = SamplingParams(temperature=0.0, extra_args=arguments)
    for name, value in own.items():
        setattr(params, name, value)
    with pytest.raises(ValueError, match=message):
        Member.of(params)


def test_one_request_becomes_a_family():
    asked = SamplingParams(temperature=0.7, top_p=0.9, top_k=-1, seed=5, max_tokens=9, logprobs=3, logit_bias={1: 2.0})
    asked.min_p = 0.1
    asked.extra_args = {"mine": 1}
    guidance = Guidance([lora(1), lora(2), lora(3)], beta=0.5, weights=[0.7, 0.0, 0.3])
    base, *guides = coupled_requests("a", asked, guidance)
    assert [request.lora for request in (base, *guides)] == [None, guidance.loras[0], guidance.loras[2]]
    assert [request.name for request in (base, *guides)] == ["a-0", "a-1", "a-2"]
    family = Family("a", (1.4, 0.6), 0.7, 0, 0.9, 5, 0.1)
    for role, request in enumerate((base, *guides)):
        assert Member.of(request.params) == Member(family, role)
        assert request.params.extra_args["mine"] == 1
        own = request.params
        assert (own.temperature, own.top_p, own.min_p, own.max_tokens) == (0.0, 1.0, 0.0, 9)
    assert (base.params.logprobs, guides[0].params.logprobs) == (3, None)
    assert (base.params.logit_bias, guides[0].params.logit_bias) == ({1: 2.0}, None)
    assert asked.temperature == 0.7
    assert asked.extra_args == {"mine": 1}


def test_samples_without_a_seed_differ_and_follow_torchs():
    def seeds():
        torch.manual_seed(0)
        members = [Member.of(coupled_requests("a", SamplingParams(), Guidance(lora(1)))[0].params) for _ in range(2)]
        return [member.family.seed for member in members if member]

    assert len(set(seeds())) == 2
    assert seeds() == seeds()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "`beta` is 0.0"),
        ({"beta": float("inf")}, "`beta` is inf"),
        ({"weights": [0.5, 0.5]}, "1 LoRAs, but 2 weights"),
        ({"weights": [-1.0]}, "not negative"),
        ({"weights": [0.0]}, "not all 0"),
        ({"loras": []}, "not all 0"),
    ],
)
def test_bad_guidance_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**{"loras": lora(1), **arguments})


# The processors, in a hand-written batch


@pytest.fixture
def engine(monkeypatch):
    fake_vllm.install(monkeypatch)
    return importlib.import_module("trl_parm.serving.client")


def family(name, prompt, guidance, **params):
    requests = coupled_requests(name, SamplingParams(**{"temperature": 0.0, **params}), guidance)
    return [Request(r.name, prompt, r.params, r.lora.lora_int_id if r.lora else 0, read=True) for r in requests]


def expected_text(prompt, guidance, tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0):
    """The text of a family, each token anew from its formula."""
    text = list(prompt)
    for written in range(tokens):
        terms = guidance.terms()
        scores = torch.log_softmax(logits_of(text, 0).double(), -1)
        for own, strength in terms:
            scores += strength * torch.log_softmax(logits_of(text, own.lora_int_id).double(), -1)
        if temperature:
            scores = Sampling(temperature, top_k, top_p).noisy(scores[None].float(), [seed], [written])
        text.append(int(scores.argmax()))
        if text[-1] == 1:
            break
    return text[len(prompt) :]


def write(batch, requests):
    for request, row in zip(requests, batch.run(requests), strict=True):
        request.output.append(int(row.argmax()))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_k": 7, "top_p": 0.95, "seed": 11}])
@pytest.mark.parametrize("make", BATCHES)
def test_families_of_a_changing_batch_write_in_lock_step(engine, make, sampling):
    batch = make()
    parm, genarm = Guidance(lora(1), beta=0.4), Guidance([lora(2), lora(3)], beta=0.5, weights=[0.3, 0.7])
    first, second, third = (
        family("a", [2, 3], parm, **sampling),
        family("b", [4], genarm, **sampling),
        family("c", [5], parm),
    )
    alone = Request("alone", [6, 6], SamplingParams(), 0, read=True)
    for step in range(8):
        present = [
            *(first if step < 5 else []),
            *([alone] if step != 3 else []),
            *(second if step > 1 else []),
            *third,
        ]
        before = alone.logits()
        rows = batch.run(present)
        if alone in present:
            assert torch.equal(rows[present.index(alone)], before)
        for request, row in zip(present, rows):
            request.output.append(int(row.argmax()))
    lengths = {"a": 5, "b": 6, "c": 8}
    for requests, prompt, guidance, own in (
        (first, [2, 3], parm, sampling),
        (second, [4], genarm, sampling),
        (third, [5], parm, {}),
    ):
        texts = [request.output for request in requests]
        assert all(text == texts[0] for text in texts)
        expected = expected_text(prompt, guidance, lengths[requests[0].name[0]], **own)
        assert texts[0][: len(expected)] == expected


@pytest.mark.parametrize("make", BATCHES)
def test_a_partner_that_leaves_or_waits_is_an_error(engine, make):
    for change in ("never came", "finished early", "preempted, and back out of step"):
        batch = make()
        base, guide = family("a", [2, 3], Guidance(lora(1)))
        if change != "never came":
            write(batch, [base, guide])
        if change.startswith("preempted"):
            base.output.append(5)
            with pytest.raises(RuntimeError, match="out of step"):
                batch.run([base, guide])
            continue
        with pytest.raises(RuntimeError, match="guide 1 missing"):
            batch.run([base])
        with pytest.raises(RuntimeError, match="the base missing"):
            batch.run([guide])


@pytest.mark.parametrize("make", BATCHES)
def test_a_request_takes_the_place_of_another(engine, make):
    """A place or slot that a family left has none of its settings."""
    batch = make()
    write(batch, family("a", [2, 3], Guidance(lora(1))))
    others = [Request(f"other {number}", [4], SamplingParams(), 0, read=True) for number in range(2)]
    assert torch.equal(batch.run(others), torch.stack([request.logits() for request in others]))
    fresh = family("b", [5], Guidance(lora(2)))
    write(batch, [*fresh, *others])
    assert fresh[0].output == expected_text([5], Guidance(lora(2)), 1)


def test_v1_sees_a_family_that_chunks_took_apart_one_step_later(engine):
    batch = V1Batch()
    base, guide = family("a", [2, 3, 4], Guidance(lora(1)))
    rows = batch.run([base, guide])
    base.output.append(int(rows[0].argmax()))  # the guide's prompt is not read yet, so it writes nothing
    with pytest.raises(RuntimeError, match="the base has written 1 tokens.*guide 1 has written 0 tokens"):
        batch.run([base, guide])


def test_v2_leaves_incomplete_prompts_alone(engine):
    batch = V2Batch()
    base, guide = family("a", [2, 3, 4], Guidance(lora(1)))
    base.read = guide.read = False
    assert torch.equal(batch.run([base, guide]), torch.stack([base.logits(), guide.logits()]))
    base.read = True
    with pytest.raises(RuntimeError, match="guide 1 missing"):
        batch.run([base, guide])


def test_v2_counts_what_was_written_before_a_preemption(engine):
    """A preempted family that comes back together goes on as if nothing had been."""
    batch = V2Batch()
    requests = family("a", [2, 3], Guidance(lora(1)), temperature=2.0, seed=1)
    for _ in range(3):
        write(batch, requests)
    batch.run([Request("other", [4], SamplingParams(), 0, read=True)])
    for _ in range(5):
        write(batch, requests)
    expected = expected_text([2, 3], Guidance(lora(1)), 8, temperature=2.0, seed=1)
    assert len(expected) > 5
    assert requests[0].output[: len(expected)] == expected
    assert requests[0].output == requests[1].output


@pytest.mark.parametrize("make", BATCHES)
def test_speculation_is_refused(engine, make):
    with pytest.raises(ValueError, match="speculative decoding"):
        make(speculative_config=object())
    if make is V2Batch:
        with pytest.raises(RuntimeError, match="4 rows of logits for 2 requests"):
            make().run(family("a", [2], Guidance(lora(1))), extra_rows=2)


@pytest.mark.parametrize("make", BATCHES)
def test_the_engine_checks_requests_with_the_processor(engine, make):
    processor = type(make().processor)
    processor.validate_params(SamplingParams())
    with pytest.raises(ValueError, match="guidance_name is missing"):
        processor.validate_params(SamplingParams(extra_args={"guidance_role": 0}))


# Room for families, and the clients


SAMPLES = [([2 + i % 9] * (1 + i % 7), 1 + i % 5, 0.4 + i % 3) for i in range(14)]
"""Prompt, number of LoRA and β; lengths that leave odd rests of tokens, places and memory."""


def run_samples(client, fake, sampling=None, samples=SAMPLES):
    llm = SimpleNamespace(llm_engine=fake, get_tokenizer=None, get_default_sampling_params=SamplingParams)
    prompts = [prompt for prompt, *_ in samples]
    guidance = [Guidance(lora(number), beta=beta) for _, number, beta in samples]
    params = [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 2 + i % 8, **(sampling or {})})
        for i in range(len(samples))
    ]
    outputs = client.guided_generate(llm, prompts, guidance, params)
    expected = [
        expected_text(*of_one, own.max_tokens, **(sampling or {})) for *of_one, own in zip(prompts, guidance, params)
    ]
    return [output.outputs[0].token_ids for output in outputs], expected


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("make", BATCHES)
def test_any_weighted_sum_tells_its_log_probabilities(engine, make, temperature):
    """With the base model's part or without it, with weights below 0, and with the base model alone."""
    mixtures = [
        Mixture(scored=True),
        Mixture([(lora(1), 0.7), (lora(2), -0.3)], base_strength=0.0, scored=True),
        Mixture([(None, 0.5)], scored=True),
        Mixture([(lora(3), 2.0)], base_strength=0.5, scored=True),
    ]
    fake = FakeEngine(make(), max_loras=6, logprobs_mode="processed_logits")
    llm = SimpleNamespace(llm_engine=fake, get_tokenizer=None)
    params = SamplingParams(temperature=temperature, seed=4, min_p=0.05, max_tokens=5)
    samples = engine.guided_samples(llm, [[2, 3]] * 4, mixtures, params)
    for mixture, sample in zip(mixtures, samples):
        text, sums = [2, 3], [0.0, 0.0]
        for written, token in enumerate(sample.result().outputs[0].token_ids):
            base = torch.log_softmax(logits_of(text, 0).double(), -1)
            scores = mixture.base_strength * base
            for own, strength in mixture.terms():
                scores += strength * torch.log_softmax(logits_of(text, own.lora_int_id if own else 0).double(), -1)
            scores = torch.log_softmax(scores, -1)
            choice = scores[None].float()
            choice = Sampling(1.2, min_p=0.05).noisy(choice, [4], [written]) if temperature else choice
            assert token == int(choice.argmax())
            text, sums = [*text, token], [sums[0] + scores[token].item(), sums[1] + base[token].item()]
        assert sample.log_probs() == pytest.approx(sums, abs=1e-4)
    fake.vllm_config = config_of_engine()
    with pytest.raises(ValueError, match="logprobs_mode='processed_logits'"):
        engine.guided_samples(llm, [[2, 3]], Mixture(scored=True), params)


TIGHT = {"max_num_seqs": 5, "max_num_batched_tokens": 17, "num_gpu_blocks": 16, "max_loras": 6}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
@pytest.mark.parametrize("make", BATCHES)
@pytest.mark.parametrize("limits", [{"max_loras": 6}, TIGHT])
def test_all_families_run_in_an_engine_with_little_room(engine, make, limits, sampling):
    fake = FakeEngine(make(), **limits)
    found, expected = run_samples(engine, fake, sampling)
    assert found == expected
    assert fake.most_rows > 2
    assert not fake.running
    assert not fake.waiting


@pytest.mark.parametrize("limit", ["max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks"])
def test_without_room_for_all_of_them_families_come_apart_loudly(engine, monkeypatch, limit):
    """The engine alone does not keep families together: what the client counts is needed."""
    monkeypatch.setattr(Capacity, "take", lambda self, name, need: True)
    monkeypatch.setattr(Capacity, "prompt_read", lambda self, name: None)
    fake = FakeEngine(
        V1Batch(),
        **{**TIGHT, "max_num_seqs": 64, "max_num_batched_tokens": 400, "num_gpu_blocks": 400, limit: TIGHT[limit]},
    )
    with pytest.raises(RuntimeError, match="can't be guided in this step"):
        run_samples(engine, fake)
    assert len(fake.aborted) == 1
    assert not fake.running
    assert not fake.waiting


def test_an_engine_that_is_not_paused_begins_with_one_request(engine, monkeypatch):
    fake = FakeEngine(V1Batch(), max_loras=6)
    monkeypatch.setattr(fake, "sleep", lambda level, mode: None)
    with pytest.raises(RuntimeError, match="guide 1 missing"):
        run_samples(engine, fake)


def test_a_request_that_is_refused_takes_its_family_along(engine, monkeypatch):
    fake = FakeEngine(V1Batch(), max_loras=6)
    add = fake.add_request

    def refuse(name, *args, **kwargs):
        if name.endswith("-1"):
            raise ValueError("refused")
        add(name, *args, **kwargs)

    monkeypatch.setattr(fake, "add_request", refuse)
    with pytest.raises(ValueError, match="refused"):
        run_samples(engine, fake)
    assert not fake.waiting
    assert not fake.running
    assert not fake.paused


def test_different_texts_of_a_family_are_an_error(engine):
    fake = FakeEngine(V1Batch(), max_loras=6)
    fake.batch.run = lambda requests: torch.stack([request.logits() for request in requests])  # no processor at work
    with pytest.raises(RuntimeError, match="wrote different texts"):
        run_samples(engine, fake)


@pytest.mark.parametrize(
    ("limits", "samples", "message"),
    [
        ({"max_num_seqs": 1}, SAMPLES, "2 requests at once .max_num_seqs., and there are 1"),
        ({"max_num_batched_tokens": 13}, SAMPLES, "14 tokens in a step .max_num_batched_tokens., and there are 13"),
        ({"num_gpu_blocks": 4}, SAMPLES, "blocks of keys and values"),
        ({"max_loras": 0}, SAMPLES, "LoRAs at once .max_loras., and there are 0"),
        ({"max_model_len": 7}, SAMPLES, "A prompt has 7 tokens, but the engine takes 1 to 6"),
        ({}, [([], 1, 1.0)], "A prompt has 0 tokens"),
        ({"long_prefill_token_threshold": 4}, SAMPLES, "cuts long prompts"),
        ({"enable_lora": False}, SAMPLES, "enable_lora=True"),
        ({"logits_processors": None}, SAMPLES, "no logits processor that joins"),
        ({"logits_processors": ["my.module:Processor"]}, SAMPLES, "no logits processor that joins"),
        ({"data_parallel_size": 2}, SAMPLES, "2 data-parallel replicas"),
        ({"speculative_config": object()}, SAMPLES, "speculative decoding"),
        ({"max_loras": 5}, SAMPLES, "applies the LoRA in the last slot"),
    ],
)
def test_what_can_not_run_is_refused_before_anything_runs(engine, limits, samples, message):
    fake = FakeEngine(V1Batch(), **{"max_loras": 6, **limits})
    with pytest.raises(ValueError, match=message):
        run_samples(engine, fake, samples=samples)
    assert fake.most_rows == 0
    assert not fake.waiting


def test_classes_of_processors_are_recognised(engine):
    check_engine(config_of_engine(logits_processors=[type(V1Batch().processor)]))
    check_engine(config_of_engine(logits_processors=["trl_parm.serving:CoupledLogitsProcessorV2"]))


def test_the_slot_that_leaks_matters_only_where_it_leaks(engine, monkeypatch):
    import vllm.lora.ops.torch_ops as ops

    check_lora_slots(config_of_engine(max_loras=3), {1, 2})
    with pytest.raises(ValueError, match="3 slots for LoRAs .max_loras., and 3 LoRAs"):
        check_lora_slots(config_of_engine(max_loras=3), {1, 2, 3})
    monkeypatch.setattr(ops, "bgmv_shrink", lambda inputs, weights, output, indices, scaling: None)
    check_lora_slots(config_of_engine(max_loras=3), {1, 2, 3})


def test_samples_get_room_in_the_order_in_which_they_came(engine):
    """A small one that would fit waits behind a large one, unless that goes away."""

    async def run(gives_up):
        guided, order = engine.AsyncGuidance(SimpleNamespace(vllm_config=config_of_engine(max_num_seqs=4))), []

        async def sample(name, texts, end):
            async with guided._taking(name, guided._capacity.need(2, 2, [], texts)):
                order.append(name)
                await end.wait()

        ends = {name: asyncio.Event() for name in ("first", "large", "small")}
        tasks = []
        for name, texts in (("first", 3), ("large", 4), ("small", 1)):
            tasks.append(asyncio.create_task(sample(name, texts, ends[name])))
            await asyncio.sleep(0.01)
        assert order == ["first"]
        if gives_up:
            tasks[1].cancel()
        else:
            ends["first"].set()
        await asyncio.sleep(0.01)
        assert order == ["first", "small" if gives_up else "large"]
        for end in ends.values():
            end.set()
        await asyncio.wait(tasks)
        return order

    assert asyncio.run(run(False)) == ["first", "large", "small"]
    assert asyncio.run(run(True)) == ["first", "small"]


def test_one_prompt_is_a_batch_of_one(engine):
    """A text is no list of characters."""
    tokenizer = SimpleNamespace(encode=lambda text: [2 + len(text) % 9])
    llm = SimpleNamespace(
        llm_engine=FakeEngine(V1Batch()), get_tokenizer=lambda: tokenizer, get_default_sampling_params=SamplingParams
    )
    own = Guidance(lora(1)), SamplingParams(temperature=0.0, max_tokens=3)
    for prompt, ids in (("How are you?", [5]), ([4, 6], [4, 6])):
        (output,) = engine.guided_generate(llm, prompt, *own)
        assert output.outputs[0].token_ids == expected_text(ids, own[0], 3)


def test_the_number_of_prompts_and_of_what_goes_with_them_must_agree(engine):
    llm = SimpleNamespace(
        llm_engine=FakeEngine(V1Batch()), get_tokenizer=None, get_default_sampling_params=SamplingParams
    )
    with pytest.raises(ValueError, match="3 prompts, but `guidance` has 2 entries"):
        engine.guided_generate(llm, [[2]] * 3, [Guidance(lora(1))] * 2)
    with pytest.raises(ValueError, match="1 prompts, but `sampling_params` has 0 entries"):
        engine.guided_generate(llm, [[2]], Guidance(lora(1)), [])


class LatestOutput:
    """What a request's reader gets of it: outputs that it has not read yet are replaced by later ones."""

    def __init__(self):
        self.output, self.ready = None, asyncio.Event()

    def put(self, output):
        self.output = output
        self.ready.set()

    async def get(self):
        await self.ready.wait()
        self.ready.clear()
        return self.output


class FakeAsyncEngine:
    """`FakeEngine` as an asynchronous engine: a task steps, and the outputs of each request go to its reader."""

    def __init__(self, *args, **changes):
        self.engine = FakeEngine(*args, **changes)
        self.vllm_config, self.errored, self.get_tokenizer = self.engine.vllm_config, False, None
        self.queues: dict[str, LatestOutput] = {}

    async def sleep(self, level, mode):
        await asyncio.sleep(0)
        self.engine.sleep(level, mode)

    async def wake_up(self, tags):
        self.engine.wake_up(tags)

    async def add_request(self, request_id, prompt, params, lora_request=None):
        await asyncio.sleep(0)
        self.engine.add_request(request_id, prompt, params, lora_request)
        self.queues[request_id] = LatestOutput()
        return self.queues[request_id]

    async def abort(self, request_id):
        self.engine.abort_request(request_id)

    async def run(self):
        while True:
            await asyncio.sleep(0)
            if not self.engine.paused:
                for output in self.engine.step():
                    self.queues[output.request_id].put(output)


def with_async_engine(work, **limits):
    async def main():
        guided = importlib.import_module("trl_parm.serving.client").AsyncGuidance
        fake = FakeAsyncEngine(V1Batch(), **limits)
        stepping = asyncio.create_task(fake.run())
        await asyncio.wait(
            {stepping, found := asyncio.create_task(work(guided(fake), fake))}, return_when="FIRST_COMPLETED"
        )
        if stepping.done():
            found.cancel()
            stepping.result()
        stepping.cancel()
        return await found

    return asyncio.run(asyncio.wait_for(main(), 30))


async def read(guided, prompt, number, beta, **params):
    params = SamplingParams(**{"temperature": 0.0, **params})
    texts = [o.outputs[0].token_ids async for o in guided.generate(prompt, params, Guidance(lora(number), beta=beta))]
    assert all(text == texts[-1][: len(text)] for text in texts)
    return texts[-1]


def test_the_asynchronous_engine_streams_many_families(engine):
    async def work(guided, fake):
        return await asyncio.gather(*(read(guided, *sample, max_tokens=2 + i % 8) for i, sample in enumerate(SAMPLES)))

    expected = [expected_text(p, Guidance(lora(n), beta=b), 2 + i % 8) for i, (p, n, b) in enumerate(SAMPLES)]
    assert with_async_engine(work, **TIGHT) == expected


def test_a_reader_that_goes_away_ends_the_family_at_once(engine):
    async def work(guided, fake):
        texts = guided.generate([2], SamplingParams(temperature=0.0, max_tokens=16), Guidance(lora(1)))
        await anext(texts)
        await texts.aclose()
        assert not fake.engine.running
        waiting = asyncio.create_task(read(guided, [3], 1, 1.0))
        for _ in range(3):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        return [len(names) for names in fake.engine.aborted], await read(guided, [5], 2, 0.5)

    aborted, text = with_async_engine(work, max_num_seqs=2)
    assert set(aborted) == {2}
    assert text == expected_text([5], Guidance(lora(2), beta=0.5), 16)


def test_stop_strings_are_refused_in_the_asynchronous_engine(engine):
    async def work(guided, fake):
        with pytest.raises(ValueError, match="stop_token_ids"):
            await read(guided, [2], 1, 1.0, stop=["."])

    with_async_engine(work)


# Imports


def test_what_each_part_needs():
    code = """
import sys
sys.modules |= dict.fromkeys(("vllm", "trl", "datasets", "peft", "transformers"))
import torch
import trl_parm.noise
import trl_parm.serving as serving
serving.combine(torch.zeros(2), torch.zeros(2), 1.0)
del sys.modules["peft"], sys.modules["transformers"]
for name in ("CoupledLogitsProcessorV1", "CoupledLogitsProcessorV2", "guided_generate", "AsyncGuidance"):
    try:
        getattr(serving, name)
    except ImportError as error:
        assert "pip install 'vllm>=0.32'" in str(error), error
    else:
        raise AssertionError(name)
import trl_parm.decoding
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SIGNATURES = json.loads(SNAPSHOT.read_text())
DOUBLES = {
    f"{V1}:LogitsProcessor": fake_vllm.LogitsProcessorV1,
    f"{V2}:LogitsProcessor": fake_vllm.LogitsProcessorV2,
    "vllm.v1.engine.llm_engine:LLMEngine": FakeEngine,
    "vllm.v1.engine.async_llm:AsyncLLM": FakeAsyncEngine,
    "vllm.inputs:tokens_input": fake_vllm.tokens_input,
    "vllm.lora.ops.torch_ops:bgmv_shrink": fake_vllm.bgmv_shrink,
    f"{V1}.interface:BatchUpdate": fake_vllm.BatchUpdate,
    f"{V1}.interface:MoveDirectionality": fake_vllm.MoveDirectionality,
    f"{V2}:LogitsContext": fake_vllm.LogitsContext,
    f"{V2}:LogitsProcRequestState": fake_vllm.LogitsProcRequestState,
    "vllm.sampling_params:RequestOutputKind": fake_vllm.RequestOutputKind,
    "vllm:SamplingParams": SamplingParams,
}


CONFIGS = {
    "vllm.config:VllmConfig": config_of_engine(),
    "vllm.config:SchedulerConfig": config_of_engine().scheduler_config,
    "vllm.config:CacheConfig": config_of_engine().cache_config,
    "vllm.config:ModelConfig": config_of_engine().model_config,
    "vllm.config:LoRAConfig": config_of_engine().lora_config,
    "vllm.config:ParallelConfig": config_of_engine().parallel_config,
}


@pytest.mark.parametrize(("owner", "call"), [(owner, call) for owner in CALLS for call in CALLS[owner] or [None]])
def test_calls_of_the_doubles_are_calls_of_vllm(owner, call):
    """By the snapshot: they take what vLLM takes, in its order, and leave out only what may be left out."""
    double = DOUBLES[owner] if call is None else getattr(DOUBLES[owner], call)
    taken = {parameter.removesuffix("=?"): i for i, parameter in enumerate(parameters(double))}
    real = SIGNATURES[owner if call is None else f"{owner}.{call}"]
    assert list(taken) == [p.removesuffix("=?") for p in real if p.removesuffix("=?") in taken]
    assert all(p.endswith("=?") for p in real if p.removesuffix("=?") not in taken)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_doubles_are_names_of_vllm(name):
    """Where vLLM is installed its own classes stand in the place of the doubles of data."""
    if name in CONFIGS:
        assert sorted(vars(CONFIGS[name])) == sorted(SIGNATURES[name])
    else:
        found = [one for one in names(DOUBLES[name]) if NAMES[name] is None or one in NAMES[name]]
        assert sorted(found) == sorted(SIGNATURES[name])
