# SPDX-License-Identifier: Apache-2.0
"""Reward models by name."""

import json

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from trl_parm.reward_models import RewardSource, load_function
from trl_parm.rewards import positivity, score


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


def test_a_score_model_needs_its_head(tmp_path):
    folder, tensors = save_score_model(tmp_path / "score")
    del tensors["score_head.weight"]
    save_file(tensors, tmp_path / "score/model.safetensors", metadata={"format": "pt"})
    assert "score_head.weight" not in load_file(tmp_path / "score/model.safetensors")
    with pytest.raises(ValueError, match="its checkpoint has no `score_head.weight`"):
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


def test_a_classifier_with_a_chat_template_reads_whole_conversations(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    reward = RewardSource(folder).load()
    text = "user w1 <eos> assistant w2 <eos> user w3 <eos> assistant w4 <eos>"
    plain = RewardSource(folder, template="{response}").load()
    assert score("helpful", reward, [CHAT], ["w4"]) == pytest.approx(plain([CHAT], [text]), abs=1e-5)


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


def test_a_trained_anew_model_is_another_one(tmp_path):
    folder = save_classifier(tmp_path / "classifier")
    first = RewardSource(folder).configuration()
    assert RewardSource(folder).configuration() == first
    save_classifier(tmp_path / "classifier", seed=8)
    assert RewardSource(folder).configuration() != first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "{response}"}, "it needs `source`, and may have template, label"),
        ({"source": "x", "sauce": 1}, "it needs `source`"),
        ({"source": "x", "template": "{prompt}"}, "has no {response}"),
        ("trl_parm.rewards:nosuch", "There is no function 'trl_parm.rewards:nosuch'"),
        ("nosuch:function", "There is no function 'nosuch:function'"),
        ("trl_parm.rewards:SENTENCE_END", "is a Pattern, but a reward must be a function"),
        ({"source": "CLASSIFIER", "label": 2}, "has 2 outputs"),
        ({"source": "PLAIN"}, "has no chat template. Give a `template`"),
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
