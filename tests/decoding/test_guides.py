# SPDX-License-Identifier: Apache-2.0
"""Guides that read another text or another vocabulary than the base model, and bases of other kinds, by both doors."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import before_5_24, character_tokenizer, tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from decoding.tables import DOORS, MASK, PROMPTS, ROWS, game, log_probs, lora_model, tiny_judge
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_pblora import PBLoraConfig, get_preference, set_preference
from peft_pblora.kv_cache import cache_argument, cache_in
from peft_pblora.switch import AdapterSwitch
from trl_parm import (
    ARGS,
    BASE,
    LM,
    PARM,
    Guided,
    GuidedLogitsProcessor,
    PARMLogitsProcessor,
    PreferenceText,
    Prompt,
    SequenceReward,
    SpeculativeDecoding,
    Vocabulary,
)
from trl_parm.decoding import args, cage, genarm, mod, mod_w2s, parm, transfer_q


every_door = pytest.mark.parametrize("door", DOORS)
MODES = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 2, "num_return_sequences": 2},
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def decode(door, base, formula, inputs, prompt=None, pad=None, **settings):
    """What is written by a door, or by a function of ids and scores in the place of a formula."""
    settings = {"max_new_tokens": 8, **settings}
    torch.manual_seed(0)
    if door == "model":
        own = {} if prompt is None else prompt.arguments
        return Guided(base, formula).generate(**inputs, **own, **settings)
    processor = formula if door == "naive" else GuidedLogitsProcessor(formula, prompt, pad)
    return base.generate(**inputs, **settings, logits_processor=[processor])


INPUTS = {"input_ids": PROMPTS, "attention_mask": MASK}


def test_the_peft_model_itself_may_generate():
    arm = tiny_arm(tiny_llama(0))
    expected = Guided(tiny_llama(0), parm(copy.deepcopy(arm), [0.3, 0.7])).generate(**INPUTS, max_new_tokens=8)
    assert torch.equal(Guided(arm, parm(arm, [0.3, 0.7])).generate(**INPUTS, max_new_tokens=8), expected)
    processor = GuidedLogitsProcessor(parm(arm, [0.3, 0.7]))
    assert torch.equal(arm.generate(**INPUTS, max_new_tokens=8, logits_processor=[processor]), expected)


@every_door
def test_an_adapter_of_the_base_model_stays_on(door):
    """A base model that is itself an adapted one: only the adapter that guides is switched off in its forward."""
    model = lora_model("tuned", "arm")
    tuned, arm = copy.deepcopy(model), copy.deepcopy(model)
    tuned.set_adapter("tuned")
    arm.set_adapter("arm")
    expected = decode("processor", tuned.merge_and_unload(), parm(arm), INPUTS)
    for active in (["tuned"], ["tuned", "arm"]):
        model.base_model.set_adapter(active)
        formula = parm(model, adapter_name="arm")
        assert torch.equal(decode(door, model.get_base_model(), formula, INPUTS), expected)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[8, 20]),
    ],
    ids=["a tuned prompt", "an activated LoRA"],
)
def test_what_acts_in_calls_of_its_peft_model_alone_is_refused_below_guidance(config):
    model = get_peft_model(tiny_llama(0), config).eval()
    with pytest.raises(ValueError, match="base model has the adapter 'default', which is tuned by prompt learning or"):
        Guided(model, BASE + LM(tiny_llama(1)))
    if not config.is_prompt_learning:
        model.base_model.set_adapter([])
        assert decode("model", model, BASE + LM(tiny_llama(1)), INPUTS).shape == (3, 13)


@every_door
@pytest.mark.parametrize("active", ["helpful", "harmless"])
def test_a_guide_of_weight_zero_stays_out_of_the_base_model(active, door):
    """At a vertex of the simplex the other adapter is not asked, but the base model still runs without it."""
    for formula in (
        lambda model: BASE + 0.0 * LM(model) + 0.0 * LM(model, adapter_name="harmless"),
        lambda model: BASE + LM(model, adapter_name="helpful") + 0.0 * LM(model, adapter_name="harmless"),
    ):
        model = lora_model("helpful", "harmless")
        model.set_adapter(active)
        expected = decode("processor", tiny_llama(0), formula(copy.deepcopy(model)), INPUTS)
        assert torch.equal(decode(door, model.get_base_model(), formula(model), INPUTS), expected)


@every_door
def test_the_untrained_model_below_adapters_is_a_reference(door):
    model = lora_model("helpful")
    helpful = copy.deepcopy(model)
    expected = decode("processor", tiny_llama(0), mod_w2s({"helpful": helpful}, tiny_llama(0), [1.0]), INPUTS)
    off = LM(model, disable_adapter=True)
    formula = mod_w2s({"helpful": "helpful"}, off, [1.0], adapters_of=model)
    assert torch.equal(decode(door, model.get_base_model(), formula, INPUTS), expected)
    control = decode("processor", tiny_llama(0), BASE + LM(tiny_llama(0)), INPUTS)
    assert torch.equal(decode(door, model.get_base_model(), BASE + off, INPUTS), control)


@every_door
@pytest.mark.parametrize("names", [("helpful",), ("helpful", "harmless")], ids=["one", "two"])
def test_the_model_that_policies_lie_on_is_a_reference_without_them(names, door):
    """Although it is the object into whose layers they were put."""
    policies = lora_model(*names)
    small, apart = policies.get_base_model(), copy.deepcopy(policies)
    given = dict(zip(names, names)), [1 / len(names)] * len(names)
    expected = decode("processor", tiny_llama(3), mod_w2s(given[0], tiny_llama(0), given[1], apart), INPUTS)
    formula = mod_w2s(given[0], small, given[1], policies)
    assert torch.equal(decode(door, tiny_llama(3), formula, INPUTS), expected)


def test_a_model_with_adapters_of_others_in_it_is_named_with_them_or_without():
    """By itself it acts with them before a processor was made, and without them afterwards."""
    base = tiny_llama(0)
    before = LM(base)
    arm = tiny_arm(base)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"into which the adapters \['default'\] were put, so that it may be"):
            LM(base)
        assert LM(base, adapter_name="default") == LM(arm)
        assert LM(base, disable_adapter=True) == LM(arm, disable_adapter=True)
        assert copy.deepcopy(before).adapters == before.adapters == ()
        PARMLogitsProcessor(arm, [0.3, 0.7])


@every_door
def test_objectives_of_another_order_are_not_taken_for_those_that_were_named(door):
    """A second active adapter, and one that was put under the name of the first."""
    arm = tiny_arm(tiny_llama(0))
    formula = parm(arm, {"helpful": 0.9, "harmless": 0.1})
    config = {**arm.peft_config["default"].to_dict(), "peft_type": None, "objectives": ["harmless", "helpful"]}
    arm.add_adapter("other", PBLoraConfig(**config))
    arm.base_model.set_adapter(["default", "other"])
    both = parm(arm, {"helpful": 0.9, "harmless": 0.1})
    with pytest.raises(ValueError, match=r"adapter 'other' has the objectives \['harmless', 'helpful'\]. Name the"):
        decode(door, tiny_llama(3), both, INPUTS)
    arm.base_model.set_adapter(["other"])
    arm.delete_adapter("default")
    arm.add_adapter("default", PBLoraConfig(**config))
    with pytest.raises(ValueError, match=r"adapter 'default' has the objectives \['harmless', 'helpful'\]"):
        decode(door, tiny_llama(3), formula, INPUTS)


@every_door
def test_adapters_of_two_methods_with_one_name_are_told_apart_or_refused(door):
    def tuned(name):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(tiny_llama(0), config, adapter_name=name).eval()

    model = tuned("default")
    arm = tiny_arm(model.get_base_model())
    with pytest.raises(ValueError, match="an adapter 'default' of each of 2 methods, of which one may be the guide"):
        decode(door, model.get_base_model(), parm(arm, [0.3, 0.7]), INPUTS)
    tokens = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    decode(door, tiny_llama(3), BASE + LM(get_peft_model(tiny_llama(0), tokens).eval()), INPUTS)  # one of two layers
    named = tuned("tuned")
    expected = decode("processor", tuned("tuned"), parm(tiny_arm(tiny_llama(0)), [0.3, 0.7]), INPUTS)
    formula = parm(tiny_arm(named.get_base_model()), [0.3, 0.7])
    assert torch.equal(decode(door, named.get_base_model(), formula, INPUTS), expected)


def test_equal_guides_merge():
    arm, small = tiny_arm(), tiny_llama(2)
    formula = BASE + LM(small) + LM(arm, [0.3, 0.7]) + LM(small) + LM(arm, [0.3, 0.7]) - LM(arm, [0.7, 0.3])
    assert [(w, type(s).__name__) for w, s in formula.terms()] == [
        (1.0, "_Base"), (2.0, "LM"), (2.0, "LM"), (-1.0, "LM"),
    ]  # fmt: skip
    assert LM(arm, [0.3, 0.7]) != LM(arm)
    assert LM(small) != LM(tiny_llama(2))


def test_a_term_says_what_was_given_and_nothing_that_changes_afterwards():
    """Its preference is its own copy, and adapters that are made active later are no part of it."""
    model, α = tiny_arm(), torch.tensor([0.3, 0.7])
    term = LM(model, α)
    α[:] = torch.tensor([1.0, 0.0])
    model.add_adapter("other", PBLoraConfig(objectives=["a"], target_modules=["q_proj"]))
    model.set_adapter("other")
    assert term.preference.tolist() == pytest.approx([0.3, 0.7])
    assert term.adapter_names == ("default",)
    with pytest.raises(AttributeError):
        term.adapter_name = "other"


# Vocabularies and prompts that differ.


def extended_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(extra))
    return tokenizer


@every_door
@pytest.mark.parametrize(("base_size", "guide_size"), [(65, 64), (64, 66), (72, 65), (65, 80)])
@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_vocabularies_of_other_sizes(base_size, guide_size, mode, door):
    """One model knows a token more, or has padded embeddings: aligned by token, unknown ones without probability."""
    base_tokenizer = extended_tokenizer("<image>") if base_size >= 65 else tiny_tokenizer()
    guide_tokenizer = extended_tokenizer("<pad_arm>") if guide_size >= 65 else tiny_tokenizer()
    base, arm = tiny_llama(0, vocab_size=base_size), tiny_arm(tiny_llama(1, vocab_size=guide_size))
    twin = copy.deepcopy(arm)

    def naive(ids, scores):
        mask = torch.ones_like(ids)
        mask[:, :5] = MASK.repeat_interleave(len(ids) // 3, 0)
        known = torch.full((len(ids), base_size), -torch.inf, dtype=torch.float64)
        known[:, :64] = log_probs(twin, ids, [0.3, 0.7], mask)[:, :64]
        return torch.log_softmax(torch.log_softmax(scores.double(), -1) + known, -1).float()

    formula = parm(arm, [0.3, 0.7], vocabulary=Vocabulary(base_tokenizer, guide_tokenizer))
    text = decode(door, base, formula, INPUTS, **mode)
    assert torch.equal(text, decode("naive", base, naive, INPUTS, **mode))
    assert (text < 64).all()


@every_door
def test_without_the_base_model_texts_are_of_its_vocabulary_too(door):
    """The guide knows its end token, at another id."""
    base, guide = tiny_llama(0, vocab_size=66), tiny_llama(1, vocab_size=65)
    vocabulary = Vocabulary(extended_tokenizer("<image>", "<end>"), extended_tokenizer("<end>"))
    scores = base(INPUTS["input_ids"][1:2]).logits
    formula = LM(guide, vocabulary=vocabulary)
    if door == "model":
        found = Guided(base, formula)(INPUTS["input_ids"][1:2]).logits[:, -1]
    else:
        found = GuidedLogitsProcessor(formula)(INPUTS["input_ids"][1:2], scores[:, -1])
    expected = log_probs(guide, INPUTS["input_ids"][1:2])
    assert found.shape == (1, 66)
    assert found[0, 64] == -torch.inf
    torch.testing.assert_close(found[0, [*range(64), 65]], expected[0].float(), atol=1e-4, rtol=1e-4)


@every_door
@pytest.mark.parametrize("method", ["MOD-w2s", "GenARM, off the simplex", "GenARM, off the simplex, a row"])
def test_unknown_tokens_are_excluded_at_negative_weights_too(method, door):
    base, models = tiny_llama(0, vocab_size=66), [tiny_llama(seed) for seed in (1, 2, 3)]
    vocabulary = Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer())
    policies = dict(zip("ab", models))
    weights = [[1.4, -0.4], [-0.2, 1.2], [0.5, 0.5]]
    if method == "MOD-w2s":
        formula = mod_w2s(policies, models[2], [0.3, 0.7], vocabulary=vocabulary)
        weights = [[0.3, 0.7, -1.0]] * 3
    else:
        given = weights if method.endswith("a row") else weights[0]
        weights = weights if method.endswith("a row") else [weights[0]] * 3
        formula = genarm(policies, given, vocabulary=vocabulary, allow_off_simplex=True)

    def naive(ids, scores):
        mask = torch.ones_like(ids)
        mask[:, :5] = MASK.repeat_interleave(len(ids) // 3, 0)
        known = torch.full((len(ids), 66), -torch.inf, dtype=torch.float64)
        own = torch.tensor(weights).double().repeat_interleave(len(ids) // 3, 0)
        known[:, :64] = sum(w[:, None] * log_probs(m, ids, mask=mask) for w, m in zip(own.T, models))
        return torch.log_softmax(torch.log_softmax(scores.double(), -1) + known, -1).float()

    text = decode(door, base, formula, INPUTS)
    assert torch.equal(text, decode("naive", base, naive, INPUTS))
    assert (text < 64).all()


@every_door
@pytest.mark.parametrize("α", [[0.3, 0.7], ROWS], ids=["one", "a row"])
def test_unknown_tokens_are_no_candidates_of_a_game(α, door):
    """As if the base model did not have them: they are no least reward either."""
    base, arm, α = tiny_llama(0, vocab_size=66), tiny_arm(), torch.as_tensor(α)
    with torch.no_grad():  # which makes them likely
        base.lm_head.weight[64:] = base.model(PROMPTS, attention_mask=MASK).last_hidden_state[1:, -1] / 3
    vocabulary, settings = Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer()), {"tau": 0.4, "k": 6}
    formula, twin = cage(arm, α, rounds=3, vocabulary=vocabulary, **settings), copy.deepcopy(arm)

    def naive(ids, scores):
        mask = torch.ones_like(ids)
        mask[:, :5] = MASK

        def log_pi(model, preference=None, off=False):
            with model.disable_adapter() if off else contextlib.nullcontext():
                return log_probs(model, ids, preference, mask)

        known = torch.full((len(ids), 66), -torch.inf, dtype=torch.float64)
        found = game(α, 0.4, 6, 3)(SimpleNamespace(arm=twin), torch.log_softmax(scores.double(), -1)[:, :64], log_pi)
        known[:, :64] = found
        return torch.log_softmax(known, -1).float()

    text = decode(door, base, formula, INPUTS)
    assert torch.equal(text, decode("naive", base, naive, INPUTS))
    assert (text < 64).all()


UNKNOWN = 64
"""A token of the base model that the guide does not know."""


def without_unknown(ids):
    """log π of the guide after each row, from which tokens that it does not know are left out, `(rows, 64)`."""
    texts = [row[(row != 0).cumsum(0) > 0] for row in ids]
    return torch.cat([log_probs(tiny_gpt2(1), text[text != UNKNOWN][None]) for text in texts])


def with_unknown(base):
    def naive(ids, scores):
        known = torch.full(scores.shape, -torch.inf, dtype=torch.float64)
        known[:, :UNKNOWN] = without_unknown(ids)
        return torch.log_softmax(torch.log_softmax(scores.double(), -1) + known, -1).float()

    return naive


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({}, id="greedy", marks=pytest.mark.slow), pytest.param({"num_beams": 2}, id="beams"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt lookup"),
        pytest.param({"use_cache": False}, id="no cache", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "ids",
    [[[7, 9, 64]], [[7, 64, 64]], [[7, 64, 9, 8, 9, 64]], [[0, 7, 9, 64], [5, 64, 33, 9]], [[7, 8, 64, 7, 8]]],
    ids=str,
)
@every_door
def test_a_prompt_may_have_and_end_with_tokens_that_the_guide_does_not_know(door, ids, mode):
    base = tiny_llama(0, vocab_size=65)
    formula = BASE + LM(tiny_gpt2(1), vocabulary=Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer()))
    ids = torch.tensor(ids)
    if len(ids) > 1 and "prompt_lookup_num_tokens" in mode:
        pytest.skip("generate drafts for one prompt at a time")
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    expected = decode("naive", base, with_unknown(base), inputs, **mode)
    assert torch.equal(decode(door, base, formula, inputs, **mode), expected)


def test_positions_of_tokens_that_the_guide_does_not_know():
    """A forward of whole texts answers at every position, padding aside."""
    base = tiny_llama(0, vocab_size=65)
    formula = BASE + LM(tiny_gpt2(1), vocabulary=Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer()))
    ids = torch.tensor([[0, 7, 64, 9, 64], [5, 64, 33, 8, 9]])
    mask = (ids != 0).long()
    found = Guided(base, formula)(input_ids=ids, attention_mask=mask).logits
    for row, text in enumerate(ids):
        for end in range(1 + int(text[0] == 0), 5):
            own = text[: end + 1][text[: end + 1] != 0][None]
            scores = log_probs(base, own)
            expected = with_unknown(base)(own, scores)
            torch.testing.assert_close(found[row, end], expected[0], atol=1e-4, rtol=1e-4)


@every_door
def test_a_guide_that_knows_no_token_of_a_prompt_is_refused(door):
    base = tiny_llama(0, vocab_size=65)
    formula = BASE + LM(tiny_gpt2(1), vocabulary=Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer()))
    with pytest.raises(ValueError, match="A guide knows no token of a text"):
        decode(door, base, formula, {"input_ids": torch.tensor([[64, 64]])})


@every_door
def test_another_vocabulary_is_refused_before_the_first_token(door):
    with pytest.raises(ValueError, match="vocabulary of 80, but the base model one of 64"):
        decode(door, tiny_llama(0), parm(tiny_arm(tiny_llama(1, vocab_size=80)), [0.5, 0.5]), INPUTS)


@every_door
@pytest.mark.parametrize("given", [False, True], ids=["none", "of the tokenizers"])
def test_a_token_without_embedding_is_refused_or_left_out(given, door):
    """One that the guide's tokenizer knows, but not its model; on a GPU, to read it would end the process."""
    base, tokenizer = tiny_llama(0, vocab_size=65), extended_tokenizer("<image>")
    vocabulary = Vocabulary(tokenizer, tokenizer) if given else None
    formula = BASE + LM(tiny_arm(tiny_llama(1)), [0.5, 0.5], vocabulary=vocabulary)
    with_image = {"input_ids": torch.tensor([[7, 64, 9]])}
    if vocabulary is None:
        with pytest.raises(ValueError, match="vocabulary of 64, but is to read the token 64"):
            decode(door, base, formula, with_image)
        return
    found = decode(door, base, formula, with_image, max_new_tokens=1)
    read = base(torch.tensor([[7, 64, 9]])).logits[0, -1].log_softmax(-1)[:64]
    guide = tiny_arm(tiny_llama(1))
    set_preference(guide, [0.5, 0.5])
    expected = read + guide(torch.tensor([[7, 9]])).logits[0, -1].log_softmax(-1)
    assert int(found[0, -1]) == int(expected.argmax())


