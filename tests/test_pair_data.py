# SPDX-License-Identifier: Apache-2.0
"""From data sets in every format to batches."""

import json
from itertools import islice

import pytest
import torch
from byte_tokenizers import CHATML, chatml, sentences
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset, IterableDataset
from pair_data import OBJECTIVES, ROLES, labelled, pairs, prepared
from pyarrow import ArrowInvalid
from tokenizers.processors import TemplateProcessing
from training_runs import trainer

from trl_parm import token_rewards
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.training import tokenization
from trl_parm.training.config import ARMArguments, PairData
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


@pytest.mark.parametrize("append", [False, True])
def test_ids_of_several_turns_end_after_the_last_of_them(tokenizer, lines, append):
    """`<pad>` is what a template writes after an end token, w7 is another turn's."""
    ids = {"prompt_ids": [[5]], "chosen_ids": [[6, 1, 7]], "rejected_ids": [[8, 1, 0]]}
    found = prepared(Dataset.from_dict(ids), "helpful", tokenizer, append_end_token=append)[0]
    assert (found["first_ids"], found["second_ids"]) == ([6, 1, 7, 1] if append else [6, 1, 7], [8, 1, 0])
    assert lines == ([] if append else [ENDLESS])


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.jsonl", "", "is empty. Give it at least one pair"),
        ("pairs.jsonl", " \n\n", "is empty. Give it at least one pair"),
        ("pairs.csv", "", "is empty. Give it at least one pair"),
        ("pairs.jsonl", '{"prompt": "w1"}\n\nxx{"\n{}\n', "Line 3 of .*pairs.jsonl' is no JSON object: 'xx{"),
        ("pairs.jsonl", '{"prompt": "w1"}\n{"prompt": "w', "Line 2 of .* is no JSON object"),
        ("pairs.jsonl", '{"prompt": "\udce9"}\n{"prompt": "w1"}\n', "Line 1 of .* is no text in UTF-8"),
        ("pairs.jsonl", '{"prompt": "w1"}\n3\n', "Line 2 of .* is no JSON object: '3'"),
        ("pairs.parquet", "w1 w2", "pairs.parquet' can't be read: .*Give a whole parquet file"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, name, text, message, streaming):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        PairData(str(tmp_path / name), streaming=streaming).load()


