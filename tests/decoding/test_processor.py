# SPDX-License-Identifier: Apache-2.0
"""The front door: what a processor answers is a function of the tokens alone, and each token is read once."""

import copy

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from decoding.tables import MASK, MODES, PROMPTS, ROWS, Decoder, Models, fed_tokens, generate, log_probs
from tokenizers.processors import TemplateProcessing
from transformers import BatchFeature, LlamaForSequenceClassification

from peft_pblora import set_preference
from trl_parm import (
    BASE,
    LM,
    ARGSLogitsProcessor,
    GuidedLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
    TransferQLogitsProcessor,
    Vocabulary,
)


def formula_of(base, arm, ids, preference=(0.3, 0.7), mask=None):
    """log π of base · ARM in float64."""
    return torch.log_softmax(
        log_probs(base, ids, mask=mask) + log_probs(arm, ids, list(preference), mask=mask), -1
    ).float()


def answers(processor, base, ids):
    with torch.no_grad():
        return processor(ids, base(ids).logits[:, -1])


def test_log_probabilities_are_the_formula_and_what_is_excluded_stays_excluded():
    base, arm, ids = tiny_llama(0), tiny_arm(), PROMPTS.where(PROMPTS != 0, 3)
    scores = base(ids).logits[:, -1].detach()
    scores[:, 7] = -torch.inf
    given = ids.clone(), scores.clone()
    guided = PARMLogitsProcessor(arm, [0.5, 0.5], beta=2.0)(ids, scores)
    expected = torch.log_softmax(scores.double(), -1) + 0.5 * log_probs(tiny_arm(), ids, [0.5, 0.5])
    torch.testing.assert_close(guided.double(), torch.log_softmax(expected, -1), atol=1e-5, rtol=1e-5)
    assert (guided[:, 7] == -torch.inf).all()
    assert torch.equal(ids, given[0])
    assert torch.equal(scores, given[1])


@pytest.mark.parametrize("shift", ["roll back", "reorder", "fewer rows", "more rows", "fork", "the same"])
def test_any_prefix_in_any_order(shift):
    base, arm = tiny_llama(0), tiny_arm()
    processor, twin = PARMLogitsProcessor(arm, [0.2, 0.8]), tiny_arm()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (3, 9), generator=generator)
    following = {
        "roll back": ids[:, :5],
        "reorder": torch.cat([ids[[2, 0, 0]], torch.full((3, 1), 9)], dim=1),
        "fewer rows": ids[[2, 1]],
        "more rows": ids[[0, 0, 1, 1, 2, 2]],
        "fork": torch.cat([ids[:, :6], torch.randint(2, 64, (3, 5), generator=generator)], dim=1),
        "the same": ids,
    }[shift]
    for prefix in (ids[:, :4], ids[:, :5], ids, following, ids):
        expected = formula_of(base, twin, prefix, (0.2, 0.8))
        torch.testing.assert_close(answers(processor, base, prefix), expected, atol=1e-4, rtol=1e-4)


def test_one_processor_serves_many_calls():
    """Other prompts, other batch sizes, the same prompt again: nothing leaks from one call to the next."""
    models, decoder = Models.make(), Decoder(lambda m: BASE + LM(m.arm, [0.3, 0.7]), lambda m, base, log_pi: base)
    processor = GuidedLogitsProcessor(decoder.formula(models))
    full = PROMPTS.where(PROMPTS != 0, 3)
    for prompts in (full, full[:1], full[:2, :3], full, full[1:], full[:1]):
        settings = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 8}
        fresh = GuidedLogitsProcessor(decoder.formula(models))
        assert torch.equal(
            models.base.generate(prompts, **settings, logits_processor=[processor]),
            models.base.generate(prompts, **settings, logits_processor=[fresh]),
        )


