# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of batches: the text, or its distribution, of plain guidance, whatever is accepted when."""

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from decoding.architectures import ARCHITECTURES, Cell
from decoding.tables import BETAS, DOORS, MASK, PROMPTS, ROWS, fed_rows, fed_tokens, lora_model, tiny_mistral
from scipy.stats import chisquare
from transformers import LogitsProcessor, StoppingCriteria, SynthIDTextWatermarkingConfig
from transformers.generation.streamers import BaseStreamer

from peft_pblora import set_preference
from peft_pblora.kv_cache import cache_argument, cache_in
from trl_parm import (
    BASE,
    LM,
    Guided,
    GuidedLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
    SpeculativeDecoding,
    Vocabulary,
)
from trl_parm.decoding import args, genarm, mod_w2s, parm
from trl_parm.decoding.speculative import texts as growing
from trl_parm.decoding.speculative.texts import Reader, Texts


every_door = pytest.mark.parametrize("door", DOORS)


def strong(vocab_size=64):
    return tiny_llama(0, vocab_size, hidden_size=48, num_attention_heads=4, num_hidden_layers=3)


def weak(vocab_size=64):
    return tiny_arm(tiny_llama(1, vocab_size))


def apart(preference=ROWS[1], beta=0.5):
    return strong(), parm(weak(), preference, beta=beta)


def on_the_base(preference=ROWS[1]):
    arm = tiny_arm(tiny_llama(0))
    return arm.get_base_model(), parm(arm, preference, beta=0.8)


def with_loras(formula):
    def make():
        model = lora_model("helpful", "harmless")
        return strong(), formula({"a": "helpful", "b": "harmless"}, model)

    return make


def several_guides():
    base = tiny_arm(tiny_llama(0)).get_base_model()
    return base, parm(weak(), ROWS, beta=BETAS) + 0.3 * LM(tiny_gpt2(2))


CASES = {
    "PARM": (apart, "auto"),
    "PARM, α and β a row": (lambda: apart(ROWS, BETAS), "auto"),
    "PARM, a draft of its own": (apart, tiny_gpt2(3)),
    "PARM, a scorer drafts": (apart, 0.5 * LM(tiny_llama(5))),
    "PARM, prompt lookup": (lambda: apart(ROWS), "prompt"),
    "PARM, a prompt of its own": (apart, "auto"),
    "the ARM drafts": (lambda: (strong(), parm(tiny_llama(1), beta=0.5)), "auto"),
    "PARM on the base's weights": (lambda: on_the_base(ROWS), tiny_gpt2(3)),
    "PARM on the base's weights, prompt lookup": (on_the_base, "prompt"),
    "GenARM": (with_loras(lambda arms, model: genarm(arms, [0.4, 0.6], adapters_of=model)), "auto"),
    "MOD-w2s": (
        with_loras(lambda arms, m: mod_w2s(arms, LM(m, disable_adapter=True), [0.4, 0.6], adapters_of=m)), "auto"
    ),
    "guides on two models": (several_guides, "auto"),
}  # fmt: skip
OF_THREE_ROWS = ("PARM, α and β a row", "PARM, prompt lookup", "PARM on the base's weights", "guides on two models")
IN_ALL_SETTINGS = ("PARM", "PARM, α and β a row", "PARM on the base's weights", "GenARM")
SETTINGS = {
    "greedy": {},
    "one prompt": {"prompts": 1},
    "repetition penalty": {"repetition_penalty": 1.3},
    "length counts": {"min_new_tokens": 12, "eos_token_id": [1, 5, 9]},
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "stops": {"eos_token_id": [1, 7, 20, 33]},
}


def decode(door, base, formula, prompts=3, drafts=None, prompt=None, ids=None, processors=(), **settings):
    if ids is None:
        ids, mask = (PROMPTS[1:2], MASK[1:2]) if prompts == 1 else (PROMPTS, MASK)
    else:
        mask = torch.ones_like(ids)
    settings = {
        "attention_mask": mask, "max_new_tokens": 16, "eos_token_id": -1, "custom_generate": drafts, **settings
    }  # fmt: skip
    if door == "model":
        model = Guided(base, formula)
        settings |= {} if prompt is None else prompt.arguments
    else:
        model, processors = base, [GuidedLogitsProcessor(formula, prompt), *processors]
    return model.generate(ids, logits_processor=[*processors], **settings)