@pytest.mark.parametrize("streaming", [False, True])
def test_only_an_empty_cell_of_a_table_is_missing(tmp_path, streaming):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,response_0,response_1,x,y\nw1,NA,null,1,0\nw2,None,N/A,,1\nw3,nan,"",-1,""\n')
    rows = list(PairData(str(path), streaming=streaming).load())
    assert [row["response_0"] for row in rows] == ["NA", "None", "nan"]
    assert [row["response_1"] for row in rows] == ["null", "N/A", None]
    assert [row["x"] for row in rows] == [1, None, -1]
    assert [row["y"] for row in rows] == [0, 1, None]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_takes_the_place_of_one_that_is_there(tmp_path, streaming):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "w1", "question": "w2", "chosen": "w3", "rejected": "w4"}\n')
    (row,) = PairData(str(path), columns={"question": "prompt"}, streaming=streaming).load()
    assert row == {"prompt": "w2", "chosen": "w3", "rejected": "w4"}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_of_a_folder_depends_on_what_it_is_for(tmp_path, streaming):
    for split, prompt in (("train", "w1"), ("test", "w2")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": prompt, "chosen": "w3", "rejected": "w4"}))

    def prompts(default: str, **more) -> list[str]:
        entry = PairData(**{"path": str(tmp_path), "streaming": streaming, **more})
        (data,) = ARMArguments("").load([entry], default).values()
        return [row["prompt"] for row in data]

    assert prompts("train") == ["w1"]
    assert prompts("test") == ["w2"]
    assert prompts("test", split="train") == ["w1"]
    assert prompts("test", path=str(tmp_path / "train.jsonl")) == ["w1"]
    (tmp_path / "test.jsonl").rename(tmp_path / "validation.jsonl")
    with pytest.raises(ValueError, match=rf"'train', 'validation'\]. Name one of '{tmp_path}' as its `split`"):
        prompts("test")


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name(path):
    with pytest.raises(ValueError, match="names none. Give a file"):
        PairData(path).load()


def test_damage_that_a_stream_meets_on_its_way_names_the_data_set(tokenizer):
    def rows():
        yield from pairs(2)
        raise ArrowInvalid("JSON parse error: Invalid value. in row 2")

    broken = IterableDataset.from_generator(rows)
    joint = JointPreferenceStream([(readers(tokenizer)[0], broken)])
    with pytest.raises(ValueError, match="'helpful' can't be read to its end: .*in row 2"):
        list(joint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_ids": [5, 64]}, "token id 64 in row 1 of the data set 'helpful' .* embeddings for 64 tokens"),
        ({"prompt_ids": [-1]}, "token id -1 in row 1"),
        ({"rejected_ids": None}, "`rejected_ids` of row 1 of .* is None, but it must be a list of token ids"),
        ({"chosen_ids": ["w1"]}, "`chosen_ids` of row 1 .* must be a list of token ids"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(tokenizer, change, message):
    good = {"prompt_ids": [5], "chosen_ids": [6, 1], "rejected_ids": [7, 1]}
    reader = PairReader("helpful", list(good), OBJECTIVES, {}, tokenizer, vocabulary=64)
    assert reader(good)["outcomes"] == []
    with pytest.raises(ValueError, match=message):
        reader({**good, **change}, 1)


@pytest.mark.parametrize("changed", ["tokenization", "shapes", "templates", "texts", "transformers", "trl", None])
def test_pairs_that_other_code_has_read_are_not_taken_from_the_cache(tokenizer, tmp_path, monkeypatch, changed):
    pairs(3).save_to_disk(str(tmp_path))
    before = prepared(Dataset.load_from_disk(str(tmp_path)), "helpful", tokenizer)
    monkeypatch.setattr(PairReader, "_of_text", lambda self, text: [5] * len(text))
    if changed in ("transformers", "trl"):
        monkeypatch.setattr(f"{changed}.__version__", "0")
    elif changed:
        getsource = tokenization.inspect.getsource
        monkeypatch.setattr(
            tokenization.inspect, "getsource", lambda m: getsource(m) + "#" * m.__name__.endswith(changed)
        )
    after = prepared(Dataset.load_from_disk(str(tmp_path)), "helpful", tokenizer)
    assert (after[:] == before[:]) == (changed is None)


BETWEEN = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} "
    "{% if m['role'] == 'assistant' and not loop.last %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROLE = (
    "{% for m in messages %}{{ '<eos>' if m['role'] == 'user' else '.' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}. {% endif %}"
)
ENDLESS = (
    "helpful: of 1 pairs 1 have a response without end token, so that its end is not learned; "
    "`append_end_token=True` appends it."
)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("template", "prompt", "first", "second"),
    [
        (BETWEEN, "user w0 assistant w9 <eos> user w8 assistant", "w1", "w2"),
        (ROLE, "<eos> w0 . w9 <eos> w8 .", "w1", "w2"),
    ],
)
def test_end_tokens_of_the_prompt_cut_nothing_and_a_missing_one_is_said(
    tokenizer, lines, append, template, prompt, first, second
):
    tokenizer.chat_template = template
    user, answer = ({"role": role, "content": "{}"} for role in ("user", "assistant"))
    turns = [{**user, "content": "w0"}, {**answer, "content": "w9"}, {**user, "content": "w8"}]
    row = {"prompt": turns, "chosen": [{**answer, "content": "w1"}], "rejected": [{**answer, "content": "w2"}]}
    found = prepared(Dataset.from_list([row]), "helpful", tokenizer, append_end_token=append)[0]
    end = " <eos>" if append else ""
    texts = [" ".join(tokenizer.convert_ids_to_tokens(found[c])) for c in ("prompt_ids", "first_ids", "second_ids")]
    assert texts == [prompt, first + end, second + end]
    assert lines == ([] if append else [ENDLESS])