def test_tokens_at_other_ids_are_found():
    """The same added tokens in another order: a blind cut would take one for the other."""
    vocabulary = Vocabulary(extended_tokenizer("<a>", "<b>"), extended_tokenizer("<b>", "<c>", "<a>"))
    ids, known = vocabulary.to_guide(torch.tensor([[7, 64, 65]]))
    assert ids.tolist() == [[7, 66, 64]]
    assert known.all()
    log_probs = torch.arange(67.0)[None]
    assert vocabulary.to_base(log_probs, 68)[0, 62:].tolist() == [62, 63, 66, 64, -torch.inf, -torch.inf]


def test_an_added_token_of_another_name_is_the_one_at_its_id():
    """Families rename reserved ones, an end token among them."""
    ours, theirs = extended_tokenizer("<reserved 0>", "<pad it>"), extended_tokenizer("<call>", "<reserved 1>")
    ours.eos_token = "<pad it>"
    vocabulary = Vocabulary(ours, theirs)
    assert vocabulary.to_guide(torch.tensor([[7, 64, 65]]))[0].tolist() == [[7, 64, 65]]
    assert vocabulary.to_base(torch.arange(66.0)[None], 66)[0].tolist() == list(range(66))
    moved = Vocabulary(extended_tokenizer("<a>", "<b>"), extended_tokenizer("<c>", "<a>"))
    assert moved.to_base(torch.arange(66.0)[None], 66)[0, 64:].tolist() == [65, -torch.inf]  # "<c>" is not "<a>"


