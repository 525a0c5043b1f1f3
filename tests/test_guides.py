# SPDX-License-Identifier: Apache-2.0
"""Guides that differ from the base model, and guides that are the base model with an adapter."""

import copy
import logging

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from test_decoders import MASK, MODES, PROMPTS, ROWS, Decoder, Models, NaiveProcessor, generate
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_pblora import get_preference, set_preference
from trl_parm import (
    BASE,
    LM,
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
    SpeculativeDecoding,
    Vocabulary,
)


def log_pi(model, ids, mask=None):
    """log π of the next token, from the whole prefix in float64."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        logits = (
            copy.deepcopy(model)
            .double()(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            .logits
        )
    return torch.log_softmax(logits[:, -1], -1)


# Base and guide on one set of weights.


def lora_model(*names):
    """A PeftModel with several LoRA adapters whose B is not zero."""
    torch.manual_seed(5)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(0), settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def separate(model, *names):
    """The plain base model, and one full copy of the model for each adapter."""
    base = copy.deepcopy(model)
    copies = []
    for name in names:
        guide = copy.deepcopy(model)
        guide.set_adapter(name)
        copies.append(guide)
    return base.unload(), copies


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_adapter_on_the_base_model_guides_it(mode):
    """As two separate models do: the base runs without the adapter, the guide with it."""
    arm = tiny_arm(tiny_llama(0))
    models = Models.make()
    models.base, models.arm = copy.deepcopy(arm).unload(), copy.deepcopy(arm)
    expected = generate(models, PARMLogitsProcessor(models.arm, [0.3, 0.7], beta=0.8), **MODES[mode])
    models.base = arm.get_base_model()
    guided = generate(models, PARMLogitsProcessor(arm, [0.3, 0.7], beta=0.8), **MODES[mode])
    assert torch.equal(guided.sequences, expected.sequences)
    for ours, theirs in zip(guided.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_peft_model_itself_may_generate():
    arm = tiny_arm(tiny_llama(0))
    base, guide = copy.deepcopy(arm).unload(), copy.deepcopy(arm)
    expected = base.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[PARMLogitsProcessor(guide, [0.3, 0.7])]
    )
    ours = arm.generate(
        input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=8,
        logits_processor=[PARMLogitsProcessor(arm, [0.3, 0.7])],
    )  # fmt: skip
    assert torch.equal(ours, expected)


def test_nothing_but_a_guided_generate_changes():
    """The adapter acts in every other forward as it did, also where a guide exists, and nothing becomes trainable."""
    arm = tiny_arm(tiny_llama(0))
    arm.requires_grad_(False)
    base = arm.get_base_model()
    set_preference(arm, [0.3, 0.7])
    before = [arm(PROMPTS).logits, base(PROMPTS).logits, base.generate(PROMPTS, max_new_tokens=5)]
    processor = PARMLogitsProcessor(arm, [0.3, 0.7])
    with pytest.raises(RuntimeError, match="broken off"):
        base.generate(PROMPTS, max_new_tokens=5, logits_processor=[processor, break_off])
    base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=5, logits_processor=[processor])
    after = [arm(PROMPTS).logits, base(PROMPTS).logits, base.generate(PROMPTS, max_new_tokens=5)]
    for x, y in zip(before, after):
        assert torch.equal(x, y)
    assert not any(parameter.requires_grad for parameter in arm.parameters())
    copied = copy.deepcopy(arm)
    assert torch.equal(copied(PROMPTS).logits, before[0])


def break_off(input_ids, scores):
    raise RuntimeError("broken off")


def test_several_adapters_of_one_model_guide_it():
    model = lora_model("helpful", "harmless")
    base, (helpful, harmless) = separate(model, "helpful", "harmless")
    expected = GenARMLogitsProcessor({"helpful": helpful, "harmless": harmless}, [0.4, 0.6])
    ours = GenARMLogitsProcessor({"helpful": "helpful", "harmless": "harmless"}, [0.4, 0.6], adapters_of=model)
    assert "LM(PeftModelForCausalLM, harmless)" in repr(ours)
    models = Models.make()
    models.base = base
    guided = generate(models, expected)
    models.base = model.get_base_model()
    assert torch.equal(generate(models, ours).sequences, guided.sequences)
    models.base = base
    reference = MODWeakToStrongLogitsProcessor({"helpful": helpful}, base, [1.0])
    expected = generate(models, reference).sequences
    off = LM(model, disable_adapter=True)
    shared = MODWeakToStrongLogitsProcessor({"helpful": "helpful"}, off, [1.0], adapters_of=model)
    assert torch.equal(generate(models, shared).sequences, expected)


def test_an_adapter_of_the_base_model_stays_on():
    """A base model that is itself an adapted one: only the adapter that guides is switched off in its forward."""
    model = lora_model("tuned", "arm")
    _, (tuned, arm) = separate(model, "tuned", "arm")
    models = Models.make()
    models.base = tuned.merge_and_unload()
    expected = generate(models, PARMLogitsProcessor(arm)).sequences
    model.set_adapter("tuned")
    models.base = model.get_base_model()
    assert torch.equal(generate(models, PARMLogitsProcessor(model, adapter_name="arm")).sequences, expected)


def test_each_guide_of_a_formula_has_its_own_adapter_and_preference():
    arm = tiny_arm(tiny_llama(0))
    separate_arms = [copy.deepcopy(arm) for _ in range(2)]
    ids, scores = PROMPTS[1:], torch.randn(2, 64)
    ours = (BASE + LM(arm, [1.0, 0.0]) + 0.5 * LM(arm, [0.0, 1.0]) - LM(arm, disable_adapter=True))(ids, scores)
    off = copy.deepcopy(arm).unload()
    expected = BASE + LM(separate_arms[0], [1.0, 0.0]) + 0.5 * LM(separate_arms[1], [0.0, 1.0]) - LM(off)
    torch.testing.assert_close(ours, expected(ids, scores))


def test_equal_guides_merge():
    arm, small = tiny_arm(), tiny_llama(2)
    formula = BASE + LM(small) + LM(arm, [0.3, 0.7]) + LM(small) + LM(arm, [0.3, 0.7]) - LM(arm, [0.7, 0.3])
    assert [(w, type(s).__name__) for w, s in formula.terms()] == [
        (1.0, "_Base"), (2.0, "LM"), (2.0, "LM"), (-1.0, "LM"),
    ]  # fmt: skip


# Vocabularies and prompts that differ.


def extended_tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(extra))
    return tokenizer


@pytest.mark.parametrize(("base_size", "guide_size"), [(65, 64), (64, 66), (72, 65), (65, 80)])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_vocabularies_of_other_sizes(base_size, guide_size, mode):
    """One model knows a token more, or has padded embeddings: aligned by token, unknown ones without probability."""
    base_tokenizer = extended_tokenizer("<image>") if base_size >= 65 else tiny_tokenizer()
    guide_tokenizer = extended_tokenizer("<pad_arm>") if guide_size >= 65 else tiny_tokenizer()
    base, arm = tiny_llama(0, vocab_size=base_size), tiny_arm(tiny_llama(1, vocab_size=guide_size))
    processor = PARMLogitsProcessor(arm, [0.3, 0.7], vocabulary=Vocabulary(base_tokenizer, guide_tokenizer))
    set_preference(arm, [0.3, 0.7])

    def naive(ids, scores):
        mask = torch.ones_like(ids)
        mask[:, :5] = MASK.repeat_interleave(len(ids) // 3, 0)
        known = torch.full((len(ids), base_size), -torch.inf, dtype=torch.float64)
        known[:, :64] = log_pi(arm, ids, mask)[:, :64]
        return (torch.log_softmax(scores.double(), -1) + known).float()

    texts = []
    for one in (processor, naive):
        torch.manual_seed(0)
        texts.append(
            base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[one], **mode)
        )  # fmt: skip
    assert torch.equal(*texts)
    assert (texts[0] < 64).all()


def test_tokens_at_other_ids_are_found():
    """The same added tokens in another order: a blind cut would take one for the other."""
    vocabulary = Vocabulary(extended_tokenizer("<a>", "<b>"), extended_tokenizer("<b>", "<c>", "<a>"))
    ids, known = vocabulary.to_guide(torch.tensor([[7, 64, 65]]))
    assert ids.tolist() == [[7, 66, 64]]
    assert known.all()
    log_probs = torch.arange(67.0)[None]
    assert vocabulary.to_base(log_probs, 68)[0, 62:].tolist() == [62, 63, 66, 64, -torch.inf, -torch.inf]


def test_a_token_that_the_guide_does_not_know_is_not_read():
    base_tokenizer = extended_tokenizer("<image>")
    guide = tiny_gpt2(1)
    lm = LM(guide, vocabulary=Vocabulary(base_tokenizer, tiny_tokenizer()))
    found = lm(torch.tensor([[7, 64, 9]]), torch.zeros(1, 65))
    torch.testing.assert_close(found[:, :64].double(), log_pi(guide, torch.tensor([[7, 9]])), atol=1e-4, rtol=1e-4)


def test_tokenizers_that_do_not_fit():
    other = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tiny_tokenizer().backend_tokenizer))
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)({"x": 0, "<unk>": 1}, unk_token="<unk>")
    with pytest.raises(ValueError, match="of different families: .* known to one of them only, such as"):
        Vocabulary(tiny_tokenizer(), other)
    split = tiny_tokenizer()
    from tokenizers import pre_tokenizers

    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    with pytest.raises(ValueError, match="cut text differently"):
        Vocabulary(tiny_tokenizer(), split)
    ends = tiny_tokenizer()
    ends.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ValueError, match="does not know the base model's end token '<end>'"):
        Vocabulary(ends, tiny_tokenizer())


OWN = {"input_ids": torch.tensor([[0, 11, 12], [13, 14, 15], [0, 0, 16]])}
OWN["attention_mask"] = (OWN["input_ids"] != 0).long()


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 4},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_prompt_of_the_guide_s_own(mode, make):
    base, guide = tiny_llama(0), make(1)
    prompt = Prompt({"input_ids": PROMPTS, "attention_mask": MASK}, guide=OWN)

    def naive(ids, scores):
        repeats = len(ids) // 3
        read = torch.cat([OWN["input_ids"].repeat_interleave(repeats, 0), ids[:, 5:]], 1)
        mask = torch.ones_like(read)
        mask[:, :3] = OWN["attention_mask"].repeat_interleave(repeats, 0)
        return (torch.log_softmax(scores.double(), -1) + log_pi(guide, read, mask)).float()

    texts = []
    for processor in (PARMLogitsProcessor(guide, prompt=prompt), naive):
        torch.manual_seed(0)
        texts.append(
            base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[processor], **mode)
        )
    assert torch.equal(*texts)


def test_texts_as_the_guide_s_prompts(tokenizer):
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK}
    prompt = Prompt(inputs, guide=["w1 w2", "w3 w4 w5", "w6"], tokenizer=tokenizer)
    assert prompt.guide_ids.tolist() == [[0, 7, 8], [9, 10, 11], [0, 0, 12]]
    assert prompt.guide_mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    one = Prompt({"input_ids": PROMPTS[:1]}, guide="w1 w2", tokenizer=tokenizer)
    assert one.guide_ids.tolist() == [[7, 8]]


def test_embeddings_as_the_base_model_s_prompt():
    """`generate` hands over no prompt tokens; the guide's own prompt stands in their place."""
    base, guide = tiny_llama(0), tiny_llama(1)
    inputs = {"inputs_embeds": base.get_input_embeddings()(PROMPTS).detach(), "attention_mask": MASK}
    prompt = Prompt(inputs, guide={"input_ids": PROMPTS, "attention_mask": MASK})
    ours = base.generate(**inputs, max_new_tokens=8, logits_processor=[PARMLogitsProcessor(guide, prompt=prompt)])
    expected = base.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[PARMLogitsProcessor(guide)]
    )
    assert torch.equal(ours, expected[:, 5:])
    with pytest.raises(ValueError, match="with `inputs_embeds` it can't see the prompt"):
        base.generate(**inputs, max_new_tokens=8, logits_processor=[PARMLogitsProcessor(guide)])


