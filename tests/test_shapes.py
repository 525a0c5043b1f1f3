# SPDX-License-Identifier: Apache-2.0
"""Every shape of a row, as the trainer, relabelling, evaluation and token rewards read it: alike, or refused alike."""

import json
from itertools import islice

import pytest
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from datasets import IterableDataset
from pair_data import naive_log_probs
from training_runs import LORA, trainer

from trl_parm import token_rewards
from trl_parm.cli.common import load_data
from trl_parm.cli.generate import DecodingArguments
from trl_parm.evaluation import Run, sweep
from trl_parm.evaluation.decoding import encode_prompts
from trl_parm.relabel import relabel
from trl_parm.rewards import brevity
from trl_parm.shapes import read_text
from trl_parm.training.tokenization import PairReader


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def part(text):
    return {"type": "text", "text": text}


SYSTEM = {"role": "system", "content": "w9"}
PROMPT = [answer("w7"), user("w8")]
CHAT = ("user w1 <eos> assistant", "w2 <eos>", "w3 <eos>")
SHAPES = {
    "texts": ({"prompt": "w1", "chosen": " w2", "rejected": " w3"}, ("w1", "w2 <eos>", "w3 <eos>")),
    "messages": ({"prompt": [user("w1")], "chosen": [answer("w2")], "rejected": [answer("w3")]}, CHAT),
    "no prompt": ({"chosen": [user("w1"), answer("w2")], "rejected": [user("w1"), answer("w3")]}, CHAT),
    "a text that conversations repeat": (
        {"prompt": "w1", "chosen": [user("w1"), answer("w2")], "rejected": [user("w1"), answer("w3")]}, CHAT,
    ),
    "messages that conversations repeat": (
        {"prompt": [user("w1")], "chosen": [user("w1"), answer("w2")], "rejected": [user("w1"), answer("w3")]}, CHAT,
    ),
    "messages that conversations repeat after a system's": (
        {"prompt": [user("w1")], "chosen": [SYSTEM, user("w1"), answer("w2")],
         "rejected": [SYSTEM, user("w1"), answer("w3")]},
        ("<unk> w9 <eos> user w1 <eos> assistant", *CHAT[1:]),
    ),
    "messages and texts": ({"prompt": [user("w1")], "chosen": "w2", "rejected": "w3"}, CHAT),
    "a text and messages": ({"prompt": "w1", "chosen": [answer("w2")], "rejected": [answer("w3")]}, CHAT),
    "one response of messages": ({"prompt": [user("w1")], "chosen": "w2", "rejected": [answer("w3")]}, CHAT),
    "parts": (
        {"prompt": [user([part("w1")])], "chosen": [answer([part("w"), part("2")])],
         "rejected": [answer([part("w3")])]},
        CHAT,
    ),
    "nulls": (
        {"prompt": [user("w1", name=None)], "chosen": [answer("w2", tool_calls=None)], "rejected": [answer("w3")],
         "images": None, "tools": None, "chat_template_kwargs": {"loud": None}},
        CHAT,
    ),
    "a response of turns": (
        {"prompt": [user("w1")], "chosen": [answer("w2"), user("w4"), answer("w5")], "rejected": [answer("w3")]},
        (CHAT[0], "w2 <eos> user w4 <eos> assistant w5 <eos>", "w3 <eos>"),
    ),
}  # fmt: skip