@every_door
def test_a_token_that_the_guide_does_not_know_is_not_read(door):
    base, guide = tiny_llama(0, vocab_size=65), tiny_gpt2(1)
    formula = BASE + LM(guide, vocabulary=Vocabulary(extended_tokenizer("<image>"), tiny_tokenizer()))
    ids = torch.tensor([[7, 64, 9]])
    settings = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    found = decode(door, base, formula, {"input_ids": ids}, **settings).scores[0]
    expected = log_probs(base, ids)[:, :64] + log_probs(guide, torch.tensor([[7, 9]]))
    torch.testing.assert_close(found[:, :64].double(), torch.log_softmax(expected, -1), atol=1e-4, rtol=1e-4)


def test_tokenizers_that_do_not_fit():
    other = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tiny_tokenizer().backend_tokenizer))
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)({"x": 0, "<unk>": 1}, unk_token="<unk>")
    with pytest.raises(ValueError, match="of different families: .* known to one of them only, such as"):
        Vocabulary(tiny_tokenizer(), other)
    split = tiny_tokenizer()
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    with pytest.raises(ValueError, match="cut text differently"):
        Vocabulary(tiny_tokenizer(), split)
    ends = tiny_tokenizer()
    ends.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ValueError, match="does not know the base model's end token '<end>'"):
        Vocabulary(ends, tiny_tokenizer())


