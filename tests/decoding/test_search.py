# SPDX-License-Identifier: Apache-2.0
"""Rewards of whole texts as guides: functions of texts and of ids, classifiers, rollouts, and their caches."""

import copy

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.architectures import tiny
from decoding.tables import DOORS, MASK, PROMPTS, ROWS, Models, fed_tokens, lora_model, tiny_judge

from peft_pblora.kv_cache import cache_argument, cache_in
from trl_parm import BASE, LM, ClassifierReward, Guided, GuidedLogitsProcessor, Prompt, SequenceReward, TextReward
from trl_parm.algebra import Step, guided_logits
from trl_parm.decoding import ARGS, ARGSLogitsProcessor, Rollout, args, transfer_q


every_door = pytest.mark.parametrize("door", DOORS)


def decode(door, base, formula, **settings):
    settings = {"max_new_tokens": 10, **settings}
    torch.manual_seed(0)
    if door == "model":
        return Guided(base, formula).generate(PROMPTS, attention_mask=MASK, **settings)
    processor = GuidedLogitsProcessor(formula, pad_token_id=0)
    return base.generate(PROMPTS, attention_mask=MASK, logits_processor=[processor], **settings)


def count_sevens(ids, mask):
    return ((ids == 7) * mask).sum(1).float()


def longest_word(prompts, responses):
    return [float(max((int(word[1:]) for word in r.split() if word[1:].isdigit()), default=0)) for r in responses]


@every_door
def test_rewards_of_texts_get_the_prompt_and_the_response_of_each_candidate(tokenizer, door):
    base, seen = tiny_llama(0), []

    def reward(prompts, responses):
        seen.append(list(zip(prompts, responses)))
        return longest_word(prompts, responses)

    output = decode(door, base, args(reward, weight=0.5, k=3, tokenizer=tokenizer), max_new_tokens=2)
    texts = tokenizer.batch_decode(PROMPTS, skip_special_tokens=True)
    assert [len(call) for call in seen] == [9, 9]
    assert [prompt for prompt, _ in seen[0]] == [text for text in texts for _ in range(3)]
    assert [prompt for prompt, _ in seen[1]] == [text for text in texts for _ in range(3)]
    first = tokenizer.batch_decode(output[:, 5:6], skip_special_tokens=True)
    for (_, response), begin in zip(seen[1], [text for text in first for _ in range(3)]):
        assert response.startswith(begin)
        assert len(response.split()) <= 2
    own = args(reward, k=2, tokenizer=tokenizer, prompts=["one", "two", "three"])
    seen.clear()
    decode(door, base, own, max_new_tokens=1, num_beams=2)
    assert [prompt for prompt, _ in seen[0]] == ["one"] * 4 + ["two"] * 4 + ["three"] * 4


def test_score_of_args_is_the_formula(tokenizer):
    """log π_base + w Σ α_i R_i on the k best, −inf elsewhere, with a preference for each row."""
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    rewards = {"sevens": SequenceReward(count_sevens), "longest": TextReward(longest_word, tokenizer)}
    step = Step(scores, tokens=PROMPTS, mask=MASK, prompt_length=3)
    formula = args(rewards, ROWS, weight=3.0, k=5)
    found = formula(step)
    for row in range(3):
        best = scores[row].topk(5).indices.tolist()
        for token in range(64):
            if token not in best:
                assert found[row, token] == -torch.inf
                continue
            text = torch.cat([PROMPTS[row, 3:], torch.tensor([token])])
            sevens = float(((PROMPTS[row] == 7) * MASK[row]).sum() + (token == 7))
            longest = longest_word([""], [tokenizer.decode(text, skip_special_tokens=True)])[0]
            expected = torch.log_softmax(scores, -1)[row, token] + 3 * (ROWS[row, 0] * sevens + ROWS[row, 1] * longest)
            torch.testing.assert_close(found[row, token], expected)
    torch.testing.assert_close(guided_logits(formula, step), torch.log_softmax(found, -1))


@every_door
def test_a_classifier_reads_each_prefix_once(door):
    """The first step finds out that branches are texts; then each new token and four candidates are one forward."""
    models = Models.make()
    fed = fed_tokens(models.judge)
    decode(door, models.base, args(models.judge, k=4), max_new_tokens=6)
    assert fed == [5, 1, 3, 1] + [1 + 4] * 5


@every_door
def test_objectives_share_their_rollouts(door):
    models = Models.make()
    fed = fed_tokens(models.first)
    rewards = {"one": ClassifierReward(models.judge), "two": ClassifierReward(models.judge, label=1)}
    formula = transfer_q(rewards, models.first, [0.5, 0.5], k=3, rollout_tokens=4)
    decode(door, models.base, formula, max_new_tokens=2)
    assert fed == [5] + [1] * 4 + [1] + [1] * 4  # each step: what is new of the text, and four tokens of rollouts
    assert repr(formula).count("RolloutReward(ClassifierReward, k=3)") == 2