def tiny_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.2, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
def test_an_encoder_decoder_base_model(mode):
    """Its decoder's tokens are no prompt, so it is refused, or the guide gets a prompt of its own."""
    base, guide = tiny_bart(), tiny_llama(1)
    with pytest.raises(ValueError, match="The base model is an encoder-decoder model"):
        base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, logits_processor=[PARMLogitsProcessor(guide)])

    def naive(ids, scores):
        repeats = len(ids) // 3
        read = torch.cat([OWN["input_ids"].repeat_interleave(repeats, 0), ids[:, 1:]], 1)
        mask = torch.ones_like(read)
        mask[:, :3] = OWN["attention_mask"].repeat_interleave(repeats, 0)
        return (torch.log_softmax(scores.double(), -1) + log_pi(guide, read, mask)).float()

    processor = PARMLogitsProcessor(guide, prompt=Prompt(guide=OWN, length=1))
    texts = [
        base.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, logits_processor=[one], **mode)
        for one in (processor, naive)
    ]
    assert torch.equal(*texts)


# Kinds of models and caches.


def tiny_mistral(seed=1):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, sliding_window=4, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("mode", ["greedy", "beam search", "assisted", "prompt lookup"])
def test_a_guide_with_a_sliding_window(mode):
    models = Models.make()
    models.arm = tiny_mistral()
    decoder = Decoder(lambda m: PARMLogitsProcessor(m.arm), lambda m, base, log_pi: base + log_pi(m.arm))
    mask = MASK[1:2] if MODES[mode].get("prompts") == 1 else MASK
    guided = generate(models, decoder.make(models), **MODES[mode], max_new_tokens=14)
    naive = generate(models, NaiveProcessor(decoder, models, mask), **MODES[mode], max_new_tokens=14)
    assert torch.equal(guided.sequences, naive.sequences)