def test_two_preferences_on_one_arm_interleaved():
    base, arm, twin = tiny_llama(0), tiny_arm(), tiny_arm()
    preferences = ([1.0, 0.0], [0.0, 1.0])
    processors, ids = [PARMLogitsProcessor(arm, p) for p in preferences], PROMPTS[1:2]
    for token in range(4):
        for processor, preference in zip(processors, preferences):
            expected = formula_of(base, twin, ids, preference)
            torch.testing.assert_close(answers(processor, base, ids), expected, atol=1e-4, rtol=1e-4)
        ids = torch.cat([ids, torch.tensor([[20 + token]])], dim=1)


def test_equal_prompts_with_their_own_preferences_do_not_share_a_cache():
    base, arm, ids = tiny_llama(0), tiny_arm(), PROMPTS[1:2].repeat(3, 1)
    processor = PARMLogitsProcessor(arm, ROWS)
    for prefix in (ids, torch.cat([ids, torch.tensor([[9], [9], [9]])], 1), ids):
        found = answers(processor, base, prefix)
        for i in range(3):
            alone = formula_of(base, tiny_arm(), prefix[i : i + 1], ROWS[i].tolist())
            torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_preference_that_is_set_in_the_arm_is_used_and_its_change_noticed():
    base, arm, twin = tiny_llama(0), tiny_arm(), tiny_arm()
    processor, ids = PARMLogitsProcessor(arm), PROMPTS[1:2]
    for preference in ([1.0, 0.0], [0.0, 1.0]):
        set_preference(arm, preference)
        expected = formula_of(base, twin, ids, preference)
        torch.testing.assert_close(answers(processor, base, ids), expected, atol=1e-4, rtol=1e-4)


def test_every_token_is_read_once():
    models = Models.make()
    fed = fed_tokens(models.arm)
    sequences = generate(models, Decoder(lambda m: BASE + LM(m.arm, [0.3, 0.7]), None), "processor").sequences
    assert fed == [5] + [1] * (sequences.shape[1] - 6)


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted", "assistant that is the base"])
def test_verifying_a_draft_costs_no_forward_of_the_guide(mode):
    """Each prefix is run once, whether the assistant or the base asks for it; only drafted tokens that were rejected
    are run on top of those that are kept. So it is of a guide that does not train."""
    models, asked = Models.make(), []
    models.first.requires_grad_(False)
    fed = fed_tokens(models.first)

    class Asked(GuidedLogitsProcessor):
        def __call__(self, input_ids, scores):
            asked.append(tuple(input_ids[0].tolist()))
            return super().__call__(input_ids, scores)

    processor = Asked(BASE + 0.5 * LM(models.first))
    settings = {**MODES[mode], "max_new_tokens": 16}
    assistant = {"small": models.reference, "base": models.base}.get(settings.pop("assistant", None))
    settings.pop("prompts")
    sequence = models.base.generate(
        PROMPTS[1:2], logits_processor=[processor], eos_token_id=-1, assistant_model=assistant, **settings
    )
    if assistant is not None:  # which asks for what the base asks for again
        assert len(asked) > len(set(asked))
    assert len(fed) == len(set(asked))
    assert sum(fed) - PROMPTS.shape[1] == len(set(asked)) - 1
    assert sequence.shape[1] == PROMPTS.shape[1] + 16


# Padding: what `generate` infers.


def one_step(base, processor, ids, **settings):
    output = base.generate(
        ids, logits_processor=[processor], max_new_tokens=1, return_dict_in_generate=True, output_scores=True,
        **settings,
    )  # fmt: skip
    return output.scores[0]


PADDED = {
    "a row": torch.tensor([[0, 0, 0, 5, 9, 33]]),
    "rows with the same padding": torch.tensor([[0, 0, 5, 9, 33], [0, 0, 7, 8, 20]]),
    "rows with different padding": PROMPTS,
    "inside a row": torch.tensor([[5, 9, 0, 33, 7]]),
}


