# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of batches: the text, or its distribution, of plain guidance, whatever is accepted when."""

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from scipy.stats import chisquare
from test_decoders import BETAS, MASK, PROMPTS, ROWS
from test_guides import lora_model, tiny_mistral
from test_shared_forward import base_forwards
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from peft_pblora import set_preference
from trl_parm import (
    LM,
    ARGSLogitsProcessor,
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
    SpeculativeDecoding,
)
from trl_parm.decoding import text_cache
from trl_parm.decoding.draft_length import LONGEST_PAUSE, REMEASURE, DraftLength
from trl_parm.decoding.speculative_sampling import acceptance, expected_tokens, verify
from trl_parm.decoding.text_cache import TextCache


def strong(vocab_size=64):
    return tiny_llama(0, vocab_size, hidden_size=48, num_attention_heads=4, num_hidden_layers=3)


def loras():
    model = lora_model("helpful", "harmless")
    return model, {"a": "helpful", "b": "harmless"}


def parm(preference=ROWS[1], beta=0.5, **guide):
    arm = tiny_arm(tiny_llama(1))
    return strong(), lambda: PARMLogitsProcessor(arm, preference, beta=beta, **guide)


def parm_on_the_base(preference=ROWS[1]):
    arm = tiny_arm(tiny_llama(0))
    return arm.get_base_model(), lambda: PARMLogitsProcessor(arm, preference, beta=0.8)


def genarm():
    model, arms = loras()
    return strong(), lambda: GenARMLogitsProcessor(arms, [0.4, 0.6], adapters_of=model)


def mod_w2s():
    model, arms = loras()
    untuned = LM(model, disable_adapter=True)
    return strong(), lambda: MODWeakToStrongLogitsProcessor(arms, untuned, [0.4, 0.6], adapters_of=model)


def several_guides():
    arm, other = tiny_arm(tiny_llama(1)), tiny_gpt2(2)
    return tiny_arm(tiny_llama(0)).get_base_model(), lambda: GuidedLogitsProcessor(
        PARMLogitsProcessor(arm, ROWS, beta=BETAS).formula + 0.3 * LM(other)
    )


CASES = {
    "PARM": (parm, "auto"),
    "PARM, α and β a row": (lambda: parm(ROWS, BETAS), "auto"),
    "PARM, a draft of its own": (parm, tiny_gpt2(3)),
    "PARM, a scorer drafts": (parm, 0.5 * LM(tiny_llama(5))),
    "PARM, prompt lookup": (lambda: parm(ROWS), "prompt"),
    "PARM, a prompt of its own": (
        lambda: parm(prompt=Prompt({"input_ids": PROMPTS, "attention_mask": MASK}, {"input_ids": PROMPTS[:, 2:]})),
        "auto",
    ),
    "PARM, separate forwards": (lambda: parm(shared_forward=False), "auto"),
    "the ARM drafts": (lambda: (strong(), lambda: PARMLogitsProcessor(tiny_llama(1), beta=0.5)), "auto"),
    "PARM on the base's weights": (lambda: parm_on_the_base(ROWS), tiny_gpt2(3)),
    "PARM on the base's weights, prompt lookup": (parm_on_the_base, "prompt"),
    "GenARM": (genarm, "auto"),
    "MOD-w2s": (mod_w2s, "auto"),
    "guides on two models": (several_guides, "auto"),
    "no guide": (lambda: (strong(), None), tiny_llama(1)),
}
OF_THREE_ROWS = (
    "PARM, α and β a row", "PARM, prompt lookup", "PARM, a prompt of its own", "PARM on the base's weights",
    "guides on two models",
)  # fmt: skip
IN_ALL_SETTINGS = ("PARM", "PARM, α and β a row", "PARM on the base's weights", "GenARM")
SETTINGS = {
    "greedy": {},
    "one prompt": {"prompts": 1},
    "repetition penalty": {"repetition_penalty": 1.3},
    "length counts": {"min_new_tokens": 12, "eos_token_id": [1, 5, 9]},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "stops": {"eos_token_id": [1, 7, 20, 33]},
}


def generate(base, processor, prompts=3, drafts=None, **settings):
    ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    settings = {"max_new_tokens": 16, "eos_token_id": -1, **settings}
    return base.generate(
        ids, attention_mask=mask, logits_processor=[processor()] if processor else [], custom_generate=drafts,
        **settings,
    )  # fmt: skip


TABLE = [(name, setting) for name in CASES for setting in SETTINGS if setting == "greedy" or name in IN_ALL_SETTINGS]