@every_door
@pytest.mark.parametrize("name", ["LFM2", "Qwen3.5", "Gemma-3", "Llama", "GPT-2", "OPT", "BLOOM", "Mixtral"])
def test_a_policy_of_another_architecture_decodes_on(name, door):
    """Rows of any cache are repeated; the rollouts are those of whole texts."""
    policy, seen = tiny(name), []

    def reward(ids, mask):
        seen.append([row[keep.bool()].tolist() for row, keep in zip(ids, mask)])
        return count_sevens(ids, mask)

    decode(door, tiny_llama(0), transfer_q(SequenceReward(reward), policy, k=2, rollout_tokens=3), max_new_tokens=3)
    assert len(seen) == 3
    for texts in seen:
        for text in texts:
            started = torch.tensor([text[:-3]])
            expected = policy.generate(
                started, attention_mask=torch.ones_like(started), max_new_tokens=3, do_sample=False
            )
            assert expected[0].tolist() == text


POLICIES = {
    "the base model": lambda arm, base: base,
    "the ARM's model": lambda arm, base: arm.get_base_model(),
    "the ARM": lambda arm, base: arm,
}


@every_door
@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
@pytest.mark.parametrize("adapter", ["PBLoRA", "LoRA"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_decodes_without_the_adapters_that_guide(name, adapter, on_base, door, tokenizer):
    """Where it is the model below them, into which PEFT has put them, and not the `PeftModel`: as a twin would."""

    def found(twin):
        arm = tiny_arm(tiny_llama(0)) if adapter == "PBLoRA" else lora_model("arm")
        base = arm.get_base_model() if on_base else tiny_llama(3)
        policy, seen = POLICIES[name](arm, base), []
        if twin:
            policy = tiny_llama(3 if name == "the base model" and not on_base else 0)
            if name == "the ARM":
                policy = tiny_arm(policy) if adapter == "PBLoRA" else lora_model("arm")

        def reward(prompts, responses):
            seen.append(list(responses))
            return [float(sum(map(ord, response)) % 23) for response in responses]

        formula = args(reward, k=3, weight=0.5, tokenizer=tokenizer, rollout=Rollout(policy, 4)) + LM(arm)
        return decode(door, base, formula, max_new_tokens=4), seen

    (text, seen), (expected, asked) = found(False), found(True)
    assert seen == asked
    assert torch.equal(text, expected)


def test_an_adapter_of_the_base_model_s_own_acts_in_a_policy_that_is_the_base_model(tokenizer):
    model = lora_model("tuned", "arm")
    model.base_model.set_adapter(["tuned", "arm"])
    merged = lora_model("tuned", "arm")
    merged.set_adapter("tuned")
    merged, seen = merged.merge_and_unload(), []

    def reward(prompts, responses):
        seen.append(list(responses))
        return [float(len(response)) for response in responses]

    texts = []
    for policy in (model.get_base_model(), merged):
        formula = args(reward, k=2, tokenizer=tokenizer, rollout=Rollout(policy, 4)) + LM(model, adapter_name="arm")
        texts.append(decode("model", model.get_base_model(), formula, max_new_tokens=3))
    assert seen[:3] == seen[3:]
    assert torch.equal(*texts)


def test_positions_of_a_text_are_judged_as_the_texts_up_to_them_are(tokenizer):
    """Outside of `generate`: each text is the prompt, and a candidate the response."""
    seen = []

    def reward(prompts, responses):
        seen.append((prompts[0], list(responses)))
        return longest_word(prompts, responses)

    guided = ARGS(tiny_llama(0), reward, weight=0.1, k=3, tokenizer=tokenizer)
    whole, asked = guided(input_ids=PROMPTS[1:2]).logits, list(seen)
    seen.clear()
    for n in range(1, 6):
        alone = guided(input_ids=PROMPTS[1:2, :n]).logits[:, -1:]
        assert seen[-1] == asked[n - 1] == (tokenizer.decode(PROMPTS[1, :n], skip_special_tokens=True), seen[-1][1])
        assert all(seen[-1][1])
        torch.testing.assert_close(whole[:, n - 1 : n], alone)


@pytest.mark.parametrize("given", [False, True], ids=["not given", "given"])
def test_a_text_that_goes_on_by_hand_has_the_prompt_that_it_began_with(given, tokenizer):
    """As `generate` writes it."""
    seen, ids = [], PROMPTS[1:2]

    def reward(prompts, responses):
        seen.append((list(prompts), list(responses)))
        return longest_word(prompts, responses)

    guided = ARGS(tiny_llama(0), reward, weight=0.1, k=3, tokenizer=tokenizer)
    expected = guided.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, eos_token_id=-1)
    asked, cache, text, new = list(seen), None, ids, ids
    seen.clear()
    for step in range(4):
        copied = {} if cache is None else cache_argument(guided.backbone, copy.deepcopy(cache))
        output = guided(input_ids=new, use_cache=True, **copied, **({"prompt_length": 5} if given else {}))
        cache, new = cache_in(output), output.logits[:, -1].argmax(-1, keepdim=True)
        assert seen[-1] == asked[step]
        text = torch.cat([text, new], 1)
    assert torch.equal(text, expected)


def test_a_cache_of_a_formula_without_rewards_has_no_text_for_one(tokenizer):
    base, ids = tiny_llama(0), PROMPTS[1:2]
    cache = cache_in(Guided(base, BASE)(input_ids=ids, use_cache=True))
    with pytest.raises(ValueError, match="was made without a scorer of texts"):
        Guided(base, args(tiny_judge(), k=2))(input_ids=ids[:, :1], **cache_argument(base, cache))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: args({}, []), ValueError, "`rewards` is empty"),
        (lambda: args(longest_word), ValueError, "reads texts, which need `tokenizer`"),
        (lambda: args(3.0), TypeError, "Give a function of prompts and responses"),
        (lambda: args(SequenceReward(count_sevens), k=0), ValueError, "`k` is 0"),
        (lambda: args(SequenceReward(count_sevens), weight=-1.0), ValueError, "`weight` is -1.0"),
        (
            lambda: args({"a": SequenceReward(count_sevens), "b": SequenceReward(count_sevens)}),
            ValueError,
            "`preference` is required for several rewards",
        ),
        (lambda: transfer_q(tiny_judge(), tiny_llama(), rollout_tokens=0), ValueError, "`tokens` is 0"),
        (lambda: ClassifierReward(tiny_judge(), label=2), ValueError, "has 2 outputs"),
    ],
)
def test_bad_searches(make, error, message):
    with pytest.raises(error, match=message):
        make()