def write(folder, rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(tokenizer, pair):
    names = ("prompt_ids", "first_ids", "second_ids")
    return tuple(" ".join(tokenizer.convert_ids_to_tokens(pair[name])) for name in names)


def trained_on(path, folder, tokenizer):
    """What the trainer makes of a file's pairs."""
    run = trainer(folder / "arm", tokenizer, data={"helpful": path}, peft_config=LORA)
    return [words(tokenizer, row["pairs"][0]) for row in run.train_dataset]


def relabelled(path, folder, tokenizer):
    """What training reads of relabelled pairs."""
    rows = relabel(load_data(path), {"short": lambda prompts, texts: range(len(texts))}, folder / "labels", 0)["train"]
    names = {"short": "short"}
    found = PairReader("labels", rows.column_names, ["short"], names, tokenizer).read(rows)
    return [words(tokenizer, pair) for pair in found]


@pytest.mark.parametrize("read", [trained_on, relabelled])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_of_every_shape(tmp_path, tokenizer, shape, read):
    row, expected = SHAPES[shape]
    assert read(write(tmp_path, [row, row]), tmp_path, tokenizer) == [expected, expected]


@pytest.mark.parametrize("read", [trained_on, relabelled])
def test_rows_of_mixed_shapes(tmp_path, tokenizer, read):
    rows, expected = zip(*SHAPES.values(), strict=True)
    assert read(write(tmp_path, rows), tmp_path, tokenizer) == list(expected)


@pytest.mark.parametrize("shape", [name for name, (row, _) in SHAPES.items() if "prompt" in row])
def test_prompts_of_every_shape(tokenizer, shape):
    row, (prompt, response, _) = SHAPES[shape]
    ids = encode_prompts(tokenizer, [row["prompt"]])["input_ids"][0]
    if "<unk>" not in prompt:  # which stands in the responses alone
        assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == CHAT[0]
    if isinstance(row["prompt"], str) or len(response.split()) > 2 or "<unk>" in prompt or "repeat" in shape:
        return
    arm = tiny_llama()
    found = token_rewards(arm, tokenizer, row["prompt"], row["chosen"], reference=arm).total.reward
    response_ids = tokenizer(response.removesuffix(" <eos>"))["input_ids"]
    assert found == pytest.approx(naive_log_probs(arm, ids.tolist(), response_ids), abs=1e-4)


NO_TEXT = {
    "a number": (3, "is 3. Give a text, or a list of messages"),
    "no messages": ([], r"is \[\]. Give a text, or a list of messages"),
    "texts": (["w1", "w2"], "Give a text, or a list of messages"),
    "no role": ([{"from": "human", "value": "w1"}], "has the message {'from': 'human', 'value': 'w1'}. Give"),
    "a message without content": ([{"role": "user"}], "has the message {'role': 'user'}. Give a text"),
    "a content that is a number": ([user(3)], "has a message whose content is 3. Give a text"),
    "an image": ([user([{"type": "image", "url": "1.png"}, part("w1")])], "has a content part that is no text"),
}


def evaluated(prompts, folder):
    sweep(tiny_llama(), tiny_tokenizer(), prompts, [Run("base")], {"short": brevity}, max_new_tokens=1)


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_what_is_no_text_is_refused_alike_everywhere(tmp_path, tokenizer, column, kind):
    value, message = NO_TEXT[kind]
    good = {"prompt": [user("w1")], "chosen": [answer("w2")], "rejected": [answer("w3")]}
    path = write(tmp_path, [good, {**good, column: value}])
    with pytest.raises(ValueError, match=f"^`{column}` of row 1 of the data set 'helpful' .*{message}"):
        trained_on(path, tmp_path, tokenizer)
    with pytest.raises(ValueError, match=f"^`{column}` of row 1 of the pairs .*{message}"):
        relabelled(path, tmp_path, tokenizer)
    if column == "prompt":
        with pytest.raises(ValueError, match=f"^row 1 of `prompts` .*{message}"):
            evaluated([good["prompt"], value], tmp_path)
    texts = (value, "w2") if column == "prompt" else ("w1", value)
    with pytest.raises(ValueError, match=f"^`{'prompt' if column == 'prompt' else 'response'}` .*{message}"):
        token_rewards(tiny_arm(), tokenizer, *texts)
    assert not any(folder.exists() for folder in (tmp_path / "arm", tmp_path / "labels"))


ONE = {"prompt": [user("w1")], "chosen": [answer("w2")], "rejected": [answer("w3")]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "`chosen` of row 1 of .* is None. Give a text, .*, or leave the row out"),
        ({"images": ["1.png"]}, "`images` of row 1 of .* has what is no text"),
        ({"prompt": None, "chosen": "w2", "rejected": "w3"}, "no `prompt` in row 1 of .*; give a `prompt` column"),
        ({"chosen": [user("w1"), answer("w2")]}, "row 1 of .* not both begin with the `prompt`"),
        ({"chosen": [user("w4"), answer("w2")], "rejected": [user("w4"), answer("w3")]}, "not both begin with"),
        ({"prompt": None, "chosen": [user("w1")]}, "in row 1 of .* don't begin with the same prompt"),
    ],
)
def test_pairs_without_a_clear_meaning_are_refused_alike(tmp_path, tokenizer, change, message):
    path = write(tmp_path, [ONE, {**ONE, **change}])
    for read in (trained_on, relabelled):
        with pytest.raises(ValueError, match=message):
            read(path, tmp_path, tokenizer)
    assert not any(folder.exists() for folder in (tmp_path / "arm", tmp_path / "labels"))


