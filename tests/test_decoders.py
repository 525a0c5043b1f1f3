# SPDX-License-Identifier: Apache-2.0
"""Every decoder in every mode of `generate`, against its formula in float64, without any cache.

A new decoder is one row of `DECODERS`, a new mode one row of `MODES`. `make test` runs the corners of this table,
`make test-slow` the rest.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import LlamaForSequenceClassification, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from peft_pblora import set_preference
from trl_parm import (
    BASE,
    LM,
    ARGSLogitsProcessor,
    ClassifierReward,
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    PowerMean,
    Prompt,
    Scorer,
    TransferQLogitsProcessor,
)


PROMPTS = torch.tensor([[0, 0, 5, 9, 33], [7, 8, 20, 41, 2], [0, 6, 6, 50, 11]])
MASK = (PROMPTS != 0).long()
ROWS = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
BETAS = torch.tensor([0.5, 1.0, 2.0])


def tiny_judge(**changes):
    """A random sequence classifier with two outputs."""
    config = tiny_llama(7, **changes).config
    config.num_labels = 2
    torch.manual_seed(7)
    return LlamaForSequenceClassification(config).eval()


@dataclass
class Models:
    """The models of a test: the one that generates, an ARM, and small policies with their reference."""

    base: torch.nn.Module
    arm: torch.nn.Module
    first: torch.nn.Module
    second: torch.nn.Module
    reference: torch.nn.Module
    judge: torch.nn.Module | None = None

    @classmethod
    def make(cls, **changes) -> "Models":
        small = [tiny_llama(seed, **changes) for seed in (0, 2, 3, 4)]
        # A policy that decodes on in Transfer-Q does not write pad tokens.
        small[1].lm_head.weight.data[0] = 0
        return cls(small[0], tiny_arm(tiny_llama(1, **changes)), *small[1:], tiny_judge(**changes))


@dataclass
class Decoder:
    """How a user makes it, and its formula of log π_base and a function that gives log π of another model."""

    make: Callable[[Models], LogitsProcessor]
    formula: Callable[[Models, torch.Tensor, Callable], torch.Tensor]
    rows: int | None = None


def parm_of_rows(models, base, log_pi):
    """Each row at its own α and β: the rows of one preference at a time."""
    repeats = len(base) // 3
    guide = torch.stack(
        [log_pi(models.arm, ROWS[i // repeats])[i] / BETAS[i // repeats].double() for i in range(len(base))]
    )
    return base + guide


def of_each_row(base, weights):
    """A weight for each prompt as a column, for rows that `generate` repeats."""
    return weights.double().repeat_interleave(len(base) // 3)[:, None]


def genarm_of_rows(models, base, log_pi):
    strength = ROWS / BETAS[:, None]
    return (
        base
        + of_each_row(base, strength[:, 0]) * log_pi(models.first)
        + of_each_row(base, strength[:, 1]) * log_pi(models.second)
    )


def harmonic_of_rows(models, base, log_pi):
    helpful = of_each_row(base, ROWS[:, 0]) / log_pi(models.first).exp()
    return -(helpful + of_each_row(base, ROWS[:, 1]) / log_pi(models.second).exp()).log()


def harmonic(order):
    def formula(models, base, log_pi):
        mean = 0.3 * base.exp() ** -order + 0.7 * log_pi(models.first).exp() ** -order
        return -mean.log() / order

    return formula


def search(label_weights, k, rollout=0):
    """Every row and candidate on its own, whole texts without padding, decoded further with the policy `first`."""

    def formula(models, base, log_pi):
        result = torch.full_like(base, -torch.inf)
        for row, best in enumerate(base.topk(k).indices):
            prefix = log_pi.tokens[row][log_pi.mask[row].bool()]
            for candidate in best.tolist():
                text = [*prefix.tolist(), candidate]
                for _ in range(rollout):
                    if text[-1] == 1 and len(text) > len(prefix):
                        break
                    text.append(models.first(torch.tensor([text])).logits[0, -1].argmax().item())
                found = models.judge.score(models.judge.model(torch.tensor([text])).last_hidden_state)[0, -1]
                result[row, candidate] = base[row, candidate] + sum(w * found[i] for i, w in label_weights.items())
        return result

    return formula


DECODERS = {
    "PARM": Decoder(
        lambda m: PARMLogitsProcessor(m.arm, [0.3, 0.7], beta=0.8),
        lambda m, base, log_pi: base + log_pi(m.arm, [0.3, 0.7]) / 0.8,
    ),
    "PARM, α and β a row": Decoder(lambda m: PARMLogitsProcessor(m.arm, ROWS, beta=BETAS), parm_of_rows, rows=3),
    "GenARM": Decoder(
        lambda m: GenARMLogitsProcessor({"helpful": m.first, "harmless": m.second}, [0.25, 0.75], beta=0.5),
        lambda m, base, log_pi: base + 0.5 * log_pi(m.first) + 1.5 * log_pi(m.second),
    ),
    "GenARM, α and β a row": Decoder(
        lambda m: GenARMLogitsProcessor({"helpful": m.first, "harmless": m.second}, ROWS, beta=BETAS),
        genarm_of_rows,
        rows=3,
    ),
    "MOD": Decoder(
        lambda m: MODLogitsProcessor({"helpful": BASE, "harmless": m.first, "funny": m.second}, [0.5, 0.2, 0.3]),
        lambda m, base, log_pi: 0.5 * base + 0.2 * log_pi(m.first) + 0.3 * log_pi(m.second),
    ),
    "MOD, forward KL": Decoder(
        lambda m: MODLogitsProcessor({"helpful": BASE, "harmless": m.first}, [0.3, 0.7], "forward_kl"), harmonic(1.0)
    ),
    "MOD, α-divergence": Decoder(
        lambda m: MODLogitsProcessor({"helpful": BASE, "harmless": m.first}, [0.3, 0.7], "alpha", order=0.5),
        harmonic(0.5),
    ),
    "MOD, forward KL, α a row": Decoder(
        lambda m: MODLogitsProcessor({"helpful": m.first, "harmless": m.second}, ROWS, "forward_kl"),
        harmonic_of_rows,
        rows=3,
    ),
    "MOD-w2s": Decoder(
        lambda m: MODWeakToStrongLogitsProcessor(
            {"helpful": m.first, "harmless": m.second}, m.reference, {"helpful": 0.4, "harmless": 0.6}
        ),
        lambda m, base, log_pi: (
            base
            + 0.4 * (log_pi(m.first) - log_pi(m.reference))
            + 0.6 * (log_pi(m.second) - log_pi(m.reference))
        ),
    ),
    "ARGS": Decoder(
        lambda m: ARGSLogitsProcessor(
            {"a": ClassifierReward(m.judge), "b": ClassifierReward(m.judge, label=1)}, [0.25, 0.75], weight=2.0, k=4
        ),
        search({0: 0.5, 1: 1.5}, k=4),
    ),
    "Transfer-Q": Decoder(
        lambda m: TransferQLogitsProcessor(m.judge, m.first, k=3, rollout_tokens=4), search({0: 1.0}, k=3, rollout=4)
    ),
    "a formula": Decoder(
        lambda m: GuidedLogitsProcessor(BASE + 0.7 * LM(m.first) - 0.2 * LM(m.second)),
        lambda m, base, log_pi: base + 0.7 * log_pi(m.first) - 0.2 * log_pi(m.second),
    ),
}  # fmt: skip

ONE_ROW = {"prompts": 1}
MODES = {
    "greedy": {},
    "one prompt": ONE_ROW,
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "returned beams": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "prompt lookup": {**ONE_ROW, "prompt_lookup_num_tokens": 3},
    "assisted": {**ONE_ROW, "assistant": True},
    "assisted sampling": {**ONE_ROW, "assistant": True, "do_sample": True},
    "assistant that is the base": {**ONE_ROW, "assistant": "base"},
}


IN_EVERY_MODE = ("PARM", "GenARM, α and β a row", "MOD-w2s", "ARGS", "Transfer-Q")
FOR_EVERY_DECODER = ("greedy", "beam search", "several sequences", "prompt lookup")


class NaiveProcessor(LogitsProcessor):
    """A decoder's formula from whole prefixes, in float64."""

    def __init__(self, decoder: Decoder, models: Models, mask: torch.Tensor) -> None:
        self.decoder, self.mask = decoder, mask
        self.models = Models(
            **{name: copy.deepcopy(model).double() for name, model in vars(models).items() if model is not None}
        )

    def __call__(self, input_ids, scores):
        mask = torch.ones_like(input_ids)
        mask[:, : self.mask.shape[1]] = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)

        def log_pi(model, preference=None):
            if preference is not None:
                set_preference(model, preference)
            with torch.no_grad():
                logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            return torch.log_softmax(logits, -1)

        # In float32 at the end, since a draw from a float64 tensor consumes other random numbers.
        log_pi.tokens, log_pi.mask = input_ids, mask
        with torch.no_grad():
            guided = self.decoder.formula(self.models, torch.log_softmax(scores.double(), -1), log_pi)
        return guided.float()