@pytest.mark.parametrize(("name", "setting"), TABLE, ids=str)
def test_greedy_text_is_that_of_plain_guidance(name, setting):
    make, draft = CASES[name]
    settings = SETTINGS[setting]
    if settings.get("prompts") == 1 and name in OF_THREE_ROWS:
        pytest.skip("it has a preference or a prompt for each of three rows")
    base, processor = make()
    plain = generate(base, processor, **settings)
    speculative = SpeculativeDecoding(draft, draft_tokens=3)
    assert torch.equal(generate(base, processor, drafts=speculative, **settings), plain)
    assert 0 <= speculative.accepted <= speculative.drafted


def test_the_length_of_drafts_changes_no_text():
    base, processor = parm(ROWS)
    plain = generate(base, processor, max_new_tokens=60)
    assert torch.equal(generate(base, processor, drafts=SpeculativeDecoding(), max_new_tokens=60), plain)


def test_a_draft_that_is_the_base_model_is_accepted_whole():
    base, processor = parm()
    speculative = SpeculativeDecoding(base, draft_tokens=4)
    generate(base, processor, drafts=speculative, max_new_tokens=21)
    assert speculative.accepted == speculative.drafted
    assert speculative.rounds == 1 + 4


def test_sampled_rows_have_their_own_distributions():
    """Two prompts, two preferences, drafts of four: the first two tokens of many samples against float64."""
    samples, repeats = 3000, 24
    base, arm = strong(8), tiny_arm(tiny_llama(1, 8))
    prompts, preferences, beta = torch.tensor([[2, 5, 3], [0, 6, 4]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0.7
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    counts = torch.zeros(2, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    for draft in ("auto", tiny_llama(3, 8)):
        for _ in range(repeats):
            texts = base.generate(
                prompts, attention_mask=mask, logits_processor=[PARMLogitsProcessor(arm, preferences, beta)],
                custom_generate=SpeculativeDecoding(draft, draft_tokens=4), do_sample=True, top_k=0, max_new_tokens=3,
                num_return_sequences=samples // repeats // 2, eos_token_id=-1,
            )[:, 3:5].view(2, -1, 2)  # fmt: skip
            for row in range(2):
                counts[row].index_put_((texts[row, :, 0], texts[row, :, 1]), torch.ones(1).double(), accumulate=True)
    for row in range(2):
        expected = two_tokens(base, arm, prompts[row][mask[row] == 1][None], preferences[row], beta) * samples
        rare = expected < 5
        observed = torch.cat([counts[row][~rare], counts[row][rare].sum()[None]])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def two_tokens(base, arm, prompt, preference, beta):
    """The joint distribution of the next two tokens in float64, shape `(8, 8)`."""

    def next_token(ids):
        return exact(base, ids) + exact(arm, ids) / beta

    set_preference(arm, preference)
    first = torch.softmax(next_token(prompt), -1)[0]
    second = [torch.softmax(next_token(torch.cat([prompt, torch.tensor([[t]])], 1)), -1)[0] for t in range(8)]
    return first[:, None] * torch.stack(second)


@torch.no_grad()
def exact(model, ids):
    return torch.log_softmax(model(ids).logits[:, -1].double(), -1)


@pytest.mark.parametrize("seed", range(4))
def test_what_verify_emits_has_the_target_distribution(seed):
    """Over a fine grid of uniform noise and all drafted tokens: min(p, q) + (p − q)₊ = p."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.softmax(3 * torch.randn(6, generator=generator).double(), 0) for _ in range(2))
    if seed == 0:
        q[2] = 0
        q /= q.sum()
    grid = (torch.arange(20000).double() + 0.5) / 20000
    emitted = torch.zeros(6).double()
    for token in range(6):
        tokens = torch.full((len(grid), 1), token)
        rows = (len(grid), 1, 6)
        counts, left = verify(p.expand(rows), q.expand(rows), tokens, grid[:, None])
        accepted = counts.double().mean()
        emitted[token] += q[token] * accepted
        emitted += q[token] * (1 - accepted) * left[counts == 0].mean(0).nan_to_num()
    torch.testing.assert_close(emitted, p, atol=1e-4, rtol=1e-4)
    assert acceptance(p, q) == pytest.approx(float(torch.minimum(p, q).sum()))


def test_verify_stops_at_the_first_rejection_and_where_nothing_was_drafted():
    p = torch.eye(4)[None, [1, 2, 3]].repeat(3, 1, 1)
    q = torch.eye(4)[torch.tensor([[1, 2, 3], [1, 0, 3], [1, 2, 3]])]
    q[2, 1] = 0
    counts, left = verify(p, q, torch.tensor([[1, 2, 3], [1, 0, 3], [1, 2, 3]]), torch.full((3, 3), 0.5))
    assert counts.tolist() == [3, 1, 1]
    assert left[1:].argmax(-1).tolist() == [2, 2]
    assert torch.isfinite(left).all()


def test_expected_tokens_is_the_geometric_sum():
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_tokens(1.0, 4) == 5


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("most_holes", [0, 3, 1000])
def test_a_cache_whose_rows_are_taken_back_at_random_is_that_of_the_texts(most_holes, make, monkeypatch):
    monkeypatch.setattr(text_cache, "MOST_HOLES", most_holes)
    model, generator = make(0), torch.Generator().manual_seed(most_holes)
    lm, fed = LM(model), []
    cache = TextCache(lm.empty_cache)
    rows = [torch.randint(2, 64, (int(n),), generator=generator) for n in (5, 2, 7)]
    for step in range(25):
        last = min(int(torch.randint(1, 4, (1,), generator=generator)), min(len(row) for row in rows))
        width = max(len(row) for row in rows) + step % 3
        tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for i, row in enumerate(rows):
            start = 0 if step % 2 else width - len(row)
            tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1

        def forward(ids, seen, positions, kv, kept):
            fed.append(ids.shape[1])
            return lm.feed(ids, seen, positions, kv, kept)

        with torch.no_grad():
            found = cache.read(tokens, mask, last, forward)
            for i, row in enumerate(rows):
                torch.testing.assert_close(found[i], model(row[None]).logits[0, -last:], atol=1e-4, rtol=1e-4)
        for i, row in enumerate(rows):
            back = int(torch.randint(0, min(4, len(row)), (1,), generator=generator))
            new = torch.randint(2, 64, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator)
            rows[i] = torch.cat([row[: len(row) - back], new])
    assert max(fed[1:]) <= 10


def test_sliding_windows_are_for_single_rows():
    base, arm = tiny_mistral(0), tiny_arm(tiny_mistral(1))
    processor = lambda: PARMLogitsProcessor(arm, ROWS[1])  # noqa: E731
    speculative = SpeculativeDecoding(draft_tokens=3)
    single = generate(base, processor, prompts=1, drafts=speculative)
    assert torch.equal(single, generate(base, processor, prompts=1))
    with pytest.raises(ValueError, match="sliding-window"):
        generate(base, processor, drafts=speculative)


def test_no_position_beyond_the_last_is_read():
    """GPT-2 has 64 of them; the rows reach the end, or stop, at different times."""
    base, arm = tiny_gpt2(0), tiny_arm(tiny_gpt2(1), target_modules=["c_attn"])
    processor = lambda: PARMLogitsProcessor(arm, ROWS[1])  # noqa: E731
    settings = {"max_new_tokens": 64 - PROMPTS.shape[1], "eos_token_id": [3]}
    plain = generate(base, processor, **settings)
    assert torch.equal(generate(base, processor, drafts=SpeculativeDecoding(draft_tokens=5), **settings), plain)


def test_forwards_are_those_of_drafts_and_one_for_each_round():
    base, arm = strong(), tiny_arm(tiny_llama(1))
    rows, rounds = base_forwards(arm), base_forwards_of(base)
    speculative = SpeculativeDecoding(draft_tokens=3)
    generate(base, lambda: PARMLogitsProcessor(arm, ROWS[1]), drafts=speculative, prompts=1)
    assert len(rounds) == speculative.rounds
    together = [count for count in rows if count == 2]
    whole = len(together) - speculative.drafted
    assert 0 <= whole < speculative.rounds
    assert len(rows) - len(together) == 1


def base_forwards_of(model) -> list[int]:
    rows = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    return rows


def test_verifying_on_the_base_model_s_weights_is_one_forward():
    base, processor = parm_on_the_base()
    rows = base_forwards_of(base)
    speculative = SpeculativeDecoding("prompt", draft_tokens=3)
    generate(base, processor, drafts=speculative)
    assert rows == [6] * speculative.rounds


def rounds(length: DraftLength, count: int, drafting: float, plain: float, accepted: float, window: float = 0.0):
    """Feeds times and acceptances to a controller; returns what it drafted."""
    drafted = []
    for _ in range(count):
        n = length.next()
        kept = n if accepted == 1 else 0
        if 0 < accepted < 1:
            kept = min(n, int(accepted / (1 - accepted)))
        length.record(n, kept, min(kept + 1, n), n * drafting, plain + n * window)
        drafted.append(n)
    return drafted


def test_good_drafts_grow_and_bad_ones_are_switched_off():
    assert rounds(DraftLength(8), 60, 0.05, 1.0, 1.0)[-5:] == [8] * 5
    assert rounds(DraftLength(4), 60, 0.05, 1.0, 1.0)[-1] == 4
    middling = rounds(DraftLength(8), 60, 0.1, 1.0, 0.7)[-10:]
    assert all(1 <= n <= 4 for n in middling)
    bad = rounds(DraftLength(8), 400, 0.3, 1.0, 0.0)
    assert sum(n > 0 for n in bad) <= 16
    dear = rounds(DraftLength(8), 400, 1.2, 1.0, 1.0)
    assert sum(n > 0 for n in dear) <= 16


@pytest.mark.parametrize(("count", "drafting", "window"), [(600, 0.3, 0.0), (96, 0.3, 0.15), (96, 0.1, 0.4)])
def test_drafting_that_never_fits_costs_less_than_a_twentieth(count, drafting, window):
    """Tokens whose drafts are always wrong: a draft costs a share of a step, and so does each in the window judged."""
    length, seconds, tokens = DraftLength(8), 0.0, 0
    while tokens < count:
        n = length.next()
        length.record(n, 0, min(1, n), n * drafting, 1.0 + n * window)
        seconds, tokens = seconds + n * (drafting + window) + 1.0, tokens + 1
    assert seconds < count / 0.95


def test_drafts_that_begin_to_fit_are_found():
    length = DraftLength(8)
    rounds(length, 60, 0.05, 1.0, 0.0, 0.05)
    assert rounds(length, 400, 0.05, 1.0, 1.0, 0.05).count(8) > 250


def test_pauses_grow_up_to_a_limit_and_plain_steps_are_timed_again():
    bad = rounds(DraftLength(8), 3000, 0.3, 1.0, 0.0)
    tries = [i for i in range(1, len(bad)) if bad[i] and not bad[i - 1]]
    gaps = [b - a for a, b in zip(tries, tries[1:])]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= LONGEST_PAUSE + 2
    good = rounds(DraftLength(8), 3 * REMEASURE, 0.05, 1.0, 1.0)[2:]
    assert 1 <= sum(n == 0 for n in good) <= 3


def test_a_fixed_length_is_kept():
    assert rounds(DraftLength(8, fixed=5), 10, 9.0, 1.0, 0.0) == [0] + [5] * 9


def test_the_sharpening_of_a_draft_adapts():
    """A base model twice as sharp as the ARM: the ARM's own draft has to be sharpened further."""
    arm = tiny_llama(1)
    base = tiny_llama(1)
    base.lm_head.weight.data *= 2
    speculative, made = SpeculativeDecoding(draft_tokens=3), []
    make = SpeculativeDecoding._make_draft
    speculative._make_draft = lambda *args: (made.append(make(speculative, *args)), made[0])[1]
    torch.manual_seed(0)
    generate(base, lambda: PARMLogitsProcessor(arm, beta=1.0), drafts=speculative, do_sample=True, max_new_tokens=60)
    assert 1.2 < made[0].scale < 3


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_tokens_are_streamed():
    base, processor = parm()
    streamer = Collected()
    text = generate(base, processor, prompts=1, drafts=SpeculativeDecoding(draft_tokens=3, streamer=streamer))
    assert streamer.tokens == text[0].tolist()
    assert streamer.ended


class Ends(StoppingCriteria):
    """Stops at a token, and notes how long the rows are that it is asked about."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_any_criterion_stops_a_row_inside_a_draft():
    base, processor = parm()
    plain = generate(base, processor)
    settings = {"stopping_criteria": [Ends(int(plain[0, PROMPTS.shape[1] + 4]))], "pad_token_id": 0}
    stopped = generate(base, processor, **settings)
    assert not torch.equal(stopped, plain)
    drafts = SpeculativeDecoding(base, draft_tokens=6)
    assert torch.equal(generate(base, processor, drafts=drafts, **settings), stopped)


def test_the_dictionary_has_the_sequences():
    base, processor = parm()
    output = generate(base, processor, drafts=SpeculativeDecoding(draft_tokens=2), return_dict_in_generate=True)
    assert torch.equal(output.sequences, generate(base, processor))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "nothing"}, "must be 'auto', 'prompt'"),
        ({"draft_tokens": 0}, "must be 1 or more"),
        ({"max_draft_tokens": 0}, "must be 1 or more"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeDecoding(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "use_cache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_settings_that_it_can_not_follow(settings, message):
    base, processor = parm()
    with pytest.raises(ValueError, match=message):
        generate(base, processor, drafts=SpeculativeDecoding(), **settings)


def test_inputs_that_it_would_leave_out():
    processor = lambda: PARMLogitsProcessor(tiny_arm(tiny_llama(1)), ROWS[1])  # noqa: E731
    with pytest.raises(ValueError, match="input `encoder_hidden_states`"):
        generate(tiny_gpt2(0), processor, drafts=SpeculativeDecoding(), encoder_hidden_states=torch.zeros(3, 5, 32))


def test_guides_that_it_can_not_use():
    base, processor = parm_on_the_base()
    with pytest.raises(ValueError, match="nothing to draft with"):
        generate(base, processor, drafts=SpeculativeDecoding())
    reward = lambda: ARGSLogitsProcessor(  # noqa: E731
        {"a": lambda prompts, responses: [0.0] * len(responses)}, [1.0], tokenizer=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="language models"):
        generate(strong(), reward, drafts=SpeculativeDecoding("prompt"))