def test_only_the_end_after_the_last_turn_cuts_a_response(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template + "{% if not add_generation_prompt %}<pad> {% endif %}"
    user, answer = {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}
    row = {"prompt": [user], "chosen": [answer, user, answer], "rejected": [answer]}
    found = prepared(Dataset.from_list([row]), "helpful", tokenizer)[0]
    texts = [" ".join(tokenizer.convert_ids_to_tokens(found[c])) for c in ("first_ids", "second_ids")]
    assert texts == ["w5 <eos> user w4 <eos> assistant w5 <eos>", "w5 <eos>"]


def appending_tokenizer():
    """A tokenizer that appends an end token to every text by itself."""
    found = tiny_tokenizer()
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", found.eos_token_id)]
    )
    return found


def test_tokenizers_that_append_an_end_token(tokenizer, lines):
    appending = appending_tokenizer()
    assert appending("w1")["input_ids"][-1] == appending.eos_token_id
    for conversational in (False, True):
        data = pairs(4, conversational=conversational)
        assert prepared(data, "helpful", appending)[:] == prepared(data, "helpful", tokenizer)[:]
    assert not lines
    for chat_template in (tokenizer.chat_template, None):
        appending.chat_template = tokenizer.chat_template = chat_template
        prompts = ["w1 w2", "w3", "w4 <eos>"]
        ours, theirs = (encode_prompts(t, prompts).data for t in (appending, tokenizer))
        assert {name: tensor.tolist() for name, tensor in ours.items()} == {
            name: tensor.tolist() for name, tensor in theirs.items()
        }
    arm = tiny_llama()
    ours, theirs = (token_rewards(arm, t, "w1 w2", "w3", reference=arm).to_dicts() for t in (appending, tokenizer))
    assert ours == theirs


@pytest.mark.parametrize("make", [chatml, sentences])
@pytest.mark.parametrize("conversational", [False, True])
def test_token_rewards_are_of_the_tokens_that_training_reads(make, conversational):
    """A response has no space before it that a tokenizer puts before a text."""
    tokenizer, row = make(), {"prompt": "How is it?\n", "chosen": "It's fine.", "rejected": "no"}
    tokenizer.chat_template = CHATML.replace("<|im_end|>", tokenizer.eos_token) if conversational else None
    row = as_messages(row, *(row if conversational else ()))
    read = prepared(Dataset.from_list([row]), "helpful", tokenizer)[0]
    assert read["first_ids"].pop() == tokenizer.eos_token_id
    arm = tiny_llama(vocab_size=len(tokenizer))
    for prompt in (row["prompt"], read["prompt_ids"]):
        for response in (row["chosen"], read["first_ids"]):
            found = token_rewards(arm, tokenizer, prompt, response, reference=tiny_llama(3, vocab_size=len(tokenizer)))
            assert [token.token_id for token in found] == read["first_ids"]
            assert found.total.text == "It's fine."


def test_a_prompt_whose_end_changes_before_a_response_is_said(tokenizer, lines):
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant '", "'assistant w33 '")  # an empty thought
    found = prepared(pairs(2, conversational=True), "helpful", tokenizer)
    assert tokenizer.convert_ids_to_tokens(found[0]["prompt_ids"])[-1] == "assistant"
    assert "2 lost the end of the prompt, which the tokenizer or its template writes otherwise" in lines[0]


