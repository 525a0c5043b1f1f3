# SPDX-License-Identifier: Apache-2.0
"""Candidates as branches of one forward: each judged as the text that it is, on architectures that can and can't."""

import copy

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.architectures import ARCHITECTURES, tiny
from decoding.tables import DOORS, MASK, PROMPTS, fed_rows, log_probs, lora_model, tiny_judge
from transformers import AutoModelForSequenceClassification

from trl_parm import ClassifierReward, Guided, GuidedLogitsProcessor, SequenceReward
from trl_parm.algebra import Step
from trl_parm.decoding import args, transfer_q
from trl_parm.decoding.branches import Classifier, Continuations


BRANCH = {"Llama": True, "GPT-2": True, "OPT": True, "Mixtral": True, "BLOOM": False, "Qwen3-Next": False,
          "Phi-3": False}  # fmt: skip
"""Whether a classifier of this architecture can read branches, which windows and recurrent layers forbid."""


def classifier(name):
    config = copy.deepcopy(ARCHITECTURES[name].config)
    config.num_labels, config.vocab_size, config.pad_token_id = 2, 65, 64  # a pad token that no text has
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that a token more or less is seen
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def of_whole_texts(model, label=0):
    """The classifier on every text from its beginning, one by one."""

    @torch.no_grad()
    def reward(ids, mask):
        texts = [row[keep.bool()][None] for row, keep in zip(ids, mask)]
        return torch.stack([model(input_ids=text, use_cache=False).logits[0, label] for text in texts])

    return SequenceReward(reward)


@pytest.mark.parametrize(("name", "k"), [*((name, 3) for name in BRANCH), ("Llama", 1)])
def test_texts_are_those_of_whole_texts(name, k):
    model = classifier(name)
    rows = fed_rows(model)
    for settings in ({"max_new_tokens": 5}, {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}):
        texts = []
        for reward in (ClassifierReward(model), of_whole_texts(model)):
            rows.clear()
            torch.manual_seed(0)
            guided = Guided(tiny_llama(0), args(reward, weight=2.0, k=k))
            texts.append(guided.generate(PROMPTS, attention_mask=MASK, **settings).tolist())
            if isinstance(reward, ClassifierReward):
                n = len(PROMPTS) * settings.get("num_return_sequences", 1)
                assert (rows[-1] == n) == (BRANCH[name] or k == 1)
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", BRANCH)
def test_scores_are_those_of_whole_texts(name):
    """At one step after the other, with branches of several tokens and padding on both sides, and steps back."""
    model, generator = classifier(name), torch.Generator().manual_seed(1)
    reader, slow = Classifier(model, 64), [of_whole_texts(model, label) for label in (0, 1)]
    ids = torch.randint(2, 64, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :2] = 0
    for length, new in ((7, 1), (8, 1), (9, 3), (12, 2), (8, 1)):
        candidates = torch.randint(2, 64, (3, 4, new), generator=generator)
        seen = torch.ones_like(candidates)
        seen[1, 2, 1:] = seen[0, 3, 2:] = 0
        step = Step(torch.zeros(3, 64), tokens=ids[:, :length], mask=mask[:, :length], prompt_length=7)
        found = reader.scores(step, candidates, seen)
        for label in (0, 1):
            torch.testing.assert_close(found[..., label], slow[label](step, candidates, seen), atol=2e-4, rtol=2e-4)
    assert bool(reader.branches) == BRANCH[name]


@pytest.mark.parametrize("name", BRANCH)
def test_a_text_that_ends_in_the_pad_token_is_judged_at_its_end(name):
    """As rollouts do, where the pad token is the end token: the mask says what is text."""
    model = classifier(name)
    reader, slow = Classifier(model, 64), of_whole_texts(model)
    model.config.pad_token_id = None  # one text by itself is judged at its last token then
    ids = torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    candidates = torch.tensor([[[64, 64, 64], [8, 64, 64], [8, 9, 64], [8, 9, 10]]] * 2)
    mask = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]] * 2)
    for length in (7, 8):
        step = Step(torch.zeros(2, 64), tokens=ids[:, :length], mask=torch.ones_like(ids[:, :length]), prompt_length=7)
        expected = slow(step, candidates, mask)
        model.config.pad_token_id = 64
        found = reader.scores(step, candidates, mask)[..., 0]
        model.config.pad_token_id = None
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_objectives_that_are_outputs_of_one_model_ask_it_once():
    model = tiny_judge()
    rows = fed_rows(model)
    both = {"one": ClassifierReward(model), "two": ClassifierReward(model, label=1)}
    Guided(tiny_llama(0), args(both, [0.5, 0.5], k=3)).generate(PROMPTS, attention_mask=MASK, max_new_tokens=4)
    assert rows == [3, 9, 3, 6] + [3] * 3


def test_a_rollout_is_judged_in_branches():
    model, policy = classifier("Llama"), tiny_llama(2)
    texts = []
    for reward in (ClassifierReward(model), of_whole_texts(model)):
        guided = Guided(tiny_llama(0), transfer_q(reward, policy, k=3, rollout_tokens=4))
        texts.append(guided.generate(PROMPTS, attention_mask=MASK, max_new_tokens=5).tolist())
    assert texts[0] == texts[1]