TABLE = [
    pytest.param(name, setting, door, marks=[] if setting == "greedy" or (i + number + by) % 2 else pytest.mark.slow)
    for i, name in enumerate(CASES)
    for number, setting in enumerate(SETTINGS)
    if setting == "greedy" or name in IN_ALL_SETTINGS
    for by, door in enumerate(DOORS)
]


@pytest.mark.parametrize(("name", "setting", "door"), TABLE, ids=str)
def test_greedy_text_is_that_of_plain_guidance(name, setting, door):
    make, draft = CASES[name]
    settings = SETTINGS[setting]
    if settings.get("prompts") == 1 and name in OF_THREE_ROWS:
        pytest.skip("it has a preference or a prompt for each of three rows")
    base, formula = make()
    if "own" in name and "prompt" in name:
        own = {"input_ids": PROMPTS[:, 2:], "attention_mask": MASK[:, 2:]}
        settings = {**settings, "prompt": Prompt({"input_ids": PROMPTS, "attention_mask": MASK}, own)}
    plain = decode(door, base, formula, **settings)
    speculative = SpeculativeDecoding(draft, draft_tokens=3)
    assert torch.equal(decode(door, base, formula, drafts=speculative, **settings), plain)
    written = int((plain[:, PROMPTS.shape[1] :] != 0).sum())
    assert speculative.drafted > 0
    assert speculative.rounds < written


@every_door
def test_the_length_of_drafts_changes_no_text(door):
    base, formula = apart(ROWS)
    plain = decode(door, base, formula, max_new_tokens=60)
    assert torch.equal(decode(door, base, formula, drafts=SpeculativeDecoding(), max_new_tokens=60), plain)


@every_door
def test_a_draft_that_is_the_base_model_is_accepted_whole(door):
    base, formula = apart()
    speculative = SpeculativeDecoding(base, draft_tokens=4)
    decode(door, base, formula, drafts=speculative, max_new_tokens=21)
    assert speculative.accepted == speculative.drafted == 3 * 4 * 4
    assert speculative.rounds == 1 + 4


def test_without_a_guide_it_is_speculative_decoding_of_the_base():
    base, speculative = strong(), SpeculativeDecoding(tiny_llama(1), draft_tokens=3)
    settings = {"attention_mask": MASK, "max_new_tokens": 16, "eos_token_id": -1}
    plain = base.generate(PROMPTS, **settings)
    assert torch.equal(base.generate(PROMPTS, custom_generate=speculative, **settings), plain)
    assert 0 < speculative.accepted < speculative.drafted


