# SPDX-License-Identifier: Apache-2.0
"""From data sets in every format to batches."""

from itertools import islice

import pytest
import torch
from datasets import Dataset, IterableDataset
from pair_data import OBJECTIVES, ROLES, labelled, pairs, prepared

from trl_parm.training import tokenization
from trl_parm.training.data import JointPreferenceDataset, JointPreferenceStream, PreferenceCollator, pair_id
from trl_parm.training.tokenization import PairReader


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(tokenization.logger, "warning", found.append)
    return found


def as_messages(row: dict, *names: str) -> dict:
    roles = {**ROLES, "response_0": "assistant", "response_1": "assistant"}
    return {n: [{"role": roles[n], "content": v.strip()}] if n in names else v for n, v in row.items()}


@pytest.mark.parametrize("conversational", [False, True])
def test_ranked_pairs(tokenizer, conversational):
    row = prepared(pairs(1, conversational=conversational), "harmless", tokenizer)[0]
    prompt = "user w0 <eos> assistant" if conversational else "w0"
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == prompt.split()
    assert tokenizer.convert_ids_to_tokens(row["first_ids"]) == ["w0", "w1", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(row["second_ids"]) == ["w0", "w2", "<eos>"]
    assert row["labels"] == [0, 1]


def test_an_implicit_prompt_of_a_conversation(tokenizer):
    explicit = pairs(3, conversational=True)
    implicit = Dataset.from_list(
        [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in explicit]
    )
    assert prepared(implicit, "helpful", tokenizer)[:] == prepared(explicit, "helpful", tokenizer)[:]


def test_conversations_without_a_common_prompt_are_refused(tokenizer):
    user, answer = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    for chosen, rejected in (([user, answer], [user]), ([answer], [user])):
        with pytest.raises(ValueError, match="don't begin with the same prompt"):
            prepared(Dataset.from_list([{"chosen": chosen, "rejected": rejected}]), "helpful", tokenizer)


def test_an_implicit_prompt_of_plain_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="only in conversations; give a `prompt` column"):
        prepared(pairs(3).remove_columns("prompt"), "helpful", tokenizer)


@pytest.mark.parametrize("conversational", [False, True])
def test_labelled_pairs(tokenizer, conversational):
    values = [0, 1, -1, None, float("nan")]
    rows = [
        {**row, "helpful": value, "other": 7}
        for row, value in zip(labelled(5, harmless=lambda i: 0), values, strict=True)
    ]
    if conversational:
        rows = [as_messages(row, "prompt", "response_0", "response_1") for row in rows]
    found = prepared(Dataset.from_list(rows), "pairs", tokenizer)
    assert found["labels"][:] == [[1, 1], [-1, 1], [0, 1], [0, 1], [0, 1]]
    ranked = prepared(pairs(5, conversational=conversational), "helpful", tokenizer)
    for column in ("prompt_ids", "first_ids", "second_ids"):
        assert found[column][:] == ranked[column][:]


def test_labels_in_columns_of_other_names(tokenizer):
    rows = labelled(4).rename_columns({"helpful": "better_response_id", "harmless": "safer_response_id"})
    names = {"helpful": "better_response_id", "harmless": "safer_response_id"}
    assert prepared(rows, "pku", tokenizer, label_columns=names)["labels"][:] == [[1, -1], [-1, 1]] * 2