OWN = {"input_ids": torch.tensor([[0, 11, 12], [13, 14, 15], [0, 0, 16]])}
OWN["attention_mask"] = (OWN["input_ids"] != 0).long()


def of_own_prompt(guide, columns: int):
    """base · guide in float64, where the guide reads its own prompt in the place of so many columns."""

    def naive(ids, scores):
        repeats = len(ids) // 3
        read = torch.cat([OWN["input_ids"].repeat_interleave(repeats, 0), ids[:, columns:]], 1)
        mask = torch.ones_like(read)
        mask[:, :3] = OWN["attention_mask"].repeat_interleave(repeats, 0)
        guided = torch.log_softmax(scores.double(), -1) + log_probs(guide, read, mask=mask)
        return torch.log_softmax(guided, -1).float()

    return naive


@every_door
@every_mode
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_prompt_of_the_guide_s_own(make, mode, door):
    base, guide = tiny_llama(0), make(1)
    text = decode(door, base, BASE + LM(guide), INPUTS, Prompt(INPUTS, guide=OWN), **mode)
    assert torch.equal(text, decode("naive", base, of_own_prompt(guide, 5), INPUTS, **mode))


@every_door
def test_a_prompt_of_its_own_for_an_adapter_on_the_base(door):
    arm = tiny_arm(tiny_llama(0))
    twin = copy.deepcopy(arm)
    set_preference(twin, [0.3, 0.7])
    expected = decode("naive", tiny_llama(0), of_own_prompt(twin, 5), INPUTS)
    formula = parm(arm, [0.3, 0.7])
    text = decode(door, arm.get_base_model(), formula, INPUTS, Prompt(INPUTS, guide=OWN))
    assert torch.equal(text, expected)