def test_a_classifier_whose_branches_would_be_wrong_reads_texts():
    """One that does not heed the positions it is given counts columns, and a second candidate would stand later."""
    model = tiny_judge()
    inner = model.model.forward

    def forward(input_ids, attention_mask, position_ids, cache=None, past_key_values=None, **more):
        given = {"cache": cache} if past_key_values is None else {"past_key_values": past_key_values}
        past = next(iter(given.values())).get_seq_length()
        positions = torch.arange(past, past + input_ids.shape[1])[None].expand_as(input_ids)
        return inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **given, **more)

    model.model.forward = forward
    reader = Classifier(model, 0)
    for length in (5, 6):
        tokens = torch.arange(2, 2 + length)[None]
        reader.scores(
            Step(torch.zeros(1, 64), tokens=tokens, mask=torch.ones_like(tokens)),
            torch.tensor([[[9], [11], [13]]]),
            torch.ones(1, 3, 1, dtype=torch.long),
        )
    assert reader.branches is False


@pytest.mark.parametrize("name", BRANCH)
def test_rollouts_are_those_of_each_text_alone(name):
    """At one step after the other and back, with padding, and texts that end at different tokens."""
    policy, ends, generator = tiny(name), list(range(34, 64)), torch.Generator().manual_seed(1)
    reader = Continuations(policy, 5, 0)
    policy.generation_config.eos_token_id = ends
    ids = torch.randint(2, 64, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :2] = 0
    lengths = set()
    for length in (7, 8, 9, 12, 8):
        candidates = torch.randint(2, 64, (3, 4), generator=generator)
        step = Step(torch.zeros(3, 64), tokens=ids[:, :length], mask=mask[:, :length], prompt_length=7)
        found = reader.decode(step, candidates)
        for row in range(3):
            start = ids[row, :length][mask[row, :length] == 1]
            for i, token in enumerate(candidates[row]):
                text = torch.cat([start, token[None]])[None]
                output = policy.generate(
                    text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False, pad_token_id=0
                )[0, len(start) :]
                lengths.add(len(output))
                assert found[row, i, : len(output)].tolist() == output.tolist()
                assert not found[row, i, len(output) :].any()
    assert len(lengths) > 1


@pytest.mark.parametrize("setting", [{"use_cache": False}, {"return_dict_in_generate": True}], ids=str)
def test_a_policy_goes_on_from_what_was_read_whatever_its_settings(setting):
    policy = tiny_llama(2)
    step = Step(torch.zeros(3, 64), tokens=PROMPTS, mask=MASK, prompt_length=5)
    candidates = torch.tensor([[9, 11]] * 3)
    plain = Continuations(policy, 4, 0).decode(step, candidates)
    policy.generation_config.update(**setting)
    assert torch.equal(Continuations(policy, 4, 0).decode(step, candidates), plain)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["LoRA", "PBLoRA"])
@pytest.mark.parametrize("shared", [True, False], ids=["on the base", "apart"])
def test_a_policy_may_be_an_adapter_on_the_base_model(shared, kind, door):
    """The base model generates without it, the policy goes on with it."""

    def adapted():
        return lora_model("policy") if kind == "LoRA" else tiny_arm(tiny_llama(0))

    model, twin = adapted(), adapted().merge_and_unload()
    settings = {"attention_mask": MASK, "max_new_tokens": 5}
    formula = transfer_q(classifier("Llama"), twin, weight=3.0, k=3, rollout_tokens=3)
    expected = Guided(tiny_llama(0), formula).generate(PROMPTS, **settings)
    base = model.get_base_model() if shared else tiny_llama(0)
    formula = transfer_q(classifier("Llama"), model, weight=3.0, k=3, rollout_tokens=3)
    for _ in range(2):
        if door == "model":
            found = Guided(base, formula).generate(PROMPTS, **settings)
        else:
            processor = GuidedLogitsProcessor(formula, pad_token_id=0)
            found = base.generate(PROMPTS, **settings, logits_processor=[processor])
        assert torch.equal(found, expected)


def test_a_policy_that_is_guided_itself_keeps_its_adapters():
    policy = lora_model("policy")
    guided = Guided(policy, transfer_q(classifier("Llama"), policy, weight=1e-6, k=64, rollout_tokens=1))
    found = guided(PROMPTS, MASK, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(found, log_probs(policy, PROMPTS, mask=MASK).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("setting", [{"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}])
def test_a_policy_goes_on_by_its_own_settings(setting):
    policy = tiny_llama(2)
    text = torch.randint(2, 64, (1, 6), generator=torch.Generator().manual_seed(1))
    step = Step(torch.zeros(1, 64), tokens=text, mask=torch.ones_like(text), prompt_length=6)
    candidates = torch.tensor([[9, 11]])
    plain = Continuations(policy, 8, 0).decode(step, candidates)
    policy.generation_config.update(**setting)
    found = Continuations(policy, 8, 0).decode(step, candidates)
    for i, token in enumerate(candidates[0]):
        ids = torch.cat([text[0], token[None]])[None]
        output = policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert found[0, i, : output.shape[1] - 6].tolist() == output[0, 6:].tolist()
    assert not torch.equal(found, plain)