def generate(models: Models, processor, prompts=3, assistant=None, **mode):
    torch.manual_seed(0)
    settings = {"max_new_tokens": 10, "output_scores": True, "return_dict_in_generate": True, **mode}
    if assistant:
        settings["assistant_model"] = models.base if assistant == "base" else models.reference
    ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    return models.base.generate(input_ids=ids, attention_mask=mask, logits_processor=[processor], **settings)


def table():
    """Every decoder in every mode. What differs from its neighbours in the formula alone is for `make test-slow`."""
    for name in DECODERS:
        for mode in MODES:
            quick = name in IN_EVERY_MODE or mode in FOR_EVERY_DECODER
            yield pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mode"), table())
def test_every_decoder_in_every_mode(name, mode):
    decoder, settings = DECODERS[name], MODES[mode]
    if decoder.rows and settings.get("prompts") == 1:
        pytest.skip("it has a preference for each of three rows")
    models = Models.make()
    mask = MASK[1:2] if settings.get("prompts") == 1 else MASK
    guided = generate(models, decoder.make(models), **settings)
    naive = generate(models, NaiveProcessor(decoder, models, mask), **settings)
    assert torch.equal(guided.sequences, naive.sequences)
    for ours, theirs in zip(guided.scores, naive.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS, ids=str)