def with_own_prompts(on_base: bool):
    """A guided model, and the text, mask and cache of its first turn."""
    arm = tiny_arm(tiny_llama(0))
    guided = Guided(arm.get_base_model() if on_base else tiny_llama(3), parm(arm, [0.3, 0.7]))
    settings = {"max_new_tokens": 4, "eos_token_id": -1, "return_dict_in_generate": True}
    first = guided.generate(**INPUTS, **Prompt(INPUTS, guide=OWN).arguments, **settings)
    ids = torch.cat([first.sequences, torch.full((3, 3), 9)], 1)
    return guided, ids, torch.cat([MASK, torch.ones(3, 7, dtype=torch.long)], 1), cache_in(first)


@pytest.mark.parametrize(
    "mode", ["whole text", "new tokens", "chunks", "copy", "rows", "taken back", "taken back with the prompt"]
)
@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
def test_a_text_goes_on_after_a_prompt_of_the_guide_s_own(on_base, mode):
    if mode == "chunks" and before_5_24:
        pytest.skip("transformers reads a text in chunks from its start, whatever the cache holds")
    guided, ids, mask, cache = with_own_prompts(on_base)
    twin = tiny_arm(tiny_llama(0))
    set_preference(twin, [0.3, 0.7])
    settings = {"max_new_tokens": 4, "eos_token_id": -1}
    base = tiny_llama(0 if on_base else 3)
    expected = decode("naive", base, of_own_prompt(twin, 5), {"input_ids": ids, "attention_mask": mask}, **settings)
    own, given, order = Prompt(INPUTS, guide=OWN).arguments, ids, torch.arange(3)
    if mode == "new tokens":
        given = ids[:, cache.get_seq_length() :]
    elif mode == "chunks":
        settings["prefill_chunk_size"] = 2
    elif mode == "copy":
        guided.generate(ids, attention_mask=mask, **cache_argument(base, copy.deepcopy(cache)), **own, **settings)
    elif mode == "rows":
        order = torch.tensor([2, 0, 1])
        cache.batch_select_indices(order)
        given, mask, own = given[order], mask[order], {name: x[order] for name, x in own.items()}
    elif mode.startswith("taken back"):
        cache.crop(-6 if "prompt" in mode else -2)
    found = guided.generate(given, attention_mask=mask, **cache_argument(base, cache), **own, **settings)
    assert torch.equal(found[:, given.shape[1] :], expected[order, ids.shape[1] :])


@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
def test_a_prompt_of_the_guide_s_own_is_given_at_every_call(on_base):
    """By hand too; another one, or none, or one where there was none, is told."""
    guided, ids, mask, cache = with_own_prompts(on_base)
    own, base = Prompt(INPUTS, guide=OWN).arguments, guided.backbone
    others = {**own, "guide_input_ids": own["guide_input_ids"] + 1}
    plain = guided.generate(**INPUTS, max_new_tokens=2, eos_token_id=-1, return_dict_in_generate=True)
    for given, made in (({}, cache), (others, cache), (own, cache_in(plain))):
        with pytest.raises(ValueError, match="was made with other `guide_input_ids` and"):
            guided.generate(ids, attention_mask=mask, **cache_argument(base, made), **given, max_new_tokens=2)
    cache.reset()
    for columns in (slice(5), slice(5, 7), slice(7, 8)):
        output = guided(
            ids[:, columns], mask[:, : columns.stop], **cache_argument(base, cache), logits_to_keep=1, **own
        )
    twin = tiny_arm(tiny_llama(0))
    set_preference(twin, [0.3, 0.7])
    scores = log_probs(tiny_llama(0 if on_base else 3), ids[:, :8], mask=mask[:, :8])
    torch.testing.assert_close(output.logits[:, -1], of_own_prompt(twin, 5)(ids[:, :8], scores), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="was made with other `guide_input_ids` and"):
        guided(ids[:, 8:9], mask[:, :9], **cache_argument(base, cache))


@every_door
def test_prompts_of_their_own_are_read_again_in_a_second_call(door):
    """Of the same batch, by the same processor."""
    base, guide, prompt = tiny_llama(0), tiny_llama(1).requires_grad_(False), Prompt(INPUTS, guide=OWN)
    expected = decode("naive", base, of_own_prompt(guide, 5), INPUTS)
    if door == "model":
        guided, settings = Guided(base, BASE + LM(guide)), prompt.arguments
    else:
        guided, settings = base, {"logits_processor": [GuidedLogitsProcessor(BASE + LM(guide), prompt)]}
    for _ in range(2):
        assert torch.equal(guided.generate(**INPUTS, max_new_tokens=8, **settings), expected)