@pytest.mark.parametrize("given", [True, False], ids=["mask given", "mask left out"])
@pytest.mark.parametrize("on_base", [False, True], ids=["apart", "on the base"])
@pytest.mark.parametrize("name", PADDED)
def test_guides_see_the_mask_that_generate_infers(name, on_base, given):
    ids = PADDED[name]
    mask = (ids != 0).long()
    models = Models.make(on_base)
    expected = formula_of(Models.make().base, Models.make(on_base).arm, ids, mask=mask)
    settings = {"attention_mask": mask} if given else {}
    found = one_step(models.base, PARMLogitsProcessor(models.arm, [0.3, 0.7]), ids, **settings)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PADDED)
def test_a_classifier_sees_it_too(name):
    ids, judge = PADDED[name], Models.make().judge
    assert isinstance(judge, LlamaForSequenceClassification)
    found = [
        one_step(tiny_llama(0), ARGSLogitsProcessor(judge, k=5), ids, **settings)
        for settings in ({"attention_mask": (ids != 0).long()}, {})
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("known", ["to the classifier", "to the tokenizer", "to the policy"])
def test_an_end_token_in_a_prompt_that_pads_elsewhere_is_text(known, tokenizer):
    """A row that begins with one may be padded, and is refused; a reward of texts sees no padding either way."""
    judge, policy = Models.make().judge, tiny_llama(2)
    judge.config.pad_token_id = 1
    judge.config.eos_token_id = 1 if known == "to the classifier" else None
    policy.generation_config.eos_token_id = None
    arguments, kind = (judge,), ARGSLogitsProcessor
    if known == "to the tokenizer":
        tokenizer.pad_token = tokenizer.eos_token
    if known == "to the policy":
        policy.generation_config.eos_token_id, kind = 1, TransferQLogitsProcessor
        arguments = judge, policy
    ids = torch.tensor([[5, 9, 1, 33, 20]])
    settings = {"k": 5, **({"tokenizer": tokenizer} if known == "to the tokenizer" else {})}
    prompt = Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    expected = one_step(tiny_llama(0), kind(*arguments, **settings, prompt=prompt), ids)
    torch.testing.assert_close(one_step(tiny_llama(0), kind(*arguments, **settings), ids), expected)
    with pytest.raises(ValueError, match="begins with an end token"):
        one_step(tiny_llama(0), kind(*arguments, **settings), ids.roll(3))
    if known == "to the tokenizer":
        of_texts = ARGSLogitsProcessor(lambda prompts, responses: [0.0] * len(prompts), tokenizer=tokenizer, k=3)
        assert one_step(tiny_llama(0), of_texts, ids.roll(3)).shape == (1, 64)


ENDS = {
    "padding": ([[2, 2, 2, 1, 7, 8], [1, 11, 12, 13, 14, 15]], True),
    "padding of all rows": ([[2, 2, 1, 7], [2, 2, 1, 8]], True),
    "behind other padding": ([[0, 2, 7, 8], [1, 7, 8, 9]], True),
    "a BOS": ([[0, 0, 2, 7], [2, 8, 9, 5]], False),
    "a BOS of one text": ([[2, 8, 9, 5]], False),
    "within texts": ([[0, 1, 2, 7], [1, 2, 2, 5]], False),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_tokens_before_a_text_may_be_padding_where_a_model_names_another_pad_token(name):
    """As of a tokenizer that pads with its end token, whatever the generation configuration says."""
    ids, refused = torch.tensor(ENDS[name][0]), ENDS[name][1]
    names = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    base, arm = tiny_llama(0, **names), tiny_arm(tiny_llama(1, **names))
    first = (ids == 1).int().argmax(1, keepdim=True)
    mask = (torch.arange(ids.shape[1]) >= first).long() if refused else (ids != 0).long()
    expected = formula_of(tiny_llama(0), tiny_arm(tiny_llama(1)), ids, mask=mask)
    prompt = Prompt({"input_ids": ids, "attention_mask": mask})
    found = one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7], prompt=prompt), ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if refused:
        with pytest.raises(ValueError, match="A row begins with an end token"):
            one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7]), ids, attention_mask=mask)
        return
    found = one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7]), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_end_tokens_of_a_guide_are_those_of_its_own_vocabulary(tokenizer):
    vocabulary = Vocabulary(tokenizer, tokenizer)
    vocabulary.guide_ids = vocabulary.guide_ids.flip(0)  # as of a tokenizer with its words in another order
    processor = GuidedLogitsProcessor(BASE + LM(tiny_llama(1, eos_token_id=1), vocabulary=vocabulary))
    assert one_step(tiny_llama(0), processor, torch.tensor([[0, 1, 7], [9, 8, 7]])).shape == (2, 64)
    with pytest.raises(ValueError, match="A row begins with an end token"):
        one_step(tiny_llama(0), processor, torch.tensor([[0, 62, 7], [9, 8, 7]]))