def test_token_ids_are_taken_as_they_are(tokenizer):
    ids = {"prompt_ids": [[5, 6]], "chosen_ids": [[7, 1]], "rejected_ids": [[8, 9, 1]]}
    assert prepared(Dataset.from_dict(ids), "helpful", tokenizer)[0] == {
        "prompt_ids": [5, 6], "first_ids": [7, 1], "second_ids": [8, 9, 1], "labels": [1, 0],
    }  # fmt: skip
    ids = {"prompt_ids": [[5, 6]], "response_0_ids": [[7, 1]], "response_1_ids": [[8, 9, 1]], "harmless": [1]}
    assert prepared(Dataset.from_dict(ids), "any", tokenizer)[0]["labels"] == [0, -1]


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("tools", [[{"name": "w1"}], '[{"name": "w1"}]'])
def test_template_arguments_and_tools_of_a_row(tokenizer, tools, implicit):
    tokenizer.chat_template = (
        "{% if loud %}w9 {% endif %}{% if tools %}{{ tools[0].name }} {% endif %}" + tokenizer.chat_template
    )
    row = {**pairs(1, conversational=True)[0], "chat_template_kwargs": {"loud": True}, "tools": tools}
    if implicit:
        prompt = row.pop("prompt")
        row |= {name: prompt + row[name] for name in ("chosen", "rejected")}
    found = prepared(Dataset.from_list([row]), "helpful", tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(found["prompt_ids"])[:3] == ["w9", "w1", "user"]


def test_too_long_pairs_are_left_out_and_counted(tokenizer, lines):
    kept = prepared(pairs(6), "helpful", tokenizer, max_length=5)
    assert len(kept) == 4
    assert lines == ["helpful: of 6 pairs 2 were left out, being longer than 5 tokens."]
    assert all(len(r["prompt_ids"] + r["first_ids"]) <= 5 for r in kept)


def test_prompts_can_be_cut_at_their_start_and_responses_never_are(tokenizer, lines):
    ids = {
        "prompt_ids": [[5, 6, 7, 8], [5, 6], [5]], "chosen_ids": [[9, 1], [9, 1], [9, 9, 9, 9, 1]],
        "rejected_ids": [[8, 9, 1], [8, 1], [8, 1]],
    }  # fmt: skip
    kept = prepared(Dataset.from_dict(ids), "helpful", tokenizer, max_length=5, cut_prompt=True)
    assert kept["prompt_ids"][:] == [[7, 8], [5, 6]]
    assert kept["first_ids"][:] == [[9, 1], [9, 1]]
    assert lines == [
        "helpful: of 3 pairs 1 lost the start of the prompt to fit into 5 tokens; 1 were left out, being longer than "
        "5 tokens."
    ]


def test_pairs_without_anything_to_learn_are_left_out_and_counted(tokenizer, lines):
    rows = list(labelled(4, helpful=lambda i: [0, 1, None, 1][i], harmless=lambda i: [1, 0, -1, 0][i]))
    rows[1]["response_1"] = rows[1]["response_0"]
    assert prepared(Dataset.from_list(rows), "mixed", tokenizer)["labels"][:] == [[1, -1], [-1, 1]]
    assert lines == [
        "mixed: of 4 pairs 1 were left out, since both responses are the same; 1 were left out, having no label for "
        "any objective."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("response_1"), r"lacks the columns \['response_1'\]"),
        (lambda d: d.remove_columns("prompt"), "no `prompt` in row 0 of the data set 'mixed', whose responses are"),
        (lambda d: d.remove_columns(["helpful", "harmless"]), "has no column with the labels of an objective"),
        (lambda d: d.select([]), "is empty. Give it at least one pair"),
        (
            lambda d: Dataset.from_list([{**row, "response_1": row["response_0"]} for row in d]),
            "No pair of the data set 'mixed' is left. mixed: of 3 pairs 3 were left out, since both responses",
        ),
        (lambda d: Dataset.from_list([{**row, "helpful": 2} for row in d]), "is 2, but it must be 0 or 1"),
    ],
)
def test_bad_data_is_refused(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        prepared(change(labelled(3)), "mixed", tokenizer)


def test_no_pair_is_left_when_all_are_too_long(tokenizer):
    with pytest.raises(ValueError, match="No pair of the data set 'helpful' is left.*longer than 2 tokens"):
        prepared(pairs(3), "helpful", tokenizer, max_length=2)


def test_short_data_sets_start_over(tokenizer):
    sets = [prepared(pairs(5), "helpful", tokenizer), prepared(pairs(2), "harmless", tokenizer)]
    joint = JointPreferenceDataset(sets)
    rows = [joint[i]["pairs"] for i in range(len(joint))]
    assert [[pair["pair_id"] for pair in row] for row in rows] == [
        [pair_id(0, i), pair_id(1, i % 2)] for i in range(5)
    ]
    assert all(pair["labels"] == [0, 1] for _, pair in rows)
    once = JointPreferenceDataset(sets, once=True)
    assert [once[i]["pairs"][1]["labels"] for i in range(5)] == [[0, 1]] * 2 + [[0, 0]] * 3
    assert joint.lengths() == [4, 5, 6, 5, 5]


def stream(n: int, offset: int = 0) -> IterableDataset:
    return pairs(n, offset).to_iterable_dataset()


def readers(tokenizer, max_length=None):
    columns = ["prompt", "chosen", "rejected"]
    return [PairReader(name, columns, OBJECTIVES, {}, tokenizer, max_length) for name in OBJECTIVES]


@pytest.mark.parametrize("second", [stream(2, 9), pairs(2, 9)])
def test_streams_are_zipped_like_data_sets(tokenizer, second):
    sources = list(zip(readers(tokenizer), (stream(5), second), strict=True))
    joint = JointPreferenceDataset(
        [prepared(pairs(5), "helpful", tokenizer), prepared(pairs(2, 9), "harmless", tokenizer)]
    )
    streamed = list(JointPreferenceStream(sources))
    assert streamed == [joint[i] for i in range(5)]


def test_a_stream_reports_what_it_left_out_once(tokenizer, lines):
    joint = JointPreferenceStream(list(zip(readers(tokenizer, 5), (stream(9), stream(3)), strict=True)))
    assert len(list(islice(iter(joint), 20))) == 6
    assert sorted(lines) == [
        "harmless: of 3 pairs 1 were left out, being longer than 5 tokens.",
        "helpful: of 9 pairs 3 were left out, being longer than 5 tokens.",
    ]


def test_an_empty_stream_is_refused(tokenizer):
    empty = pairs(1).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="'harmless' is empty"):
        next(iter(JointPreferenceStream(list(zip(readers(tokenizer), (stream(3), empty), strict=True)))))