def test_sampling_is_unbiased(name):
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
    torch.manual_seed(1)
    output = models.base.generate(
        prompt, attention_mask=torch.ones_like(prompt), logits_processor=[decoder.make(models)], do_sample=True,
        top_k=0, max_new_tokens=2, num_return_sequences=samples, eos_token_id=-1,
    )[:samples, 3:]  # fmt: skip
    counts = torch.bincount(output[:, 0] * 8 + output[:, 1], minlength=64).double()
    expected = joint.flatten().double() * samples
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(observed[wanted > 0], wanted[wanted > 0] * samples / wanted.sum()).pvalue > 1e-3


def fed_tokens(model) -> list[int]:
    """The length of every forward of a model, from now on."""
    found = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted", "assistant that is the base"])
def test_verifying_a_draft_costs_no_forward_of_the_guide(mode):
    """Each prefix is run once, whether the assistant or the base asks for it; only drafted tokens that were rejected
    are run on top of those that are kept."""
    models = Models.make()
    asked, fed = [], fed_tokens(models.first)
    processor = GuidedLogitsProcessor(BASE + 0.5 * LM(models.first))
    call = processor.formula.terms()[1][1].__class__.__call__

    def counting(self, ids, scores):
        asked.append(tuple(ids[0].tolist()))
        return call(self, ids, scores)

    processor.formula.terms()[1][1].__class__.__call__ = counting
    try:
        sequence = generate(models, processor, **MODES[mode], max_new_tokens=16).sequences
    finally:
        processor.formula.terms()[1][1].__class__.__call__ = call
    assert len(asked) > len(set(asked)) or mode == "prompt lookup"
    assert len(fed) == len(set(asked))
    assert sum(fed) - PROMPTS.shape[1] == len(set(asked)) - 1
    assert sequence.shape[1] == PROMPTS.shape[1] + 16


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_get_the_guided_tokens():
    models, streamer = Models.make(), Collect()
    sequence = generate(models, DECODERS["PARM"].make(models), prompts=1, streamer=streamer).sequences
    assert streamer.tokens == [*sequence[0].tolist(), -1]