def without_pad_token(model, eos: int | None):
    """A model whose pad token is its end token, or that has neither."""
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = eos, eos
    return model


@pytest.mark.parametrize("eos", [1, None], ids=["it is the end token", "there is none"])
def test_where_padding_can_not_be_told_the_mask_is_needed(eos):
    base, arm = tiny_llama(0), tiny_arm(without_pad_token(tiny_llama(1), eos))
    ids = torch.tensor([[1, 1, 5, 9], [7, 8, 20, 41]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    message = "begins with an end token" if eos else "No pad token is known, so that rows may begin"
    with pytest.raises(ValueError, match=message):
        one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7]), ids, attention_mask=mask)
    processor = PARMLogitsProcessor(arm, [0.3, 0.7], prompt=Prompt({"input_ids": ids, "attention_mask": mask}))
    expected = formula_of(tiny_llama(0), tiny_arm(tiny_llama(1)), ids, mask=mask)
    found = one_step(base, processor, ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    alone = one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7]), ids[1:])
    torch.testing.assert_close(alone, expected[1:], atol=1e-4, rtol=1e-4)


BEGUN = {
    "one word": ([[1, 5, 9], [5, 9, 33]], False),
    "a token of its own": ([[2, 2, 9], [5, 9, 33]], False),
    "the BOS": ([[5, 5, 9], [5, 9, 33]], False),
    "nothing, after a BOS": ([[5, 9, 33], [5, 7, 20]], True),
    "nothing, after two of them": ([[5, 5, 33], [5, 5, 20]], True),
    "nothing, of one text": ([[5, 9, 33], [5, 9, 33]], True),
}