def test_a_quantised_cache_of_the_base_model():
    pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    models = Models.make()
    models.base = tiny_llama(0, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    settings = {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}, "max_new_tokens": 12,
    }  # fmt: skip
    decoder = Decoder(lambda m: PARMLogitsProcessor(m.arm), lambda m, base, log_pi: base + log_pi(m.arm))
    guided = generate(models, decoder.make(models), **settings)
    assert torch.equal(guided.sequences, generate(models, NaiveProcessor(decoder, models, MASK), **settings).sequences)


def test_rows_that_have_ended_do_not_disturb_the_others():
    models = Models.make()
    models.base.generation_config.eos_token_id = list(range(1, 24))
    processor = PARMLogitsProcessor(models.arm, [0.3, 0.7])
    guided = generate(models, processor, max_new_tokens=24).sequences
    ended = (guided[:, 5:] == 0).any(1)
    assert ended.any()
    decoder = Decoder(lambda m: None, lambda m, base, log_pi: base + log_pi(m.arm, [0.3, 0.7]))
    assert torch.equal(guided, generate(models, NaiveProcessor(decoder, models, MASK), max_new_tokens=24).sequences)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
def test_continuous_batching_is_refused_and_not_passed_off_as_guidance(verbosity):
    from transformers.utils import logging as transformers_logging

    models, before = Models.make(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(verbosity)
    try:
        with pytest.raises(NotImplementedError, match="drops logits processors"):
            generate(models, PARMLogitsProcessor(models.arm), cache_implementation="paged")
    finally:
        transformers_logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LM(tiny_bart()), "encoder-decoder model. Only causal"),
        (lambda: LM(tiny_llama().model), "must be a causal language model"),
        (lambda: LM(MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))), "no key-value"),
        (lambda: LM(tiny_arm(), adapter_name="other"), r"no adapter 'other'. It has \['default'\]"),
        (lambda: LM(tiny_llama(), disable_adapter=True), "needs a model with an adapter"),
        (lambda: LM(lora_model("one"), [0.5, 0.5]), "has no preference-conditioned adapter"),
        (lambda: Prompt(), "needs `inputs` with `input_ids`"),
        (lambda: Prompt({"input_ids": PROMPTS}, guide=["w1"]), "which need `tokenizer`"),
        (lambda: Prompt({"attention_mask": MASK}, guide={"input_ids": PROMPTS[:2]}), "has 3 prompts, but `guide` 2"),
        (
            lambda: Prompt({"input_ids": PROMPTS}, guide={"input_ids": PROMPTS[:, :0]}),
            "not empty and padded on the left",
        ),
    ],
)
def test_bad_guides(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_that_is_not_the_prompt_s():
    models = Models.make()
    processor = PARMLogitsProcessor(models.arm, prompt=Prompt({"attention_mask": MASK[:2]}))
    with pytest.raises(ValueError, match="has 2 rows of 5 tokens, which does not fit input ids of shape"):
        generate(models, processor)


def test_an_adapter_loaded_by_transformers_guides_its_own_model(tmp_path):
    arm = tiny_arm(tiny_llama(0))
    arm.save_pretrained(tmp_path)
    model = tiny_llama(0)
    model.load_adapter(str(tmp_path), adapter_name="arm")
    expected = tiny_llama(0).generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=8, logits_processor=[PARMLogitsProcessor(arm, ROWS)]
    )
    ours = model.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=8,
        logits_processor=[PARMLogitsProcessor(model, ROWS, adapter_name="arm")],
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert get_preference(model).shape == (3, 2)
    assert not isinstance(model, PeftModel)


