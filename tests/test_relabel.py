# SPDX-License-Identifier: Apache-2.0
"""Reward models by name, and the labels that they give to pairs."""

import itertools
import json

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from datasets import Dataset
from pair_data import prepared
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from trl_parm import reward_models
from trl_parm.relabel import agreement, relabel
from trl_parm.reward_models import RewardSource, load_function
from trl_parm.rewards import brevity, positivity, score


CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w3"}]
TEMPLATE = "user {prompt} assistant {response}"


def save_classifier(folder, labels=2, seed=7):
    config = tiny_llama(seed).config
    config.num_labels = labels
    torch.manual_seed(seed)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_score_model(folder, shards=False, file="model.safetensors", bias=True, **config):
    """A checkpoint as Safe-RLHF writes it."""
    torch.manual_seed(3)
    model = tiny_llama(3)
    tensors = {key: value for key, value in model.state_dict().items() if key.startswith("model.")}
    tensors["score_head.weight"] = torch.randn(1, 32)
    if bias:
        tensors["score_head.bias"] = torch.randn(1)
    tensors |= {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    settings = {**model.config.to_dict(), "architectures": ["LlamaForScore"], "score_dim": 1, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    if shards:
        split = {"one.safetensors": {k: v for k, v in tensors.items() if "layers.0" in k}}
        split["two.safetensors"] = {k: v for k, v in tensors.items() if "layers.0" not in k}
        for name, part in split.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        weights = {key: name for name, part in split.items() for key in part}
        index = {"metadata": {}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return str(folder), tensors


def naive_score(folder, tensors, text):
    """Backbone without padding, one text, last token."""
    model = tiny_llama(3)
    model.load_state_dict({k: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    end = model.model(ids).last_hidden_state[0, -1]
    return (tensors["score_head.weight"] @ end + tensors.get("score_head.bias", 0)).item()


@pytest.mark.parametrize("kind", ["one file", "shards", "bin", "no bias"])
def test_score_models_of_safe_rlhf(tmp_path, kind):
    options = {
        "one file": {}, "shards": {"shards": True}, "bin": {"file": "pytorch_model.bin"}, "no bias": {"bias": False}
    }  # fmt: skip
    folder, tensors = save_score_model(tmp_path / "score", **options[kind])
    reward = RewardSource(folder, template=TEMPLATE).load()
    prompts, responses = ["w1", "w2 w3", "w4"], ["w5 w6", "w7", "w8 w9 w10"]
    values = reward(prompts, responses)
    for prompt, response, value in zip(prompts, responses, values):
        text = f"user {prompt} assistant {response}"
        assert value == pytest.approx(naive_score(folder, tensors, text), abs=1e-4)
    assert RewardSource(folder, template=TEMPLATE, negate=True).load()(prompts, responses) == [-v for v in values]


@pytest.mark.parametrize(("score_type", "shift"), [("reward", 0.5), ("cost", 0.0)])
def test_score_models_may_normalise(tmp_path, score_type, shift):
    folder, tensors = save_score_model(tmp_path / "score", do_normalize=True, score_type=score_type)
    value = RewardSource(folder, template=TEMPLATE).load()(["w1"], ["w2"])[0]
    assert value == pytest.approx((naive_score(folder, tensors, "user w1 assistant w2") - shift) / 2, abs=1e-4)


@pytest.mark.parametrize("given", [0.3, [0.3]])
def test_moments_that_a_checkpoint_lacks_are_those_of_its_configuration(tmp_path, given):
    folder, tensors = save_score_model(tmp_path / "score", do_normalize=True, mean=given, var=2.0)
    plain = {key: value for key, value in tensors.items() if "normalizer" not in key}
    save_file(plain, tmp_path / "score/model.safetensors", metadata={"format": "pt"})
    value = RewardSource(folder, template=TEMPLATE).load()(["w1"], ["w2"])[0]
    expected = (naive_score(folder, tensors, "user w1 assistant w2") - 0.3) / 2**0.5
    assert value == pytest.approx(expected, abs=1e-4)


def test_a_score_model_needs_its_head(tmp_path):
    folder, tensors = save_score_model(tmp_path / "score")
    del tensors["score_head.weight"]
    save_file(tensors, tmp_path / "score/model.safetensors", metadata={"format": "pt"})
    assert "score_head.weight" not in load_file(tmp_path / "score/model.safetensors")
    with pytest.raises(ValueError, match="used as a ScoreModel: .*score_head.weight"):
        RewardSource(folder, template=TEMPLATE).load()


@pytest.mark.parametrize("template", [None, TEMPLATE, "{response}"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_classifiers(tmp_path, template, batch_size):
    folder = save_classifier(tmp_path / "classifier")
    reward = RewardSource(folder, template=template, label=1, batch_size=batch_size).load()
    model = LlamaForSequenceClassification.from_pretrained(folder)
    tokenizer = tiny_tokenizer()
    prompts, responses = ["w1", "w2 w3", "w4"], ["w5 w6", "w7", "w8 w9 w10"]
    for prompt, response, value in zip(prompts, responses, reward(prompts, responses)):
        text = (template or "user {prompt} <eos> assistant {response} <eos>").format(prompt=prompt, response=response)
        expected = model(**tokenizer(text, return_tensors="pt")).logits[0, 1].item()
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", [None, 0, 1, -1])
@pytest.mark.parametrize("of_tokenizer", [None, "<eos>", "<pad>"])
def test_a_classifier_reads_a_text_in_a_batch_as_alone_whatever_its_pad_token(tmp_path, pad, of_tokenizer):
    folder = save_classifier(tmp_path / "classifier")
    config, tokenizer = tiny_llama().config, tiny_tokenizer()
    config.num_labels, config.pad_token_id = 2, pad
    model = LlamaForSequenceClassification.from_pretrained(folder, config=config)
    model.save_pretrained(folder)
    tokenizer.pad_token = of_tokenizer
    tokenizer.save_pretrained(folder)
    prompts, responses = ["w1", "w2 w3", "w4"], ["w5 w57", "w7", "w8 w9 w10"]
    for template, text in ((None, "user {prompt} <eos> assistant {response} <eos>"), (TEMPLATE, TEMPLATE)):
        reward = RewardSource(folder, template=template).load()
        for prompt, response, value in zip(prompts, responses, reward(prompts, responses)):
            ids = tiny_tokenizer()(text.format(prompt=prompt, response=response), return_tensors="pt")["input_ids"]
            assert value == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_a_text_without_any_token_has_the_score_of_the_token_that_ends_texts(tmp_path, pad):
    """Alone, beside longer ones and beside others like it; padding alone would have that of the pad token."""
    save_classifier(tmp_path)
    source = {"source": str(tmp_path), "template": "{response}"}
    reward = RewardSource.of(source).load()
    if pad is not None:
        reward._config.pad_token_id, reward._own_pad = pad, True
    end = reward.tokenizer.eos_token_id
    reward.model.double()
    expected = reward.model(torch.tensor([[end]])).logits[0, 0].item()
    for responses in ([""], ["", ""], ["w5 w6 w7 w8", "", "w9"]):
        found = reward(["w1"] * len(responses), responses)[responses.index("")]
        assert found == pytest.approx(expected, abs=1e-6)
    reward.tokenizer.eos_token = reward.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="without any token, such as an empty response.*Give a `template` with words"):
        reward(["w1", "w1"], ["w2", ""])


def test_a_classifier_with_a_chat_template_reads_whole_conversations(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    reward = RewardSource(folder).load()
    text = "user w1 <eos> assistant w2 <eos> user w3 <eos> assistant w4 <eos>"
    plain = RewardSource(folder, template="{response}").load()
    assert score("helpful", reward, [CHAT], ["w4"]) == pytest.approx(plain([CHAT], [text]), abs=1e-5)
    other = RewardSource(folder, chat_template="{% for m in messages %}w50 {{ m['content'] }} {% endfor %}").load()
    expected = plain([CHAT], ["w50 w1 w50 w2 w50 w3 w50 w4"])
    assert score("helpful", other, [CHAT], ["w4"]) == pytest.approx(expected, abs=1e-5)


def test_a_text_that_a_classifier_reads_in_part_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(reward_models.logger, "warning_once", said.append)
    reward = RewardSource(save_classifier(tmp_path / "classifier"), max_length=7).load()
    score("helpful", reward, ["w1"], ["w2"])
    assert said == []
    score("helpful", reward, ["w1"], ["w2 w3 w4 w5"])
    assert ["reach 7 tokens, and longer ones are cut on the left" in text for text in said] == [True]
    prompts = ["w1 w4 w5 w6 w7 w8", "w9 w4 w5 w6 w7 w8"]
    one, same = score("helpful", reward, prompts, ["w2 w3"] * 2)
    assert one == pytest.approx(same, abs=1e-5) != pytest.approx(score("helpful", reward, prompts[:1], ["w3 w2"])[0])


def test_functions_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def count(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert RewardSource.of("mine:count").load()(["a"], ["abc"]) == [3]
    assert RewardSource.of({"source": "mine:count", "negate": True}).load()(["a"], ["abc"]) == [-3]
    assert RewardSource.of('{"source": "mine:count", "negate": true}').negate
    assert load_function("trl_parm.rewards:positivity") is positivity
    seen = []
    score("helpful", lambda p, r: seen.extend(p) or [0.0], [CHAT], ["w4"])
    assert seen == ["Human: w1\n\nAssistant: w2\n\nHuman: w3"]


def test_a_module_of_another_place_is_not_taken_for_the_users(tmp_path, monkeypatch):
    text = "def count(prompts, responses):\n    return [0.0 for r in responses]\n"
    for place in ("first", "second", "copied"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "counting.py").write_text(text + "#" * (place == "second"))
    monkeypatch.chdir(tmp_path / "first")
    assert load_function("counting:count")(["a"], ["b"]) == [0.0]
    monkeypatch.chdir(tmp_path / "copied")
    assert load_function("counting:count")(["a"], ["b"]) == [0.0]
    monkeypatch.chdir(tmp_path / "second")
    (tmp_path / "second/json.py").write_text(text)
    for path in ("counting:count", "json:count"):
        with pytest.raises(ValueError, match=r"which hides .*second.*Rename that file"):
            load_function(path)


def test_a_cost_may_return_what_a_reward_may(tmp_path, monkeypatch):
    (tmp_path / "costs.py").write_text(
        "import numpy\ndef cost(prompts, responses):\n    return numpy.ones((len(responses), 1))"
    )
    monkeypatch.chdir(tmp_path)
    reward = RewardSource("costs:cost", negate=True).load()
    assert score("safe", reward, ["a", "b"], ["c", "d"]) == [-1.0, -1.0]


@pytest.mark.parametrize("negate", [False, True])
def test_a_function_by_its_path_reads_messages_if_it_asks_for_them(tmp_path, monkeypatch, negate):
    (tmp_path / f"turns_{negate}.py").write_text(
        "def turns(prompts, responses):\n    return [float(len(p)) for p in prompts]\nturns.reads_messages = True\n"
    )
    monkeypatch.chdir(tmp_path)
    source = RewardSource(f"turns_{negate}:turns", negate=negate)
    for reward in (source, source.load()):
        assert score("helpful", reward, [CHAT], ["w4"]) == [-3 if negate else 3]


def test_a_trained_anew_model_is_another_one(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    first = RewardSource(folder).configuration()
    (tmp_path / "classifier/trainer_state.json").write_text("{}")
    assert RewardSource(folder).configuration() == first
    save_classifier(tmp_path / "classifier", seed=8)
    assert RewardSource(folder).configuration() != first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "{response}"}, "it needs `source`, and may have template, chat_template"),
        ({"source": "x", "sauce": 1}, "it needs `source`"),
        ({"source": "x", "template": "{prompt}"}, "has no {response}"),
        ({"source": "x", "template": "{response}", "chat_template": "x"}, "Give one of them"),
        ("trl_parm.rewards:nosuch", "There is no function 'trl_parm.rewards:nosuch'"),
        ("nosuch:function", "There is no function 'nosuch:function'"),
        ("trl_parm.rewards:SENTENCE_END", "is a Pattern, but a reward must be a function"),
        ({"source": "CLASSIFIER", "label": 2}, "has 2 outputs"),
        ({"source": "PLAIN"}, "has no chat template. Give a `template`"),
        ({"source": "trl_parm.rewards:brevity", "label": 1, "dtype": "float32"}, "a function, .* has label, dtype,"),
        ({"source": "trl_parm.rewards:brevity", "template": "{response}"}, "a function, .* has template,"),
    ],
)
def test_bad_sources(tmp_path, given, message):
    folder = save_classifier(tmp_path / "classifier")
    save_classifier(tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").unlink()
    if isinstance(given, dict):
        names = {"CLASSIFIER": folder, "PLAIN": str(tmp_path / "plain")}
        given = {key: names.get(value, value) if key == "source" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        RewardSource.of(given).load()


PAIRS = [
    {"prompt": f"w{i // 2}", "response_0": "w1 " * (i % 4 + 1), "response_1": "w2 " * (i % 3 + 1), "safe": True}
    for i in range(20)
]


def longer(prompts, responses):
    return [float(len(r.split())) for r in responses]


def shorter(prompts, responses):
    return [-float(len(r.split())) for r in responses]


BOTH = {"long": longer, "short": shorter}


def test_labels_name_the_better_response(tmp_path):
    data = relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=0.2, validation_size=3)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 12, "validation": 4, "test": 4}
    for row in [row for rows in data.values() for row in rows]:
        first, second = len(row["response_0"].split()), len(row["response_1"].split())
        assert (row["long_score_0"], row["long_score_1"]) == (first, second)
        assert row["long"] == (-1 if first == second else int(second > first))
        assert row["short"] == (-1 if first == second else int(second < first))
        assert set(row) == {"prompt", "response_0", "response_1"} | {
            f"{o}{end}" for o in BOTH for end in ("", "_score_0", "_score_1")
        }
    prompts = [set(rows["prompt"]) for rows in data.values()]
    assert not set.union(*(a & b for a, b in itertools.combinations(prompts, 2)))
    for name, rows in data.items():
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows.to_list()
    rows = agreement(data["train"], ["long", "short"])
    assert rows[0]["as short"] == 0
    assert rows[0]["ties"] == sum(label == -1 for label in data["train"]["long"])


def test_the_trainer_takes_what_relabelling_writes(tmp_path, tokenizer):
    data = relabel(Dataset.from_list(PAIRS), {"helpful": longer, "harmless": shorter}, tmp_path, test_size=0)["train"]
    labels = prepared(data, "pairs", tokenizer)["labels"]
    kept = [row for row in data if row["helpful"] != -1]
    assert labels[:] == [[1 - 2 * row["helpful"], 1 - 2 * row["harmless"]] for row in kept]


def test_a_margin_makes_more_ties(tmp_path):
    narrow = relabel(Dataset.from_list(PAIRS), BOTH, tmp_path / "narrow", test_size=0)["train"]
    wide = relabel(Dataset.from_list(PAIRS), BOTH, tmp_path / "wide", test_size=0, tie_margin=1)["train"]
    for a, b in zip(narrow, wide):
        apart = abs(a["long_score_0"] - a["long_score_1"])
        assert b["long"] == (a["long"] if apart > 1 else -1)


def test_splits_follow_the_seed(tmp_path):
    found = [
        relabel(Dataset.from_list(PAIRS), BOTH, tmp_path / str(i), test_size=6, seed=seed)["test"].to_list()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert found[0] == found[1] != found[2]


def test_a_template_for_training_and_ranked_pairs(tmp_path):
    data = relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, template="USER: {prompt} ASSISTANT:", ranked=True)
    rows = data["train"].to_list()
    assert all(row["prompt"] == f"USER: {row['raw_prompt']} ASSISTANT:" for row in rows)
    for objective in BOTH:
        ranked = [json.loads(line) for line in (tmp_path / f"ranked/{objective}.jsonl").read_text().splitlines()]
        assert len(ranked) == sum(row[objective] >= 0 for row in rows)
        for pair in ranked:
            better, worse = BOTH[objective](["", ""], [pair["chosen"], pair["rejected"]])
            assert better > worse
            assert pair["prompt"].startswith("USER: ")
    with pytest.raises(ValueError, match="has no {prompt}"):
        relabel(Dataset.from_list(PAIRS), BOTH, tmp_path / "bad", template="USER:")
    assert not (tmp_path / "bad/train.jsonl").exists()


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl", "ranked/long.jsonl"])
def test_a_file_of_anybody_else_is_not_replaced(tmp_path, name):
    """Such as the very pairs, in the folder where the splits shall go; and nothing is scored before that is known."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")

    def scored(prompts, responses):
        pytest.fail("scored")

    with pytest.raises(ValueError, match="was not written by 'relabel'"):
        relabel(Dataset.from_list(PAIRS), {"long": scored}, tmp_path, ranked=True)
    assert [(p.name, p.read_text()) for p in tmp_path.rglob("*") if p.is_file()] == [(path.name, "mine")]


def test_splits_take_the_place_of_older_ones_but_not_of_edited_ones(tmp_path):
    for seed in (0, 1):
        found = relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=6, seed=seed, ranked=True)["test"]
    assert [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()] == found.to_list()
    (tmp_path / "test.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="or was changed or protected since"):
        relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=6)
    assert (tmp_path / "test.jsonl").read_text() == "mine"


def test_splits_of_an_earlier_run_do_not_stay_beside_others(tmp_path):
    """Its test pairs would be among the new training pairs."""
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=6, validation_size=2, ranked=True)
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=2, ranked=False)
    assert {path.name for path in tmp_path.rglob("*.jsonl")} == {"train.jsonl", "test.jsonl", "scores.jsonl"}
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=2, ranked=True)
    (tmp_path / "test.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="test.jsonl was not written by 'relabel', or was changed"):
        relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=0)
    assert (tmp_path / "test.jsonl").read_text() == "mine"


def test_a_file_that_comes_while_pairs_are_scored_stays(tmp_path):
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path, test_size=6, ranked=True)
    (tmp_path / "ranked/own.jsonl").write_text("mine")

    def scored(prompts, responses):
        (tmp_path / "validation.jsonl").write_text("mine")
        return BOTH["long"](prompts, responses)

    relabel(Dataset.from_list(PAIRS), {"long": scored}, tmp_path, test_size=0, restart=True)
    assert [(tmp_path / name).read_text() for name in ("validation.jsonl", "ranked/own.jsonl")] == ["mine"] * 2
    assert {path.name for path in tmp_path.rglob("*.jsonl")} == {
        "train.jsonl", "scores.jsonl", "validation.jsonl", "own.jsonl",
    }  # fmt: skip


def test_no_objective_decides_where_its_pairs_go(tmp_path):
    rewards = {name: longer for name in ("../../up", str(tmp_path / "root"), "..", "Long", "long", "train", "a/b")}
    relabel(Dataset.from_list(PAIRS), rewards, tmp_path / "out", ranked=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"ranked"}
    ranked = list((tmp_path / "out/ranked").glob("*.jsonl"))
    assert len({path.name.casefold() for path in ranked}) == len(rewards)
    assert {"long.jsonl", "train.jsonl"} < {path.name for path in ranked}


def messages(role, text):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize("kind", ["pku", "trl", "conversations", "implicit prompts"])
def test_every_format_of_pairs(tmp_path, kind):
    row = {"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}
    if kind == "pku":
        row = {"prompt": "w1", "response_0": "w2 w3", "response_1": "w4", "better_response_id": 1}
    if kind in ("conversations", "implicit prompts"):
        row = {key: messages("user" if key == "prompt" else "assistant", text) for key, text in row.items()}
    if kind == "implicit prompts":
        row = {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}
    seen = []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses))
        return longer(prompts, responses)

    found = relabel(Dataset.from_list([row]), {"long": reward}, tmp_path, test_size=0)["train"][0]
    assert seen == [("w1", "w2 w3"), ("w1", "w4")]
    assert found["long"] == 0
    if kind in ("conversations", "implicit prompts"):
        assert found["prompt"] == messages("user", "w1")
        assert found["response_1"] == messages("assistant", "w4")


def test_a_killed_run_goes_on(tmp_path):
    """Finished batches are not scored again, the results are those of a whole run, and nothing is there before."""
    data, scored = Dataset.from_list(PAIRS), []

    def counting(prompts, responses):
        scored.append(len(responses))
        return longer(prompts, responses)

    def stop(pairs):
        if len(scored) == 3:
            raise KeyboardInterrupt

    rewards = {"long": counting, "short": shorter}
    with pytest.raises(KeyboardInterrupt):
        relabel(data, rewards, tmp_path, batch_size=3, on_batch=stop)
    assert not (tmp_path / "train.jsonl").exists()
    scores = tmp_path / "scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-9])
    scored.clear()
    resumed = relabel(data, rewards, tmp_path, batch_size=3)
    assert sum(scored) == 2 * (20 - 9 + 1)
    whole = relabel(data, BOTH, tmp_path / "whole")
    assert {k: v.to_list() for k, v in resumed.items()} == {k: v.to_list() for k, v in whole.items()}
    scored.clear()
    more = relabel(data, {**rewards, "third": brevity}, tmp_path)
    assert not scored
    assert "third" in more["train"].column_names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("garbage", "Line 2 of .* is not a row in JSON"),
        ('{"objective": "long", "row": 0, "scores": [1.0, 2.0]}', "Lines 1 and 2 of .* are of the same"),
        ('{"objective": "long", "row": 1}', "Line 2 of .* it has no 'scores'"),
        ('{"row": 1, "scores": [1.0, 2.0]}', "Line 2 of .* it has no 'objective'"),
        ('{"objective": "long", "row": 1, "scores": [1.0]}', "Line 2 of .* is no row of this version"),
        ('{"objective": "long", "row": 1, "scores": [NaN, 1.0]}', "Line 2 of .* is not a row in JSON"),
        ('{"objective": "long", "row": 1, "scores": [null, 1.0]}', "Line 2 of .* is no row of this version"),
    ],
)
def test_damaged_scores_are_refused(tmp_path, line, message):
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=message):
        relabel(Dataset.from_list(PAIRS), BOTH, tmp_path)


def test_a_reward_model_labels_pairs(tmp_path):
    folder, tensors = save_score_model(tmp_path / "score")
    source = RewardSource(folder, template=TEMPLATE, negate=True)
    row = relabel(Dataset.from_list(PAIRS[:2]), {"cost": source}, tmp_path / "out", test_size=0)["train"][0]
    text = "user w0 assistant {}"
    for name in ("0", "1"):
        expected = -naive_score(folder, tensors, text.format(row[f"response_{name}"]))
        assert row[f"cost_score_{name}"] == pytest.approx(expected, abs=1e-4)
    assert row["cost"] == int(row["cost_score_1"] > row["cost_score_0"])


def broken(prompts, responses):
    return [float("nan") if r.startswith("w2 w2") else 1.0 for r in responses]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {"odd": broken}}, "The reward 'odd' returned nan for the response 'w2 w2 ' of row 1"),
        ({"pairs": [{"prompt": "w1", "chosen": "w2"}]}, "A pair lacks rejected; it has prompt, chosen"),
        (
            {"pairs": [{"chosen": "w1", "rejected": "w2"}]},
            "no `prompt` in row 0 of the pairs, whose responses are plain texts",
        ),
        ({"pairs": []}, "There are no pairs"),
        ({"rewards": {}}, "There are no pairs, or no rewards"),
        ({"rewards": {"prompt": longer}}, "would make a column that is called"),
        ({"rewards": {"a": longer, "a_score_0": longer}}, "would make a column that is called"),
        ({"test_size": 20}, "ask for 20 of 20 pairs"),
        (
            {"pairs": [{**row, "prompt": "w1"} for row in PAIRS]},
            "20 pairs have 1 prompts, .* splits \\['test'\\] leave none to train on. Set `test_size`",
        ),
        ({"template": "user {prompt}", "pairs": [*PAIRS, {**PAIRS[0], "prompt": CHAT}]}, "has 3 messages"),
        ({"tie_margin": -1.0}, "`tie_margin` is -1.0"),
    ],
)
def test_bad_relabelling(tmp_path, options, message):
    options = {"pairs": PAIRS, "rewards": BOTH, **options}
    with pytest.raises(ValueError, match=message):
        pairs = Dataset.from_list(options.pop("pairs"), on_mixed_types="use_json")
        relabel(pairs, options.pop("rewards"), tmp_path / "out", **options)
    assert not (tmp_path / "out/train.jsonl").exists()


def test_a_template_makes_texts_of_messages_that_training_reads_as_texts(tmp_path, tokenizer):
    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [{"prompt": said("user", "w1"), "chosen": said("assistant", "w2"), "rejected": said("assistant", "w3 w4")}]
    found = relabel(Dataset.from_list(rows), {"long": longer}, tmp_path, 0, template="user {prompt} assistant ")[
        "train"
    ]
    assert found[0]["prompt"] == "user w1 assistant "
    assert (found[0]["raw_prompt"], found[0]["response_0"], found[0]["response_1"]) == (
        rows[0]["prompt"],
        "w2",
        "w3 w4",
    )
    pair = prepared(found, "pairs", tokenizer, label_columns={"helpful": "long"})[0]
    assert (
        " ".join(tokenizer.convert_ids_to_tokens(pair["prompt_ids"] + pair["first_ids"]))
        == "user w1 assistant w2 <eos>"
    )


def test_scores_of_other_pairs_are_refused(tmp_path):
    relabel(Dataset.from_list(PAIRS), BOTH, tmp_path)
    with pytest.raises(ValueError, match="belongs to another configuration: pairs was"):
        relabel(Dataset.from_list(PAIRS[:-1]), BOTH, tmp_path)
    with pytest.raises(ValueError, match="rewards long function was test_relabel:longer, but is test_relabel:shorter"):
        relabel(Dataset.from_list(PAIRS), {"long": shorter}, tmp_path)