@pytest.mark.parametrize("name", BEGUN)
def test_without_a_pad_token_rows_are_guided_where_none_can_be_padded(name):
    ids, told = torch.tensor(BEGUN[name][0]), BEGUN[name][1]
    base, arm = tiny_llama(0), tiny_arm(tiny_llama(1, pad_token_id=None, eos_token_id=63))
    processor = PARMLogitsProcessor(arm, [0.3, 0.7])
    if told:
        expected = formula_of(tiny_llama(0), tiny_arm(tiny_llama(1)), ids)
        torch.testing.assert_close(one_step(base, processor, ids), expected, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(ValueError, match="No pad token is known, so that rows may begin"):
        one_step(base, processor, ids)


def test_without_pad_and_end_token_no_batch_is_guided():
    """Rows may all be padded, to a multiple or to a fixed length."""
    processor = PARMLogitsProcessor(tiny_arm(without_pad_token(tiny_llama(1), None)), [0.3, 0.7])
    with pytest.raises(ValueError, match="No pad token is known, so that rows may begin"):
        one_step(tiny_llama(0), processor, torch.tensor([[30, 30, 5, 6], [30, 30, 8, 9]]))


def test_a_pad_token_of_the_base_may_be_named():
    base, arm = tiny_llama(0), tiny_arm(without_pad_token(tiny_llama(1), None))
    processor = PARMLogitsProcessor(arm, [0.3, 0.7], pad_token_id=0)
    expected = formula_of(tiny_llama(0), tiny_arm(tiny_llama(1)), PROMPTS, mask=MASK)
    torch.testing.assert_close(one_step(base, processor, PROMPTS), expected, atol=1e-4, rtol=1e-4)


def test_the_mask_says_what_tokens_do_not():
    """Padding with a token that stands for text elsewhere, in beams too; and a batch that is not the prompt's."""
    base, arm = tiny_gpt2(0), tiny_gpt2(1)
    ids, mask = torch.tensor([[9, 9, 5, 9, 33], [7, 8, 20, 41, 2]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    prompt = Prompt({"attention_mask": mask})
    guided = base.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        num_beams=2,
        logits_processor=[PARMLogitsProcessor(arm, prompt=prompt)],
    )
    for i in range(2):
        text = ids[i : i + 1, mask[i].bool()]
        alone = base.generate(
            text, max_new_tokens=6, num_beams=2, logits_processor=[PARMLogitsProcessor(tiny_gpt2(1))]
        )
        new = alone[0, text.shape[1] :]
        assert torch.equal(new, guided[i, 5 : 5 + len(new)])
    with pytest.raises(ValueError, match="has 2 rows of 5 tokens, which does not fit input ids of shape"):
        PARMLogitsProcessor(arm, prompt=prompt)(PROMPTS, torch.zeros(3, 64))


def test_a_bfloat16_arm_guides_a_float32_base():
    base, arm = tiny_llama(0), tiny_arm().to(torch.bfloat16)
    found = one_step(base, PARMLogitsProcessor(arm, [0.3, 0.7]), PROMPTS, attention_mask=MASK)
    assert found.dtype == torch.float32
    expected = formula_of(base, tiny_arm(), PROMPTS, mask=MASK)
    torch.testing.assert_close(found, expected, atol=0.6, rtol=0.1)


def test_continuous_batching_is_not_passed_off_as_guidance():
    with pytest.raises(
        NotImplementedError, match=r"all tokens of every row, of shape \(rows, length\), but got \(2,\)"
    ):
        PARMLogitsProcessor(tiny_arm())(torch.tensor([33, 2]), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompt(), "needs `inputs` with `input_ids`"),
        (lambda: Prompt({"input_ids": PROMPTS}, guide=["w1"]), "which need `tokenizer`"),
        (lambda: Prompt({"input_ids": PROMPTS, "attention_mask": MASK}, length=6), "has 6 columns, but .* 5. Give a"),
        (lambda: Prompt({"input_ids": PROMPTS, "attention_mask": MASK[:, :4]}), "has 5 columns, but .* 4. Give a"),
        (lambda: Prompt({"attention_mask": MASK}, guide={"input_ids": PROMPTS[:2]}), "has 3 prompts, but `guide` 2"),
        (
            lambda: Prompt({"input_ids": PROMPTS}, guide={"input_ids": PROMPTS[:, :0]}),
            "not empty and padded on the left",
        ),
    ],
)
def test_bad_prompts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_texts_as_the_guides_prompts(tokenizer):
    inputs = BatchFeature({"input_ids": PROMPTS, "attention_mask": MASK})
    ids, mask = Prompt(inputs, guide=["w1 w2", "w3 w4 w5", "w6"], tokenizer=tokenizer).arguments.values()
    assert ids.tolist() == [[0, 7, 8], [9, 10, 11], [0, 0, 12]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    one = Prompt({"input_ids": PROMPTS[:1]}, guide="w1 w2", tokenizer=tokenizer)
    assert one.arguments["guide_input_ids"].tolist() == [[7, 8]]
    assert Prompt(inputs).arguments == {}
    assert copy.deepcopy(one).length == 5


def test_texts_as_the_guides_prompts_go_on(tokenizer):
    """Without the end token that a tokenizer appends, as in training."""
    core = tokenizer.backend_tokenizer
    core.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("w1 w2")["input_ids"] == [7, 8, 1]
    ids, mask = Prompt({"input_ids": PROMPTS[:2]}, guide=["w1 w2", "w5"], tokenizer=tokenizer).arguments.values()
    assert ids.tolist() == [[7, 8], [0, 11]]
    assert mask.tolist() == [[1, 1], [0, 1]]