@pytest.mark.parametrize(
    "given",
    [
        {"guide_input_ids": OWN["input_ids"][:, :0]},
        {"guide_input_ids": OWN["input_ids"].flip(1), "guide_attention_mask": OWN["attention_mask"].flip(1)},
        {"guide_input_ids": OWN["input_ids"], "guide_attention_mask": OWN["attention_mask"][:, :2]},
    ],
    ids=["empty", "padded on the right", "another mask"],
)
def test_prompts_that_a_guide_can_not_read(given):
    with pytest.raises(ValueError, match="not empty and padded on the left, and an attention mask of the same shape"):
        Guided(tiny_llama(0), BASE + LM(tiny_llama(1))).generate(**INPUTS, **given, max_new_tokens=2)


@every_door
def test_a_prompt_of_the_guide_s_own_may_stand_for_a_part_of_the_text(door):
    """As of a prompt with an answer that was begun: by both doors, and with a mask of the whole text."""
    base, guide = tiny_llama(0), tiny_llama(1)
    expected = decode("naive", base, of_own_prompt(guide, 3), INPUTS)
    for inputs in (None, INPUTS, {"attention_mask": MASK}):
        text = decode(door, base, BASE + LM(guide), INPUTS, Prompt(inputs, guide=OWN, length=3))
        assert torch.equal(text, expected)
    whole = decode("naive", base, of_own_prompt(guide, 5), INPUTS)
    assert not torch.equal(expected, whole)
    assert torch.equal(decode(door, base, BASE + LM(guide), INPUTS, Prompt(guide=OWN, length=5)), whole)


@every_door
@pytest.mark.parametrize("names", [{}, {"eos_token_id": 0}, {"pad_token_id": None}], ids=["told", "end", "none"])
def test_padding_of_prompts_of_the_guide_s_own_is_told_without_a_mask(names, door):
    """By the guide's pad token, as `generate` does for the base model; or the mask is asked for."""
    base, guide = tiny_llama(0), tiny_llama(1, **names)
    prompt = Prompt(INPUTS, guide={"input_ids": OWN["input_ids"]})
    if names:
        message = "begins with an end token" if "eos_token_id" in names else "No pad token is known"
        with pytest.raises(ValueError, match=message + ".* Give the attention mask of `guide"):
            decode(door, base, BASE + LM(guide), INPUTS, prompt)
        prompt = Prompt(INPUTS, guide=OWN)
    expected = decode("naive", base, of_own_prompt(tiny_llama(1), 5), INPUTS)
    assert torch.equal(decode(door, base, BASE + LM(guide), INPUTS, prompt), expected)
    if not names:
        drafts = SpeculativeDecoding("prompt", draft_tokens=2)
        found = decode(door, base, BASE + LM(guide), INPUTS, prompt, custom_generate=drafts)
        assert torch.equal(found, expected)


def test_padding_of_prompts_that_a_preference_is_written_into_is_told_without_a_mask():
    text, characters = PreferenceText(["helpful", "harmless"]), character_tokenizer()
    batch = characters(["abc", "hello"], return_tensors="pt", padding=True, padding_side="left")
    found, expected = (
        Prompt.with_preference(inputs, [0.7, 0.3], text, characters).arguments
        for inputs in ({"input_ids": batch["input_ids"]}, batch)
    )
    assert all(map(torch.equal, found.values(), expected.values()))
    characters.pad_token = characters.eos_token
    batch = characters(["abc", "hello"], return_tensors="pt", padding=True, padding_side="left")
    with pytest.raises(ValueError, match="begins with an end token.* Give the attention mask of the prompts"):
        Prompt.with_preference({"input_ids": batch["input_ids"]}, [0.7, 0.3], text, characters)
    assert Prompt.with_preference(batch, [0.7, 0.3], text, characters).arguments["guide_attention_mask"][0, 0] == 0


@every_door
@every_mode
def test_embeddings_as_the_base_model_s_prompt(mode, door):
    """`generate` hands over no prompt tokens; the guide's own prompt stands in their place."""
    base, guide = tiny_llama(0), tiny_llama(1)
    inputs = {"inputs_embeds": base.get_input_embeddings()(PROMPTS).detach(), "attention_mask": MASK}
    text = decode(door, base, BASE + LM(guide), inputs, Prompt(inputs, guide=INPUTS), **mode)
    assert torch.equal(text, decode(door, base, BASE + LM(guide), INPUTS, **mode)[:, 5:])
    with pytest.raises(ValueError, match="can't see the prompt|which LM.* can't see"):
        decode(door, base, BASE + LM(guide), inputs)


def test_an_adapter_on_the_base_sees_embeddings_too():
    arm = tiny_arm(tiny_llama(0))
    inputs = {"inputs_embeds": arm.get_input_embeddings()(PROMPTS).detach(), "attention_mask": MASK}
    formula = parm(arm, [0.3, 0.7])
    text = decode("model", arm.get_base_model(), formula, inputs)
    assert torch.equal(text, decode("model", arm.get_base_model(), formula, INPUTS)[:, 5:])


def tiny_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.2, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@every_door
@every_mode
def test_an_encoder_decoder_base_model(mode, door):
    """Its decoder's tokens are no prompt, so the guide gets a prompt of its own."""
    base, guide = tiny_bart(), tiny_llama(1)
    text = decode(door, base, BASE + LM(guide), INPUTS, Prompt(guide=OWN, length=1), **mode)
    assert torch.equal(text, decode("naive", base, of_own_prompt(guide, 1), INPUTS, **mode))


def test_a_guide_without_a_prompt_of_its_own_is_blind_beside_an_encoder():
    with pytest.raises(ValueError, match="is given an encoder's input, which LM.* can't see"):
        decode("model", tiny_bart(), BASE + LM(tiny_llama(1)), INPUTS)


def letters(prompts, responses):
    return [float(len(prompt) - len(response)) for prompt, response in zip(prompts, responses)]