CALLS = (
    "{% for m in messages %}{{ m.role }} {{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": 1, "b": None}, '{"a": 1}'),
        (None, "{}"),
        ({}, "{}"),
        ('{"a": 1}', '{"a": 1}'),
        ({"a": {"b": None}}, '{"a": {}}'),
    ],
)
def test_calls_of_tools_have_no_nulls(tokenizer, arguments, expected):
    call = {"type": "function", "function": {"name": "w5", "arguments": arguments}}
    messages = read_text([user("w1"), answer(None, tool_calls=[call])], "row 0")
    text = tokenizer.apply_chat_template(messages, chat_template=CALLS, tokenize=False)
    assert text == f"user w1 assistant w5 {expected} "


def test_calls_as_a_text_are_read():
    calls = [{"type": "function", "function": {"name": "w5", "arguments": {"a": 1}}}]
    assert read_text([answer("", tool_calls=json.dumps(calls))], "row 0") == [answer("", tool_calls=calls)]


@pytest.mark.parametrize("calls", ["w5", [None], ["w5"], [{"function": "w5"}], [{"arguments": {}}], {"name": "w5"}])
def test_calls_that_are_none_are_told(calls):
    with pytest.raises(ValueError, match="row 0 has a call of a tool that is .* `tool_calls` is a list of mappings"):
        read_text([answer("", tool_calls=calls)], "row 0")


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"tools": "w5"}, "`tools` of row 0 of the data set 'helpful' is 'w5', but it must be a list"),
        ({"tools": {"name": "w5"}}, "`tools` of row 0 .* must be a list"),
        ({"chat_template_kwargs": [1]}, r"`chat_template_kwargs` of row 0 .* is \[1\], but it must be a mapping"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "has add_generation_prompt, which is set here"),
    ],
)
def test_what_no_template_takes_is_told(tmp_path, tokenizer, context, message):
    with pytest.raises(ValueError, match=message):
        trained_on(write(tmp_path, [{**ONE, **context}]), tmp_path, tokenizer)


def test_tools_that_an_evaluation_leaves_out_are_told(tmp_path, capsys):
    path = write(tmp_path, [{"prompt": "w1", "tools": [{"name": "w5"}]}, {"prompt": "w2", "tools": None}])
    assert DecodingArguments(model_name_or_path="model", prompts_data=path).read_prompts() == ["w1", "w2"]
    assert (
        "1 of the prompts have `tools` or `chat_template_kwargs`, which training hands to" in capsys.readouterr().out
    )


def test_tools_reach_training_through_relabelling_and_calls_have_no_plain_text(tmp_path, tokenizer):
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }} {% endif %}" + tokenizer.chat_template
    row = {**ONE, "tools": [{"name": "w6", "parameters": None}]}
    expected = ("w6 " + CHAT[0], *CHAT[1:])
    path = write(tmp_path, [row])
    assert trained_on(path, tmp_path, tokenizer) == relabelled(path, tmp_path, tokenizer) == [expected]
    call = answer(None, tool_calls=[{"type": "function", "function": {"name": "w5", "arguments": {}}}])
    with pytest.raises(ValueError, match="`chosen` of row 0 of the pairs calls tools"):
        relabelled(write(tmp_path, [{**ONE, "chosen": [call]}]), tmp_path, tokenizer)
    with pytest.raises(ValueError, match="`response` .* no plain text"):
        token_rewards(tiny_arm(), tokenizer, "w1", [call])