@every_door
@pytest.mark.parametrize("values", [[1.0], [float("nan")] * 6], ids=["too few", "NaN"])
def test_a_reward_that_is_not_one_number_each(values, tokenizer, door):
    formula = args({"mine": lambda prompts, responses: values}, [1.0], k=2, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="The reward 'mine' returned .* must return one"):
        decode(door, tiny_llama(0), formula)


def test_a_reward_that_changes_its_arguments_or_fails(tokenizer):
    """It gets copies, as in an evaluation, and an error in it names it."""

    def changing(prompts, responses):
        values = [float(len(prompt)) for prompt in prompts]
        prompts.clear()
        responses.clear()
        return values

    texts = ["one", "three"]
    step = Step(torch.zeros(2, 64), tokens=PROMPTS[:2], mask=MASK[:2], prompt_length=3)
    for _ in range(2):
        found = TextReward(changing, tokenizer, texts)(step, torch.ones(2, 1, 1).long(), torch.ones(2, 1, 1).long())
        assert found.tolist() == [[3.0], [5.0]]

    def failing(prompts, responses):
        raise KeyError("mine")

    with pytest.raises(KeyError) as error:
        args({"humour": failing}, [1.0], k=1, tokenizer=tokenizer)(step)
    assert error.value.__notes__ == ["This is from the reward 'humour'."]


@every_door
def test_prompts_that_are_not_one_for_each_row(tokenizer, door):
    formula = args(longest_word, tokenizer=tokenizer, prompts=["one", "two"])
    with pytest.raises(
        ValueError, match="2 `prompts`, but the batch has 3 rows|given for 2 rows, but the batch has 3"
    ):
        decode(door, tiny_llama(0), formula)


def test_a_classifier_without_pad_token():
    judge = tiny_judge()
    judge.config.pad_token_id = None
    with pytest.raises(ValueError, match="config has no pad token"):
        args(judge)


def test_a_processor_knows_where_the_prompt_ends(tokenizer):
    """A call that begins anew has another prompt; one whose prompts are given has those."""
    seen = []

    def reward(prompts, responses):
        seen.append((prompts[0], responses[0]))
        return [0.0] * len(responses)

    scores = torch.zeros(1, 64)
    processor = ARGSLogitsProcessor(reward, k=1, tokenizer=tokenizer)
    for ids in ([[7, 8]], [[7, 8, 9]], [[20, 21]]):
        processor(torch.tensor(ids), scores)
    for prompt in (Prompt({"attention_mask": torch.ones(1, 1, dtype=torch.long)}), Prompt(length=1)):
        given = ARGSLogitsProcessor(reward, k=1, tokenizer=tokenizer, prompt=prompt)
        given(torch.tensor([[7, 8, 9]]), scores)
    assert seen == [("w1w2", ""), ("w1w2", "w3"), ("w14w15", ""), ("w1", "w2w3"), ("w1", "w2w3")]


def test_where_the_prompt_ends_is_told_to_a_guided_model_too(tokenizer):
    seen = []

    def reward(prompts, responses):
        seen.append((prompts[0], responses[0][:4]))
        return [0.0] * len(responses)

    guided, ids = ARGS(tiny_llama(0), reward, k=1, tokenizer=tokenizer), torch.tensor([[7, 8, 9]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1}
    guided.generate(ids, **settings, **Prompt(length=1).arguments)
    guided.generate(ids, **settings, **Prompt({"input_ids": ids}).arguments)
    assert [prompt for prompt, _ in seen] == ["w1", "w1w2w3"]
    assert seen[0][1] == "w2w3"