def test_rows_change_between_calls_and_keep_to_themselves():
    """A row's text depends on its own prompt, preference and β alone."""
    models = Models.make()
    together = generate(models, PARMLogitsProcessor(models.arm, ROWS, beta=BETAS)).sequences
    for i in range(3):
        processor = PARMLogitsProcessor(
            models.arm, ROWS[i], beta=BETAS[i].item(), prompt=Prompt({"attention_mask": MASK[i : i + 1]})
        )
        alone = models.base.generate(
            PROMPTS[i : i + 1], attention_mask=MASK[i : i + 1], logits_processor=[processor], max_new_tokens=10
        )
        assert torch.equal(alone[0, 5:], together[i, 5 : alone.shape[1]])
    order = [2, 0, 1]
    shuffled = models.base.generate(
        PROMPTS[order], attention_mask=MASK[order], max_new_tokens=10,
        logits_processor=[PARMLogitsProcessor(models.arm, ROWS[order], beta=BETAS[order])],
    )  # fmt: skip
    assert torch.equal(shuffled, together[order])


def test_preference_and_beta_change_between_calls():
    """One processor, as a new one for each would answer: other α and β, one for all or one for each row."""
    models = Models.make()
    processor = PARMLogitsProcessor(models.arm, [0.3, 0.7], beta=0.8)
    changes = [
        {},
        {"preference": ROWS},
        {"beta": BETAS},
        {"preference": {"helpful": 1.0, "harmless": 0.0}, "beta": 2.0},
    ]
    now = {"preference": [0.3, 0.7], "beta": 0.8}
    for change in changes:
        processor.set(**change)
        now |= change
        fresh = PARMLogitsProcessor(models.arm, **now)
        assert repr(processor) == repr(fresh)
        assert torch.equal(generate(models, processor).sequences, generate(models, fresh).sequences)
    before = repr(processor)
    for bad in ({"preference": [0.5, 0.6]}, {"beta": 0.0}, {"preference": [0.5, 0.5], "beta": float("nan")}):
        with pytest.raises(ValueError, match="must"):
            processor.set(**bad)
    assert repr(processor) == before


def test_equal_prompts_with_their_own_preferences_do_not_share_a_cache():
    models, ids = Models.make(), PROMPTS[1:2].repeat(3, 1)
    processor = PARMLogitsProcessor(models.arm, ROWS)
    reordering = torch.cat([ids, torch.tensor([[9], [9], [9]])], 1)
    for prefix in (ids, reordering, ids):
        scores = torch.zeros(3, 64)
        found = processor(prefix, scores)
        for i in range(3):
            alone = PARMLogitsProcessor(models.arm, ROWS[i])(prefix[i : i + 1], scores[:1])
            torch.testing.assert_close(found[i : i + 1], alone)


def test_weak_to_strong():
    """A small ARM guides a larger base of the same tokenizer."""
    base = tiny_llama(0, hidden_size=96, num_attention_heads=4, intermediate_size=160, num_hidden_layers=4)
    models = Models.make()
    models.base = base
    guided = generate(models, DECODERS["PARM"].make(models)).sequences
    assert torch.equal(guided, generate(models, NaiveProcessor(DECODERS["PARM"], models, MASK)).sequences)
    unguided = base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=10)
    assert not torch.equal(guided, unguided)


def test_formulas_are_printed():
    models = Models.make()
    assert repr(DECODERS["GenARM"].make(models)) == (
        "GenARMLogitsProcessor(1 * BASE + 0.5 * LM(LlamaForCausalLM) + 1.5 * LM(LlamaForCausalLM))"
    )
    assert "-1 * LM" in repr(DECODERS["MOD-w2s"].make(models))
    assert "PowerMean(0.3 * BASE, 0.7 * LM(LlamaForCausalLM); order=0.5)" in repr(
        DECODERS["MOD, α-divergence"].make(models)
    )
    assert "[2, 1, 0.5] * LM(PeftModelForCausalLM, a preference for each of 3 rows)" in repr(
        DECODERS["PARM, α and β a row"].make(models)
    )


def test_objectives_of_weight_0_cost_nothing():
    models = Models.make()
    fed = fed_tokens(models.first)
    processor = GenARMLogitsProcessor({"helpful": models.first, "harmless": models.second}, [0.0, 1.0])
    generate(models, processor)
    assert fed == []
    mod = MODWeakToStrongLogitsProcessor({"a": models.first, "b": models.second}, models.reference, [0.5, 0.5])
    fed = fed_tokens(models.reference)
    generate(models, mod)
    assert len(fed) == 10