TEMPLATES = {
    "parts alone": "{% for m in messages %}{{ m.role }} {% for p in m.content %}{{ p.text }} {% endfor %}{% endfor %}",
    "both": (
        "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}"
        "{% for p in m.content %}{{ p.text }} {% endfor %}{% endif %}{% endfor %}"
    ),
    "anything": "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
}


@pytest.mark.parametrize("content", ["w1", [part("w1")]])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_get_contents_in_the_form_that_they_read(tokenizer, template, content):
    tokenizer.chat_template = TEMPLATES[template]
    ids = encode_prompts(tokenizer, [[user(content)]])["input_ids"][0]
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == "user w1"


def test_a_prompt_that_fills_the_model_is_refused(tokenizer):
    model, prompts = tiny_llama(max_position_embeddings=8), ["w1", "w1 w2 w3 w4 w5"]
    with pytest.raises(ValueError, match="row 1 of `prompts` has 8 tokens, but the base model has 8 positions"):
        sweep(model, tokenizer, prompts, [Run("base")], {"short": brevity}, max_new_tokens=1)
    sweep(model, tokenizer, prompts, [Run("base")], {"short": brevity}, max_prompt_length=7, max_new_tokens=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "`prompt` of row 1 of the prompts' data is None"),
        ({"prompt": 3}, "`prompt` of row 1 of the prompts' data is 3"),
        ({"prompt": "w2", "images": ["1.png"]}, "`images` of row 1 of the prompts' data has what is no text"),
    ],
)
def test_prompts_of_a_file_name_the_row(tmp_path, row, message):
    path = write(tmp_path, [{"prompt": "w1"}, row])
    with pytest.raises(ValueError, match=message):
        DecodingArguments(model_name_or_path="model", prompts_data=path).read_prompts()


def test_a_table_of_texts_and_conversations():
    prompts = ["w1", [user("w2")], [user([part("w3")])]]
    table = sweep(tiny_llama(), tiny_tokenizer(), prompts, [Run("base")], {"short": brevity}, max_new_tokens=1)
    assert table["prompt"][:] == prompts


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}w1"


@pytest.mark.parametrize("template", [REFUSING, None])
def test_templates_that_refuse_messages_are_named_with_the_row(tmp_path, tokenizer, template):
    tokenizer.chat_template = template
    message = "users first" if template else "has no chat template"
    row = {**ONE, "prompt": [SYSTEM, user("w1")]}
    with pytest.raises(ValueError, match=f"row 0 of the data set 'helpful'.*{message}"):
        trained_on(write(tmp_path, [row]), tmp_path, tokenizer)
    with pytest.raises(ValueError, match=f"`prompt`.*{message}"):
        token_rewards(tiny_arm(), tokenizer, row["prompt"], "w2")
    if template:
        with pytest.raises(ValueError, match=f"row 0 of `prompts`.*{message}"):
            encode_prompts(tokenizer, [row["prompt"]])


def test_streams_of_mixed_rows(tmp_path, tokenizer):
    stream = IterableDataset.from_generator(lambda: (row for row, _ in SHAPES.values()))
    run = trainer(tmp_path, tokenizer, data={"helpful": stream}, peft_config=LORA)
    found = [words(tokenizer, row["pairs"][0]) for row in islice(run.train_dataset, len(SHAPES))]
    assert found == [expected for _, expected in SHAPES.values()]


@pytest.mark.parametrize("change", [{"chosen": None}, {"images": ["1.png"]}, {"prompt": 3}])
def test_the_first_row_of_a_stream_is_refused_before_anything_is_written(tmp_path, tokenizer, change):
    stream = IterableDataset.from_generator(lambda: iter([{**ONE, **change}, ONE]))
    with pytest.raises(ValueError, match="of row 0 of the data set 'helpful'"):
        trainer(tmp_path / "out", tokenizer, data={"helpful": stream}, peft_config=LORA)
    assert not (tmp_path / "out").exists()
    empty = IterableDataset.from_generator(lambda: iter([ONE])).filter(lambda row: False)
    with pytest.raises(ValueError, match="The data set 'helpful' is empty"):
        trainer(tmp_path / "out", tokenizer, data={"helpful": empty}, peft_config=LORA)
