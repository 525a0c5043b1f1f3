# SPDX-License-Identifier: Apache-2.0
"""Rewards of whole texts as guides: functions of texts and of ids, classifiers, and their caches."""

import copy

import pytest
import torch
from conftest import tiny_llama
from test_decoders import MASK, PROMPTS, ROWS, Models, fed_tokens, generate, tiny_judge

from trl_parm import (
    ARGSLogitsProcessor,
    ClassifierReward,
    Prompt,
    SequenceReward,
    TextReward,
    TransferQLogitsProcessor,
)


def count_sevens(ids, mask):
    return ((ids == 7) * mask).sum(1).float()


def longest_word(prompts, responses):
    return [float(max((int(word[1:]) for word in r.split() if word[1:].isdigit()), default=0)) for r in responses]


def test_rewards_of_texts_get_the_prompt_and_the_response_of_each_candidate(tokenizer):
    models, seen = Models.make(), []

    def reward(prompts, responses):
        seen.append(list(zip(prompts, responses)))
        return longest_word(prompts, responses)

    processor = ARGSLogitsProcessor(reward, weight=0.5, k=3, tokenizer=tokenizer)
    output = generate(models, processor, max_new_tokens=2, return_dict_in_generate=False)
    texts = tokenizer.batch_decode(PROMPTS, skip_special_tokens=True)
    assert [len(call) for call in seen] == [9, 9]
    assert [prompt for prompt, _ in seen[0]] == [text for text in texts for _ in range(3)]
    first = tokenizer.batch_decode(output[:, 5:6], skip_special_tokens=True)
    for (_, response), begin in zip(seen[1], [text for text in first for _ in range(3)]):
        assert response.startswith(begin)
    own = ARGSLogitsProcessor(reward, k=2, tokenizer=tokenizer, prompts=["one", "two", "three"])
    seen.clear()
    generate(models, own, max_new_tokens=1, num_beams=2)
    assert [prompt for prompt, _ in seen[0]] == ["one"] * 4 + ["two"] * 4 + ["three"] * 4


def test_score_of_args_is_the_formula(tokenizer):
    """log π_base + w Σ α_i R_i on the k best, −inf elsewhere, with a preference for each row."""
    ids, scores = PROMPTS, torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    prompt = Prompt({"input_ids": PROMPTS[:, :3], "attention_mask": MASK[:, :3]})
    rewards = {"sevens": SequenceReward(count_sevens), "longest": TextReward(longest_word, tokenizer, prompt=prompt)}
    found = ARGSLogitsProcessor(rewards, ROWS, weight=3.0, k=5, prompt=prompt)(ids, scores)
    for row in range(3):
        best = scores[row].topk(5).indices.tolist()
        for token in range(64):
            if token not in best:
                assert found[row, token] == -torch.inf
                continue
            text = torch.cat([ids[row, 3:], torch.tensor([token])])
            sevens = float(((ids[row] == 7) * MASK[row]).sum() + (token == 7))
            longest = longest_word([""], [tokenizer.decode(text, skip_special_tokens=True)])[0]
            expected = torch.log_softmax(scores, -1)[row, token] + 3 * (ROWS[row, 0] * sevens + ROWS[row, 1] * longest)
            torch.testing.assert_close(found[row, token], expected)


def test_a_classifier_reads_each_prefix_once():
    models = Models.make()
    fed = fed_tokens(models.judge)
    generate(models, ARGSLogitsProcessor(models.judge, k=4), max_new_tokens=6)
    assert fed == [5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_objectives_share_their_rollouts():
    models = Models.make()
    fed = fed_tokens(models.first)
    rewards = {"one": ClassifierReward(models.judge), "two": ClassifierReward(models.judge, label=1)}
    processor = TransferQLogitsProcessor(rewards, models.first, [0.5, 0.5], k=3, rollout_tokens=4)
    generate(models, processor, max_new_tokens=2)
    assert fed[:5] == [5, 1, 1, 1, 1]
    assert len(fed) <= 10
    assert repr(processor).count("RolloutReward(ClassifierReward, k=3)") == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ARGSLogitsProcessor({}, []), ValueError, "`rewards` is empty"),
        (lambda: ARGSLogitsProcessor(longest_word), ValueError, "reads texts, which need `tokenizer`"),
        (lambda: ARGSLogitsProcessor(3.0), TypeError, "Give a function of prompts and responses"),
        (lambda: ARGSLogitsProcessor(SequenceReward(count_sevens), k=0), ValueError, "`k` is 0"),
        (lambda: ARGSLogitsProcessor(SequenceReward(count_sevens), weight=-1.0), ValueError, "`weight` is -1.0"),
        (
            lambda: ARGSLogitsProcessor({"a": SequenceReward(count_sevens), "b": SequenceReward(count_sevens)}),
            ValueError,
            "`preference` is required for several rewards",
        ),
        (lambda: TransferQLogitsProcessor(tiny_judge(), tiny_llama(), rollout_tokens=0), ValueError, "`tokens` is 0"),
        (lambda: ClassifierReward(tiny_judge(), label=2), ValueError, "has 2 outputs"),
    ],
)
def test_bad_searches(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("values", [[1.0], [float("nan")] * 6], ids=["too few", "NaN"])
def test_a_reward_that_is_not_one_number_each(values, tokenizer):
    processor = ARGSLogitsProcessor(lambda prompts, responses: values, k=2, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="it must return one finite number for each"):
        generate(Models.make(), processor)


def test_where_the_prompt_ends_must_be_known(tokenizer):
    processor = ARGSLogitsProcessor(longest_word, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="Where the prompts end is not known"):
        processor(PROMPTS, torch.zeros(3, 64))
    judge = copy.deepcopy(tiny_judge())
    judge.config.pad_token_id = None
    with pytest.raises(ValueError, match="config has no pad token"):
        ARGSLogitsProcessor(judge)
    others = ARGSLogitsProcessor(longest_word, tokenizer=tokenizer, prompts=["one", "two"])
    with pytest.raises(ValueError, match="There are 2 `prompts`, but the batch has 3 rows"):
        generate(Models.make(), others)
