# SPDX-License-Identifier: Apache-2.0
"""Rewards of whole texts as guides: functions of texts and of ids, classifiers, rollouts, and their caches."""

import pytest
import torch
from conftest import tiny_llama
from decoding.architectures import tiny
from decoding.tables import DOORS, MASK, PROMPTS, ROWS, Models, fed_tokens, tiny_judge

from trl_parm import ClassifierReward, Guided, GuidedLogitsProcessor, Prompt, SequenceReward, TextReward
from trl_parm.algebra import Step, guided_logits
from trl_parm.decoding import ARGSLogitsProcessor, args, transfer_q


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
    given = ARGSLogitsProcessor(
        reward, k=1, tokenizer=tokenizer, prompt=Prompt({"attention_mask": torch.ones(1, 1, dtype=torch.long)})
    )
    given(torch.tensor([[7, 8, 9]]), scores)
    assert seen == [("w1w2", ""), ("w1w2", "w3"), ("w14w15", ""), ("w1", "w2w3")]