scorers = st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 3)), min_size=1, max_size=6)


class Fixed(Scorer):
    """A scorer with fixed values, one of them −inf."""

    def __init__(self, seed: int) -> None:
        self.values = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
        self.values[:, seed % 5] = -torch.inf

    def __call__(self, input_ids, scores):
        return self.values

    def __repr__(self) -> str:
        return "Fixed"


FIXED = [Fixed(seed) for seed in range(4)]
IDS, SCORES = torch.zeros(2, 1, dtype=torch.long), torch.randn(2, 5, generator=torch.Generator().manual_seed(9))


@given(a=scorers, b=scorers, factor=st.floats(-2, 2), row=st.booleans())
@settings(max_examples=60, deadline=None)
def test_laws_of_the_algebra(a, b, factor, row):
    """Sums commute and distribute; equal terms merge; the value is the weighted sum without terms of weight 0."""
    weight = torch.tensor([factor, 1.0]) if row else factor

    def build(terms):
        formula = 0 * BASE
        for w, i in terms:
            formula = formula + w * FIXED[i]
        return formula

    def value(formula):
        return formula(IDS, SCORES)

    def same(x, y):
        torch.testing.assert_close(value(x), value(y), equal_nan=True, atol=1e-4, rtol=1e-4)

    x, y = build(a), build(b)
    same(x + y, y + x)
    if factor:
        same(weight * (x + y), weight * x + weight * y)
    same(x * 2 / 2, x)
    assert (x - x).terms() == []
    assert len((x + y).terms()) <= 4
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for w, scorer in x.terms():
        expected = expected + w * scorer.values
    torch.testing.assert_close(value(x).double(), expected, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_power_means():
    values = [BASE(IDS, SCORES).double(), FIXED[1].values]
    mean = PowerMean([(0.25, BASE), (0.75, FIXED[1]), (0.0, FIXED[2])], order=2.0)
    expected = (0.25 * values[0].exp() ** -2 + 0.75 * values[1].exp() ** -2) ** -0.5
    torch.testing.assert_close(mean(IDS, SCORES).double().exp(), expected, atol=1e-5, rtol=1e-5)
    assert (mean(IDS, SCORES)[:, 1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: GenARMLogitsProcessor({}, []), "`arms` is empty"),
        (lambda m: GenARMLogitsProcessor({"a": m.first}, {"b": 1.0}), "b"),
        (lambda m: GenARMLogitsProcessor({"a": m.first, "b": m.second}, [0.5]), "has 1 entries"),
        (lambda m: GenARMLogitsProcessor({"a": "one", "b": "two"}, [0.5, 0.5]), "Pass `adapters_of=peft_model`"),
        (lambda m: MODLogitsProcessor({"a": BASE}, [1.0], "jensen"), "must be one of reverse_kl, forward_kl, alpha"),
        (lambda m: MODLogitsProcessor({"a": BASE}, [1.0], "alpha", order=0.0), "`order` is 0.0"),
        (lambda m: PowerMean([(-0.5, BASE)]), "none may be negative"),
        (lambda m: PARMLogitsProcessor(m.arm, ROWS, beta=[1.0, float("nan"), 1.0]), "positive, finite number"),
        (lambda m: PARMLogitsProcessor(m.arm, ROWS, beta=torch.ones(2, 2)), "positive, finite number"),
        (lambda m: BASE * torch.ones(2, 2), "must be a number or"),
    ],
)
def test_bad_decoders(make, message):
    with pytest.raises(ValueError, match=message):
        make(Models.make())


@pytest.mark.parametrize(
    ("preference", "beta", "message"),
    [(ROWS[:2], 1.0, "is set for 2 rows, but the batch has 3"), ([0.5, 0.5], BETAS[:2], "has weights for 2 rows")],
)
def test_rows_that_do_not_fit_the_batch(preference, beta, message):
    models = Models.make()
    with pytest.raises(ValueError, match=message):
        generate(models, PARMLogitsProcessor(models.arm, preference, beta=beta))