REWARDS = {
    "of texts": lambda prompts: args(letters, tokenizer=tiny_tokenizer(), prompts=prompts),
    "of ids": lambda prompts: args(SequenceReward(lambda ids, mask: (ids * mask).sum(1).float())),
    "a classifier": lambda prompts: args(tiny_judge()),
    "a policy": lambda prompts: transfer_q(letters, tiny_llama(1), tokenizer=tiny_tokenizer(), prompts=prompts),
}


@every_door
@pytest.mark.parametrize("given", ["an encoder's input", "embeddings"])
@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_that_sees_no_prompt_is_refused(reward, given, door):
    """A prompt of the guides' own is none of a reward. One of texts may have the prompts. A processor knows nothing of
    an encoder, but that its decoder has no text yet."""
    base, inputs = tiny_llama(0), {"inputs_embeds": tiny_llama(0).get_input_embeddings()(PROMPTS).detach(), **INPUTS}
    del inputs["input_ids"]
    own = Prompt(inputs, guide=OWN)
    if given == "an encoder's input":
        base, inputs, own = tiny_bart(), INPUTS, Prompt(guide=OWN, length=1)
    cases = [(REWARDS[reward](None), None), (REWARDS[reward](None) + LM(tiny_llama(2)), own)]
    if reward == "a policy":
        cases.append((REWARDS[reward](["a", "b", "c"]), None))
    if given == "an encoder's input" and door == "processor" and reward != "of texts":
        cases = []
    for formula, prompt in cases:
        with pytest.raises(ValueError, match=r"(Reward.*, which|TopKReward|RolloutReward).*(can't see|no prompt)"):
            decode(door, base, formula, inputs, prompt, pad=0)
    if reward == "of texts":
        seen = []
        formula = args(
            lambda prompts, responses: (seen.append(prompts), letters(prompts, responses))[1],
            tokenizer=tiny_tokenizer(), prompts=["a", "b", "c"], k=2,
        )  # fmt: skip
        decode(door, base, formula, inputs, pad=0, max_new_tokens=1)
        assert seen == [["a", "a", "b", "b", "c", "c"]]


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_beside_prompts_of_the_guides_own_reads_no_padding(reward):
    """A processor that knows nothing of the base model's mask tells its padding by the pad token all the same."""
    formula, texts = REWARDS[reward](None) + LM(tiny_llama(2)), []
    for inputs in (INPUTS, {"input_ids": PROMPTS}):
        processor = GuidedLogitsProcessor(formula, Prompt(inputs, guide=OWN), pad_token_id=0)
        texts.append(tiny_llama(0).generate(**INPUTS, logits_processor=[processor], max_new_tokens=6))
    assert torch.equal(*texts)


@every_door
def test_a_reward_of_texts_reads_responses_whole_after_embeddings(door):
    """The mask of padded embeddings is none of what is written after them."""
    base, embeddings = tiny_llama(0), tiny_llama(0).get_input_embeddings()(PROMPTS).detach()

    def texts_of(inputs):
        seen = []

        def reward(prompts, responses):
            seen.append(list(responses))
            return [-abs(4.0 * len(response) - 30) for response in responses]

        formula = args(reward, k=3, tokenizer=tiny_tokenizer(), prompts=["a", "b", "c"])
        text = decode(door, base, formula, inputs, pad=0)
        return text[:, -8:], seen

    expected, asked = texts_of(INPUTS)
    found, seen = texts_of({"inputs_embeds": embeddings, "attention_mask": MASK})
    assert torch.equal(found, expected)
    assert seen == asked
    assert len(asked[-1][0].split("w")) > 4