def test_a_control_without_preference_shares_the_backbone_too():
    arm = tiny_arm(tiny_llama(0))
    models = Models.make()
    models.base, off = copy.deepcopy(arm).unload(), copy.deepcopy(arm).unload()
    expected = generate(models, GuidedLogitsProcessor(BASE + LM(off))).sequences
    models.base = arm.get_base_model()
    ours = generate(models, GuidedLogitsProcessor(BASE + LM(arm, disable_adapter=True))).sequences
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("active", ["helpful", "harmless"])
def test_a_guide_of_weight_zero_stays_out_of_the_base_model(active, speculative):
    """At a vertex of the simplex the other adapter is not asked, but the base model still runs without it."""
    model = lora_model("helpful", "harmless")
    model.set_adapter(active)
    base, ids = model.get_base_model(), torch.tensor([[7, 8, 20, 41, 2]])
    arms = {"a": "helpful", "b": "harmless"}
    settings = {"max_new_tokens": 8, "custom_generate": SpeculativeDecoding("prompt") if speculative else None}
    alone = copy.deepcopy(model)
    for guide, formula in (
        (GenARMLogitsProcessor(arms, [1.0, 0.0], adapters_of=model), BASE + LM(alone, adapter_name="helpful")),
        (GuidedLogitsProcessor(BASE + 0.0 * LM(model) + 0.0 * LM(model, adapter_name="harmless")), BASE),
    ):
        plain = tiny_llama(0).generate(ids, max_new_tokens=8, logits_processor=[GuidedLogitsProcessor(formula)])
        assert torch.equal(base.generate(ids, logits_processor=[guide], **settings), plain)