@every_door
def test_sampled_rows_have_their_own_distributions(door):
    """Two prompts, two preferences, drafts of four: the first two tokens of many samples against float64."""
    samples, repeats = 3000, 24
    base, arm = strong(8), weak(8)
    prompts, preferences, beta = torch.tensor([[2, 5, 3], [0, 6, 4]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 0.7
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    formula = parm(arm, preferences, beta)
    settings = {
        "do_sample": True, "top_k": 0, "max_new_tokens": 3, "num_return_sequences": samples // repeats // 2,
        "eos_token_id": -1,
    }  # fmt: skip
    counts = torch.zeros(2, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    for draft in ("auto", tiny_llama(3, 8)):
        for _ in range(repeats):
            drafts = SpeculativeDecoding(draft, draft_tokens=4)
            model = Guided(base, formula) if door == "model" else base
            processors = [] if door == "model" else [GuidedLogitsProcessor(formula)]
            texts = model.generate(
                prompts, attention_mask=mask, logits_processor=processors, custom_generate=drafts, **settings
            )[:, 3:5].view(2, -1, 2)
            for row in range(2):
                counts[row].index_put_((texts[row, :, 0], texts[row, :, 1]), torch.ones(1).double(), accumulate=True)
    twin = weak(8)
    for row in range(2):
        expected = two_tokens(base, twin, prompts[row][mask[row] == 1][None], preferences[row], beta) * samples
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


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("most_holes", [0, 3, 1000])
def test_a_cache_whose_rows_are_taken_back_at_random_is_that_of_the_texts(most_holes, make, monkeypatch):
    monkeypatch.setattr(growing, "MOST_HOLES", most_holes)
    model, generator = make(0), torch.Generator().manual_seed(most_holes)
    lm = LM(model)
    held, fed = Reader([lm]), fed_tokens(model)
    prompts = [torch.randint(2, 64, (int(n),), generator=generator) for n in (5, 2, 7)]
    written = [torch.empty(0, dtype=torch.long) for _ in prompts]
    ids = torch.stack([torch.cat([torch.zeros(7 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(7 - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    for _ in range(25):
        last = 1 + min(int(torch.randint(0, 3, (1,), generator=generator)), min(map(len, written)))
        texts = Texts(ids, mask)
        lengths = torch.tensor([len(row) for row in written])
        padded = torch.stack([torch.cat([row, row.new_zeros(int(lengths.max()) - len(row))]) for row in written])
        found = held.read(texts.extended(padded, lengths), last)[lm]
        with torch.no_grad():
            for i, row in enumerate(written):
                whole = torch.cat([prompts[i], row])[None]
                torch.testing.assert_close(found[i], model(whole).logits[0, -last:], atol=1e-4, rtol=1e-4)
        for i, row in enumerate(written):
            back = int(torch.randint(0, min(4, len(row) + 1), (1,), generator=generator))
            new = torch.randint(2, 64, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator)
            written[i] = torch.cat([row[: len(row) - back], new])
    own = [fed[0], *(n for n in fed[1:] if n <= 10)]
    assert len(own) >= 25


@every_door
def test_a_drafted_token_that_the_guide_does_not_know_moves_no_answer(door):
    """A token of the prompt is followed by one that only the base model has: so a draft is, too."""
    base, unknown = strong(65), tiny_tokenizer()
    unknown.add_tokens("<image>")
    formula = BASE + LM(tiny_llama(1), vocabulary=Vocabulary(unknown, tiny_tokenizer()))
    prompt = torch.tensor([[token for known in range(2, 64) for token in (64, known)]])
    settings = {"max_new_tokens": 12, "eos_token_id": -1, "attention_mask": torch.ones_like(prompt)}
    if door == "model":
        model, processors = Guided(base, formula), []
    else:
        model, processors = base, [GuidedLogitsProcessor(formula)]
    plain = model.generate(prompt, logits_processor=processors, **settings)
    drafts = SpeculativeDecoding("prompt", draft_tokens=3)
    assert torch.equal(model.generate(prompt, logits_processor=processors, custom_generate=drafts, **settings), plain)
    assert drafts.drafted > 0


@every_door
@pytest.mark.parametrize("draft", ["prompt", "auto"])
def test_a_prompt_of_a_guide_s_own_is_in_its_own_vocabulary(draft, door):
    vocabulary = Vocabulary(tiny_tokenizer(), tiny_tokenizer())
    vocabulary.guide_ids = vocabulary.guide_ids.flip(0)  # as of a tokenizer with its words in another order
    base, formula = strong(), BASE + 2.0 * LM(tiny_llama(1), vocabulary=vocabulary)
    own = {"input_ids": PROMPTS[:, 1:] + 7, "attention_mask": MASK[:, 1:]}
    prompt = Prompt({"input_ids": PROMPTS, "attention_mask": MASK}, own)
    drafts = SpeculativeDecoding(draft, draft_tokens=3)
    plain = decode(door, base, formula, prompt=prompt)
    assert torch.equal(decode(door, base, formula, drafts=drafts, prompt=prompt), plain)


@every_door
def test_a_token_that_a_guide_has_no_embedding_for_is_left_out(door):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("<image>")
    base, formula = strong(65), BASE + LM(tiny_llama(1), vocabulary=Vocabulary(tokenizer, tokenizer))
    ids, drafts = torch.tensor([[5, 64, 9, 64]]), SpeculativeDecoding("prompt", draft_tokens=3)
    assert torch.equal(decode(door, base, formula, drafts=drafts, ids=ids), decode(door, base, formula, ids=ids))
    for how in (None, drafts):
        with pytest.raises(ValueError, match="knows no token of a text"):
            decode(door, base, formula, drafts=how, ids=ids[:, 1::2])


@every_door
def test_sliding_windows_are_for_single_rows(door):
    base, formula = tiny_mistral(0), parm(tiny_arm(tiny_mistral(1)), ROWS[1])
    speculative = SpeculativeDecoding(draft_tokens=3)
    single = decode(door, base, formula, prompts=1, drafts=speculative)
    assert torch.equal(single, decode(door, base, formula, prompts=1))
    with pytest.raises(ValueError, match="sliding-window or linear attention"):
        decode(door, base, formula, drafts=speculative)


@every_door
@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
@pytest.mark.parametrize(
    "name", ["OPT", "Gemma-3", "DeepSeek-V3", "Qwen3-Next", "Qwen3.5", "LFM2", "Bamba", "Falcon-H1", "Mamba"]
)
def test_every_architecture_writes_the_text_of_plain_guidance_or_is_refused(name, on_base, door):
    """Rows of a batch leave holes in a cache, which a window or a recurrent state can't have."""
    if on_base and ARCHITECTURES[name].guide:
        pytest.skip("it can't guide")
    served = {"OPT": [1, 3], "DeepSeek-V3": [1, 3], "Mamba": [], "Bamba": []}.get(name, [1])
    for prompts in (1, 3):
        cell = Cell.make(name, "PBLoRA", "attention", on_base)
        plain = decode(door, cell.base, cell.formula, prompts, max_new_tokens=12)
        drafts, counter = SpeculativeDecoding("prompt" if on_base else "auto", draft_tokens=3), Ends(-2)
        settings = {"max_new_tokens": 12, "stopping_criteria": [counter]}
        if prompts in served:
            assert torch.equal(decode(door, cell.base, cell.formula, prompts, drafts, **settings), plain)
            assert drafts.drafted > 0
            continue
        with pytest.raises(ValueError, match="sliding-window or linear attention|forgets what it has read"):
            decode(door, cell.base, cell.formula, prompts, drafts, **settings)
        assert counter.asked == 0


def test_no_position_beyond_the_last_is_read():
    """GPT-2 has 64 of them; the rows reach the end, or stop, at different times."""
    base, formula = tiny_gpt2(0), parm(tiny_arm(tiny_gpt2(1), target_modules=["c_attn"]), ROWS[1])
    settings = {"max_new_tokens": 64 - PROMPTS.shape[1], "eos_token_id": [3]}
    plain = decode("model", base, formula, **settings)
    drafts = SpeculativeDecoding(draft_tokens=5)
    assert torch.equal(decode("model", base, formula, drafts=drafts, **settings), plain)


@every_door
def test_forwards_are_those_of_drafts_and_one_for_each_round(door):
    """Each drafted token is one forward of the backbone's row and the ARM's; the base reads a round in one."""
    base, arm = strong(), weak()
    rows, rounds = fed_rows(arm), fed_rows(base)
    speculative = SpeculativeDecoding(draft_tokens=3)
    decode(door, base, parm(arm, ROWS[1], beta=0.5), drafts=speculative, prompts=1)
    assert len(rounds) == speculative.rounds
    together = rows.count(2)
    assert len(rows) - together == 1
    whole = together - speculative.drafted
    assert 0 <= whole < speculative.rounds


@every_door
def test_verifying_on_the_base_model_s_weights_is_one_forward(door):
    base, formula = on_the_base()
    rows, speculative = fed_rows(base), SpeculativeDecoding("prompt", draft_tokens=3)
    decode(door, base, formula, drafts=speculative)
    assert rows[0] in (4, 6)
    assert rows[1:] == [6] * (speculative.rounds - 1)


@every_door
def test_the_sharpening_of_a_draft_adapts(door):
    """A base model twice as sharp as the ARM: the ARM's own draft has to be sharpened further."""
    arm, base = tiny_llama(1), tiny_llama(1)
    base.lm_head.weight.data *= 2
    speculative, made = SpeculativeDecoding(draft_tokens=3), []
    make = SpeculativeDecoding._make_draft
    speculative._make_draft = lambda *args: (made.append(make(speculative, *args)), made[0])[1]
    torch.manual_seed(0)
    decode(door, base, parm(arm), drafts=speculative, do_sample=True, max_new_tokens=60)
    assert 1.2 < made[0].scale < 3


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_tokens_are_streamed():
    base, formula = apart()
    streamer = Collected()
    drafts = SpeculativeDecoding(draft_tokens=3, streamer=streamer)
    text = decode("model", base, formula, prompts=1, drafts=drafts)
    assert streamer.tokens == text[0].tolist()
    assert streamer.ended


class Ends(StoppingCriteria):
    def __init__(self, token):
        self.token, self.asked = token, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return input_ids[:, -1] == self.token


@every_door
def test_any_criterion_stops_a_row_inside_a_draft(door):
    base, formula = apart()
    plain = decode(door, base, formula)
    settings = {"stopping_criteria": [Ends(int(plain[0, PROMPTS.shape[1] + 4]))], "pad_token_id": 0}
    stopped = decode(door, base, formula, **settings)
    assert not torch.equal(stopped, plain)
    drafts = SpeculativeDecoding(base, draft_tokens=6)
    assert torch.equal(decode(door, base, formula, drafts=drafts, **settings), stopped)


ALLOWED = [[5, 13, 33], [8, 13, 20], [6, 13, 50]]
"""The tokens that rows may write; prompt lookup finds others too."""
ANSWER = [8, 20, 33, 9, 41, 13]


def set_of_a_row(row, ids):
    """Nothing is allowed after another token."""
    return ALLOWED[row] if set(ids[PROMPTS.shape[1] :].tolist()) <= set(ALLOWED[row]) else []


def one_answer(row, ids):
    """Nothing is allowed after another start, or after its end."""
    new = ids[PROMPTS.shape[1] :].tolist()
    return ANSWER[len(new) :][:1] if new == ANSWER[: len(new)] else []


class OneSet(LogitsProcessor):
    def __call__(self, input_ids, scores):
        allowed = sum(ALLOWED, [])
        assert set(input_ids[:, PROMPTS.shape[1] :].flatten().tolist()) <= set(allowed)
        return torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(allowed), scores[:, allowed])


CONSTRAINTS = {
    "a set for each row": {"prefix_allowed_tokens_fn": set_of_a_row},
    "one answer": {"prefix_allowed_tokens_fn": one_answer, "eos_token_id": ANSWER[-1], "prompts": 1},
    "a processor": {"processors": [OneSet()]},
}


@every_door
@pytest.mark.parametrize("draft", ["auto", "prompt"])
@pytest.mark.parametrize("settings", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_a_constraint_sees_no_text_that_generate_would_not_show_it(settings, draft, door):
    base, formula = apart()
    plain = decode(door, base, formula, **settings)
    drafts = SpeculativeDecoding(draft, draft_tokens=3)
    assert torch.equal(decode(door, base, formula, drafts=drafts, **settings), plain)
    assert drafts.drafted > 0


def test_the_dictionary_has_the_sequences():
    base, formula = apart()
    drafts = SpeculativeDecoding(draft_tokens=2)
    output = decode("model", base, formula, drafts=drafts, return_dict_in_generate=True)
    assert torch.equal(output.sequences, decode("model", base, formula))


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


@every_door
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "use_cache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"guidance_scale": 1.8}, "guidance_scale"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 7])}, "with a state"),
    ],
)
def test_settings_that_it_can_not_follow(settings, message, door):
    base, formula = apart()
    with pytest.raises(ValueError, match=message):
        decode(door, base, formula, drafts=SpeculativeDecoding(), **settings)


@every_door
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_hidden_states", torch.zeros(3, 5, 32), "input `encoder_hidden_states`"),
        ("token_type_ids", MASK, "input `token_type_ids`"),
        ("position_ids", 2 * MASK.cumsum(1), "unless they are those of the mask"),
    ],
)
def test_inputs_that_it_would_leave_out(name, value, message, door):
    with pytest.raises(ValueError, match=message):
        decode(door, tiny_gpt2(0), parm(weak(), ROWS[1]), drafts=SpeculativeDecoding(), **{name: value})


@every_door
def test_positions_may_be_those_of_the_mask(door):
    base, formula = tiny_gpt2(0), parm(weak(), ROWS[1])
    drafts, positions = SpeculativeDecoding(draft_tokens=2), (MASK.cumsum(1) - 1).clamp(min=0)
    plain = decode(door, base, formula, position_ids=positions)
    assert torch.equal(decode(door, base, formula, drafts=drafts, position_ids=positions), plain)


@every_door
def test_a_cache_is_refused_where_its_text_is_left_out(door):
    base, formula = apart()
    first = decode(door, base, formula, prompts=1, return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[9, 11]])], 1)
    drafts, cache = SpeculativeDecoding(draft_tokens=2), cache_argument(base, cache_in(first))
    plain = decode(door, base, formula, ids=text)
    assert torch.equal(decode(door, base, formula, drafts=drafts, ids=text, **cache), plain)
    for mask in ({"attention_mask": torch.ones_like(text)}, {}):
        with pytest.raises(ValueError, match="unless `input_ids` repeat the text that it has read"):
            decode(door, base, formula, drafts=drafts, ids=text[:, -3:], **mask, **cache)


@every_door
def test_formulas_with_several_prompts_of_their_own_are_refused(door):
    base, formula = apart()
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK}
    own, same, other = (
        Prompt(inputs, {"input_ids": PROMPTS[:, cut:], "attention_mask": MASK[:, cut:]}) for cut in (2, 2, 3)
    )
    drafts = SpeculativeDecoding("prompt", draft_tokens=2)
    texts = [
        decode(door, base, formula, drafts=how, prompt=own, processors=[GuidedLogitsProcessor(LM(tiny_gpt2(2)), same)])
        for how in (drafts, None)
    ]
    assert torch.equal(*texts)
    for prompt in (other, None):
        processors = [GuidedLogitsProcessor(LM(tiny_gpt2(2)), prompt)]
        with pytest.raises(ValueError, match="not all of them read the same prompts"):
            decode(door, base, formula, drafts=drafts, prompt=own, processors=processors)


@every_door
def test_a_prompt_of_the_guides_own_for_a_part_of_the_prompt_is_refused(door):
    base, formula = apart()
    own = Prompt(guide={"input_ids": PROMPTS[:, 2:], "attention_mask": MASK[:, 2:]}, length=3)
    settings = {"prompt": own, "prompt_length": 3} if door == "model" else {"prompt": own}
    decode(door, base, formula, **settings)
    with pytest.raises(ValueError, match="own for a part of the prompt"):
        decode(door, base, formula, drafts=SpeculativeDecoding("prompt"), **settings)


def test_a_prompt_of_the_guides_own_in_a_cache_is_refused_in_the_next_turn():
    """There it stands for the first prompt, and not for the answer after it."""
    base, formula = apart()
    inputs = {"input_ids": PROMPTS[1:2], "attention_mask": MASK[1:2]}
    settings = {"prompts": 1, "prompt": Prompt(inputs, {"input_ids": PROMPTS[1:2, 2:]})}
    first = decode("model", base, formula, return_dict_in_generate=True, **settings)
    text, drafts = torch.cat([first.sequences, torch.tensor([[9, 11]])], 1), SpeculativeDecoding(draft_tokens=2)
    cache = cache_argument(base, cache_in(first))
    with pytest.raises(ValueError, match="own for a part of the prompt"):
        decode("model", base, formula, drafts=drafts, ids=text, **cache, **settings)
    decode("model", base, formula, ids=text, **cache, **settings)


@every_door
def test_guides_that_it_can_not_use(door):
    base, formula = on_the_base()
    with pytest.raises(ValueError, match="nothing to draft with"):
        decode(door, base, formula, drafts=SpeculativeDecoding())
    reward = args(lambda prompts, responses: [0.0] * len(responses), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="language models"):
        decode(door, strong(), reward, drafts=SpeculativeDecoding("prompt"))


# transformers' own assisted decoding: the ARM's backbone drafts, tilted by the ARM, whose answers are remembered.


def assisted(base, arm, drafts: bool, prompt, **settings):
    """The processor guides the assistant too, whose adapter has stepped aside."""
    guide = PARMLogitsProcessor(arm, [0.3, 0.7], beta=0.5)
    settings = {"eos_token_id": -1, "max_new_tokens": 24, **settings}
    if drafts:
        settings["assistant_model"] = arm.get_base_model()
    return base.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=[guide], **settings)


def backbone(arm, drafted: int, schedule: str = "constant"):
    config = arm.get_base_model().generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = drafted, schedule
    config.assistant_confidence_threshold = 0.0
    return arm


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("drafted", [1, 3, 6])
def test_the_arms_backbone_assists(drafted, schedule):
    base, arm, prompt = strong(), backbone(weak(), drafted, schedule), PROMPTS[1:2]
    assert torch.equal(assisted(base, arm, True, prompt), assisted(base, arm, False, prompt))


@pytest.mark.slow
def test_sampling_with_the_arms_backbone_is_unbiased():
    """The first two tokens of many samples, drafted and verified, against their exact joint distribution."""
    base, arm, samples, prompt = strong(8), backbone(weak(8), 3), 600, torch.tensor([[2, 5, 3]])
    torch.manual_seed(1)
    counts = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(samples):
        text = assisted(base, arm, True, prompt, do_sample=True, top_k=0, max_new_tokens=3)[0, 3:5]
        counts[text[0], text[1]] += 1
    expected = two_tokens(base, weak(8), prompt, [0.3, 0.7], 0.5) * samples
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert chisquare(observed, wanted * samples / wanted.sum()).pvalue > 1e-3