def test_a_stream_shuffles_anew_each_epoch(tokenizer):
    shuffled = pairs(20).to_iterable_dataset().shuffle(seed=0, buffer_size=20)
    joint = JointPreferenceStream(list(zip(readers(tokenizer), (shuffled, shuffled), strict=True)))
    orders = []
    for epoch in (0, 0, 1):
        joint.set_epoch(epoch)
        orders.append([row["pairs"][0]["prompt_ids"] for row in joint])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def example(*pairs_: tuple) -> dict:
    names = ("prompt_ids", "first_ids", "second_ids", "labels", "pair_id")
    return {"pairs": [dict(zip(names, pair, strict=True)) for pair in pairs_]}


EXAMPLE = example(([5, 6], [7], [8, 9], [1, 0], 3), ([4], [3, 2], [3], [0, -1], 4))


def test_collator():
    batch = PreferenceCollator(pad_token_id=0)([EXAMPLE])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 0], [4, 3, 2, 0], [5, 6, 8, 9], [4, 3, 0, 0]],
        "segments": [[0, 0, 1, -1], [0, 1, 1, -1], [0, 0, 2, 2], [0, 2, -1, -1]],
        "pair_labels": [[1.0, 0.0], [0.0, -1.0]],
        "pair_ids": [3, 4],
    }


def test_collator_with_shared_prompts_and_rounded_lengths():
    batch = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=4, share_prompt=True)([EXAMPLE])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 2, 3, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 1, 2, 2, -1, -1, -1], [0, 1, 1, 2, -1, -1, -1, -1]]


def test_collator_keeps_the_pairs_of_a_row_together():
    batch = PreferenceCollator(pad_token_id=0)([EXAMPLE, example(([9], [9], [8], [1, 1], 5))])
    assert batch["pair_ids"].tolist() == [3, 4, 5]
    assert batch["pair_labels"].dtype == torch.float32