def test_texts_that_repeat_their_prompt_are_said(tokenizer, lines):
    row = {"prompt": "w1 w2", "chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}
    assert len(prepared(Dataset.from_list([row]), "helpful", tokenizer)) == 1
    assert "1 have responses that begin with their prompt, and were read as they are" in lines[0]


def weighed(weights, tokenizer):
    data = pairs(len(weights)).add_column("w", weights)
    reader = PairReader("helpful", data.column_names, OBJECTIVES, {}, tokenizer, weight_column="w")
    return reader.read(data)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e39, None])
def test_weights_that_are_none_are_refused(tokenizer, weight):
    assert weighed([1.0, 0.0], tokenizer)["weight"][:] == [1.0, 0.0]
    with pytest.raises(ValueError, match="The weight in column 'w' of row 1 of .* must be a number, 0 or larger"):
        weighed([1.0, weight], tokenizer)


def test_weights_that_are_all_zero_or_missing_are_refused(tokenizer):
    with pytest.raises(ValueError, match="All weights in column 'w' of the data set 'helpful' are 0"):
        weighed([0.0, 0.0], tokenizer)
    data = pairs(2).add_column("w", [0.0, 1e-50]).to_iterable_dataset()
    reader = PairReader("helpful", ["prompt", "chosen", "rejected", "w"], OBJECTIVES, {}, tokenizer, weight_column="w")
    with pytest.raises(ValueError, match="All weights in column 'w'"):
        list(islice(JointPreferenceStream([(reader, data)]), 3))
    with pytest.raises(ValueError, match="lacks the `weight_column` 'w'; it has .* where all pairs count alike"):
        PairReader("helpful", ["prompt", "chosen", "rejected"], OBJECTIVES, {}, tokenizer, weight_column="w")


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
    streamed = list(islice(JointPreferenceStream(sources), 12))
    assert streamed[:5] == [joint[i] for i in range(5)]
    numbers = [[pair["pair_id"] for pair in row["pairs"]] for row in streamed]
    assert numbers == [[pair_id(0, i % 5), pair_id(1, i % 2)] for i in range(12)]


def test_a_stream_reports_what_it_left_out_once(tokenizer, lines):
    joint = JointPreferenceStream(list(zip(readers(tokenizer, 5), (stream(9), stream(3)), strict=True)))
    rows = list(islice(joint, 20))
    assert [row["pairs"][0]["pair_id"] for row in rows] == [i % 6 for i in range(20)]
    assert sorted(lines) == [
        "harmless: of 3 pairs 1 were left out, being longer than 5 tokens.",
        "helpful: of 9 pairs 3 were left out, being longer than 5 tokens.",
    ]


@pytest.mark.parametrize("first", [1, 200])
def test_labels_that_a_stream_begins_without_count(tmp_path, tokenizer, first):
    rows = [{**row} for row in labelled(first + 2, helpful=lambda i: 0, harmless=lambda i: 0)]
    for row in rows[:first]:
        del row["harmless"]
    data = {"judged": IterableDataset.from_generator(lambda: iter(rows)), "harmless": pairs(2)}
    run = trainer(tmp_path, tokenizer, data=data, evaluation=data)
    for joined in (run.train_dataset, run.eval_dataset):
        labels = [row["pairs"][0]["labels"] for row in islice(joined, first + 2)]
        assert labels == [[1, 0]] * first + [[1, 1]] * 2


def test_an_empty_stream_is_refused(tokenizer):
    empty = pairs(1).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="'harmless' is empty"):
        next(iter(JointPreferenceStream(list(zip(readers(tokenizer), (stream(3), empty), strict=True)))))


def test_a_stream_shuffles_anew_in_each_pass(tokenizer):
    shuffled = pairs(20).to_iterable_dataset().shuffle(seed=0, buffer_size=20)
    joint = JointPreferenceStream(list(zip(readers(tokenizer), (shuffled, shuffled), strict=True)))
    first, again = ([row["pairs"][0]["prompt_ids"] for row in islice(joint, 40)] for _ in range(2))
    assert first == again
    assert first[:20] != first[20:]
    assert sorted(first[:20]) == sorted(first[20:])


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