def tiny_llava():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(
        **{**sizes, "num_hidden_layers": 2}, vocab_size=64, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=63, vision_feature_layer=-1,
        image_seq_length=4,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


IMAGE = {
    "input_ids": torch.tensor([[5, 63, 63, 63, 63, 7, 8]]), "attention_mask": torch.ones(1, 7, dtype=torch.long),
    "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3,
}  # fmt: skip


@every_door
@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
def test_images_that_a_guide_can_not_see_are_refused(on_base, door):
    """Unless it gets a prompt of its own, or there is no image in the prompt."""
    base = tiny_llava()
    layers = r".*language_model.*(q|v)_proj"
    arm = tiny_arm(base if on_base else tiny_llava(), target_modules=layers)
    formula = parm(arm, [0.3, 0.7])
    with pytest.raises(
        ValueError,
        match="is given (mm_encoder_outputs|pixel_values), which LM|has image tokens, but a processor gets no",
    ):
        decode(door, base, formula, IMAGE)
    twin = tiny_arm(tiny_llava(), target_modules=layers)
    text = {"input_ids": torch.tensor([[5, 7, 8]])}

    def naive(ids, scores):
        read = torch.cat([text["input_ids"], ids[:, 7:]], 1)
        guided = torch.log_softmax(scores.double(), -1) + log_probs(twin, read, [0.3, 0.7])
        return torch.log_softmax(guided, -1).float()

    expected = decode("naive", tiny_llava(), naive, IMAGE)
    assert torch.equal(decode(door, base, formula, IMAGE, Prompt(IMAGE, guide=text)), expected)
    assert decode(door, base, formula, text).shape == (1, 11)


def test_position_ids_that_a_user_gives_reach_the_guides():
    base, guide = tiny_gpt2(0), tiny_gpt2(1)
    positions = torch.tensor([[0, 1, 2, 7, 8], [3, 4, 5, 6, 7], [0, 2, 4, 6, 8]])
    given = {**INPUTS, "position_ids": positions}
    with torch.no_grad():
        found = Guided(base, BASE + LM(guide))(**given, use_cache=False).logits
        own = [torch.log_softmax(m(**given).logits, -1) for m in (base, guide)]
    torch.testing.assert_close(found, torch.log_softmax(own[0] + own[1], -1), atol=1e-4, rtol=1e-4)
    text = Guided(base, BASE + LM(guide)).generate(**given, max_new_tokens=1)
    assert torch.equal(text[:, -1], (own[0] + own[1])[:, -1].argmax(-1))


@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_token_types_that_a_user_gives_reach_the_guides(cache, on_base):
    """Those that have token types."""
    base, guide = tiny_gpt2(0), tiny_gpt2(1)
    if on_base:
        guide = tiny_arm(base, target_modules=["c_attn"])
    given = {**INPUTS, "token_type_ids": torch.where(MASK == 1, 40, 0)}
    formula = BASE + 2.0 * LM(guide)
    found = Guided(base, formula)(**given, use_cache=cache, logits_to_keep=1).logits[:, -1]
    types = {"mask": MASK, "token_type_ids": given["token_type_ids"]}
    own = log_probs(tiny_gpt2(0), PROMPTS, **types), log_probs(guide, PROMPTS, **types)
    torch.testing.assert_close(found, torch.log_softmax(own[0] + 2 * own[1], -1).float(), atol=1e-4, rtol=1e-4)
    formula = BASE + LM(tiny_llama(2))
    found = Guided(tiny_gpt2(0), formula)(**given, use_cache=cache, logits_to_keep=1).logits[:, -1]
    other = log_probs(tiny_llama(2), PROMPTS, mask=MASK)
    torch.testing.assert_close(found, torch.log_softmax(own[0] + other, -1).float(), atol=1e-4, rtol=1e-4)


FOUR = {"input_ids": torch.cat([PROMPTS, PROMPTS[1:2]]), "attention_mask": torch.cat([MASK, MASK[1:2]])}
TWO = {"guide_input_ids": OWN["input_ids"][:2], "guide_attention_mask": OWN["attention_mask"][:2]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PARM(tiny_llama(0), tiny_arm(), [0.3, 0.7]).generate(**FOUR, **TWO, max_new_tokens=1, num_beams=2),
            "given for 2 rows, but the batch has 4",
        ),
        (
            lambda: ARGS(
                tiny_llama(0), lambda p, r: [0.0] * len(r), k=1, tokenizer=tiny_tokenizer(), prompts=["a", "b"]
            ).generate(**FOUR, max_new_tokens=1),
            "given for 2 rows, but the batch has 4",
        ),
        (
            lambda: Prompt({"input_ids": FOUR["input_ids"]}, guide={"input_ids": OWN["input_ids"][:2]}),
            "`inputs` has 4 prompts, but `guide` 2",
        ),
        (
            lambda: PARMLogitsProcessor(tiny_arm(), ROWS[:2], prompt=Prompt(FOUR)),
            "given for 2 rows, but the batch has 4",
        ),
        (
            lambda: PARMLogitsProcessor(tiny_arm(), [0.3, 0.7], prompt=Prompt(FOUR)).set(beta=[1.0, 2.0]),
            "given for 2 rows, but the batch has 4",
        ),
    ],
    ids=["guide_input_ids", "prompts of a reward", "a prompt", "preferences", "strengths"],
)
def test_fewer_rows_than_prompts_are_not_paired_with_them(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_door
def test_an_adapter_loaded_by_transformers_guides_its_own_model(door, tmp_path):
    arm = tiny_arm(tiny_llama(0))
    arm.save_pretrained(tmp_path)
    model = tiny_llama(0)
    model.load_adapter(str(tmp_path), adapter_name="arm")
    expected = decode("processor", tiny_llama(0), parm(arm, ROWS), INPUTS)
    assert torch.equal(decode(door, model, parm(model, ROWS, adapter_name="arm"), INPUTS), expected)
    assert get_preference(model).tolist() == [0.5, 0.5]
    assert not isinstance(model, PeftModel)


def no_adapter_active():
    model, arm = tiny_llama(), lora_model("one")
    state = get_peft_model_state_dict(arm, adapter_name="one")
    model.load_adapter(adapter_state_dict=state, peft_config=arm.peft_config["one"], adapter_name="one")
    for layer in AdapterSwitch.of(model).layers:
        layer._active_adapter = []
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LM(tiny_bart()), "encoder-decoder model. Only causal"),
        (lambda: LM(tiny_llama().model), "must be a causal language model"),
        (lambda: LM(MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))), "no key-value"),
        (lambda: LM(tiny_arm(), adapter_name="other"), r"no adapter 'other'. It has \['default'\]"),
        (lambda: LM(tiny_llama(), disable_adapter=True), "needs a model with an adapter"),
        (lambda: LM(lora_model("one"), [0.5, 0.5]), "has no preference-conditioned adapter"),
        (lambda: LM(tiny_arm().get_base_model()), r"into which the adapters \['default'\] were put"),
        (lambda: LM(no_adapter_active()), "but none is active. Name one with `adapter_name`"),
        (
            lambda: LM(get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))),
            "tuned by prompt learning",
        ),
    ],
)
def test_bad_guides(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda models, α: cage(models[0], α, k=6),
        lambda models, α: mod({"a": models[1], "b": models[2]}, α, "forward_kl"),
        lambda models, α: genarm({"a": models[1], "b": models[2]}, α),
        lambda models, α: parm(models[0], α),
    ],
    ids=["CAGE", "MOD by a power mean", "GenARM", "PARM"],
)
def test_a_preference_that_is_changed_after_its_formula_was_made_changes_nothing(make):
    base, α = tiny_llama(0), ROWS.clone()
    guided = Guided(base, make([tiny_arm(), tiny_llama(2), tiny_llama(3)], α))
    former = guided(**INPUTS, use_cache=False, logits_to_keep=1).logits
    α.copy_(ROWS.flip(0))
    assert torch.equal(guided(**INPUTS, use_cache=False, logits_to_keep=1).logits, former)


def test_the_reference_of_a_game_has_no_adapter_of_the_name():
    arm, reference = tiny_arm(), tiny_llama(1)
    named = cage(arm, [0.5, 0.5], reference=reference, adapter_name="default")
    assert list(named.scorers()) == list(cage(arm, [0.5, 0.5], reference=reference).scorers())
