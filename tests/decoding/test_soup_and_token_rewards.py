# SPDX-License-Identifier: Apache-2.0
"""Rewarded Soups, exactly, and token rewards to look at."""

import copy
import html
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from decoding.tables import lora_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig, get_preference, save_as_lora, set_preference
from trl_parm import rewarded_soup, token_rewards


IDS = torch.tensor([[7, 8, 20, 41, 2], [3, 6, 6, 50, 11]])


@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.5, -0.5)])
def test_a_soup_of_loras_is_the_exact_average_of_their_products(weights):
    model = lora_model("helpful", "harmless")
    base = copy.deepcopy(model).unload().double()
    expected = copy.deepcopy(base)
    for name, weight in zip(("helpful", "harmless"), weights, strict=True):
        merged = copy.deepcopy(model).double()
        merged.set_adapter(name)
        merged = merged.merge_and_unload()
        for target, own, other in zip(expected.parameters(), base.parameters(), merged.parameters()):
            target.data += weight * (other.data - own.data)
    beyond = {"allow_off_simplex": True} if min(weights) < 0 else {}
    soup = rewarded_soup({"a": "helpful", "b": "harmless"}, dict(zip("ab", weights)), adapters_of=model, **beyond)
    torch.testing.assert_close(soup(IDS).logits.double(), expected(IDS).logits, atol=1e-5, rtol=1e-5)
    assert soup.active_adapter == "soup"
    assert soup.peft_config["soup"].r == 4
    again = rewarded_soup({"a": "helpful", "b": "harmless"}, [1.0, 0.0], adapters_of=model)
    assert again.peft_config["soup"].r == 2
    alone = copy.deepcopy(model)
    alone.set_adapter("helpful")
    torch.testing.assert_close(again(IDS).logits, alone(IDS).logits, atol=1e-6, rtol=1e-5)
    assert any("lora_A" in key for key in get_peft_model_state_dict(again, adapter_name="soup"))


SUMS = {
    "plain": ({}, {"r": 8}),
    "rsLoRA": ({"use_rslora": True}, {"r": 8, "use_rslora": True}),
    "rsLoRA and plain": ({"use_rslora": True}, {"r": 8}),
    "biases": ({"lora_bias": True}, {"lora_bias": True}),
    "a bias in one": ({"lora_bias": True, "use_rslora": True}, {}),
    "patterns": (
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"r": 8, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}},
    ),
    "layers of one": ({"layers_to_transform": [0]}, {}),
    "layers of the other": ({}, {"layers_to_transform": [1]}),
    "layers without overlap": ({"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "other modules": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "up_proj"]}),
    "excluded": ({"exclude_modules": r".*layers\.0.*"}, {}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "a pattern of modules": (
        {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": ["o_proj"]},
    ),
}


def two_loras(first: dict, second: dict, **sizes):
    """A model with two random LoRAs, `a` and `b`."""
    base = tiny_llama(attention_bias=True, mlp_bias=True, num_hidden_layers=2, **sizes)
    model = None
    for name, settings in (("a", first), ("b", second)):
        torch.manual_seed(ord(name))
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]} | settings
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.normal_()
    return model.eval()


def dense_soup(model, weights: dict[str, float]):
    """The base model with Σ α_i ΔW_i and Σ α_i Δb_i in its weights, in float64."""
    model = copy.deepcopy(model).double()
    for _, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        for name, weight in weights.items():
            if name in layer.lora_A or name in layer.lora_embedding_A:
                base.weight.data += weight * layer.get_delta_weight(name)
            if name in layer.lora_B and layer.lora_B[name].bias is not None:
                base.bias.data += weight * layer.scaling[name] * layer.lora_B[name].bias
    return model.unload()


@pytest.mark.parametrize("kind", ["plain", "biases", "layers of one", "embeddings"])
def test_a_soup_of_loras_with_weights_all_0_is_the_model_below_them(kind):
    model = two_loras(*SUMS[kind])
    expected = dense_soup(model, {})(IDS).logits
    alone = copy.deepcopy(model).unload()(IDS).logits
    soup = rewarded_soup({"x": "a", "y": "b"}, [0, 0], adapters_of=model, allow_off_simplex=True)
    assert torch.equal(soup(IDS).logits, alone)
    torch.testing.assert_close(soup(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_soup_of_models_with_weights_all_0_has_no_other():
    one = tiny_llama(1)
    soup = rewarded_soup({"x": one, "y": tiny_llama(2)}, [0, 0], allow_off_simplex=True)
    assert not any(parameter.any() for parameter in soup.parameters())
    assert torch.equal(soup(IDS).logits, torch.zeros(2, 5, 64))
    assert any(parameter.any() for parameter in one.parameters())


@pytest.mark.parametrize("weights", [{"a": 0.3, "b": 0.7}, {"a": 0.0, "b": 1.0}])
@pytest.mark.parametrize("kind", SUMS)
def test_a_soup_is_exact_for_all_that_a_lora_may_have(kind, weights, tmp_path):
    model = two_loras(*SUMS[kind])
    expected = dense_soup(model, weights)(IDS).logits
    base = dense_soup(model, {})
    assert (base(IDS).logits - expected).abs().max() > 1e-2
    soup = rewarded_soup({"x": "a", "y": "b"}, list(weights.values()), adapters_of=model)
    torch.testing.assert_close(soup(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
    soup.save_pretrained(str(tmp_path), selected_adapters=["soup"])
    loaded = PeftModel.from_pretrained(base.float(), str(tmp_path / "soup"))
    torch.testing.assert_close(loaded(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "is a LoRA with DoRA"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"bias": "lora_only"}, "`bias`"),
        ({"trainable_token_indices": [3]}, "`trainable_token_indices`"),
    ],
)
def test_a_lora_that_is_no_sum_has_no_soup(settings, message):
    model = two_loras({}, settings)
    before = list(model.peft_config)
    with pytest.raises(ValueError, match=message):
        rewarded_soup({"x": "a", "y": "b"}, [0.5, 0.5], adapters_of=model)
    assert list(model.peft_config) == before
    # Of weight 0 it is no part of the soup, but biases that were trained are in the model.
    with pytest.raises(ValueError, match="has `bias=") if "bias" in settings else nullcontext():
        rewarded_soup({"x": "a", "y": "b"}, [1.0, 0.0], adapters_of=model)


def test_a_merged_lora_has_no_soup():
    model = two_loras({}, {})
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="is merged into the weights"):
        rewarded_soup({"x": "a", "y": "b"}, [0.5, 0.5], adapters_of=model)


@pytest.mark.parametrize("kind", [PBLoraConfig, SVDLoraConfig, MoSLoraConfig])
def test_a_soup_of_our_exports_is_their_exact_average(kind, tmp_path):
    torch.manual_seed(6)
    config = kind(objectives=["a", "b"], target_modules=["q_proj", "v_proj"], init_weights=False)
    arm = get_peft_model(tiny_llama(attention_bias=True), config).eval()
    for name, parameter in arm.named_parameters():
        if "core" in name:
            parameter.data.normal_()
    folders = save_as_lora(arm, tmp_path, torch.eye(2))
    model = PeftModel.from_pretrained(tiny_llama(attention_bias=True), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    expected = dense_soup(model, {"a": 0.4, "b": 0.6})(IDS).logits
    soup = rewarded_soup({"x": "a", "y": "b"}, [0.4, 0.6], adapters_of=model)
    torch.testing.assert_close(soup(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
    vertex = rewarded_soup({"x": "a", "y": "b"}, [0.0, 1.0], adapters_of=model)
    set_preference(arm, [0.0, 1.0])
    torch.testing.assert_close(vertex(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_soup_drops_nothing_unless_its_model_trains(training):
    model = lora_model("helpful", "harmless")
    for name in ("helpful", "harmless"):
        model.peft_config[name].lora_dropout = 0.5
    model.train(training)
    soup = rewarded_soup({"a": "helpful", "b": "harmless"}, [0.3, 0.7], adapters_of=model)
    dropouts = [module for name, module in soup.named_modules() if name.endswith("lora_dropout.soup")]
    assert {(module.p, module.training) for module in dropouts} == {(0.5, training)}
    assert torch.equal(soup(IDS).logits, soup(IDS).logits) != training


def packed(value):
    """A model with codes in the place of a weight, as quantized ones have."""
    model = tiny_llama()
    model.model.register_buffer("packed", torch.full((2,), value, dtype=torch.uint8))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_of_models_is_the_average_of_their_weights(dtype):
    models = {name: tiny_llama(seed).to(dtype) for seed, name in enumerate(("a", "b", "c"))}
    before = [p.clone() for p in models["a"].parameters()]
    soup = rewarded_soup(models, [0.5, 0.2, 0.3])
    for parts in zip(soup.parameters(), *(m.parameters() for m in models.values())):
        expected = 0.5 * parts[1].double() + 0.2 * parts[2].double() + 0.3 * parts[3].double()
        torch.testing.assert_close(parts[0].double(), expected.to(dtype).double(), atol=1e-6, rtol=1e-2)
        assert parts[0].dtype == dtype
    assert all(torch.equal(x, y) for x, y in zip(before, models["a"].parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewarded_soup({}, []), "`policies` is empty"),
        (lambda: rewarded_soup({"a": tiny_llama()}, [[1.0], [1.0]]), "one preference of shape"),
        (lambda: rewarded_soup({"a": "one"}, [1.0], adapters_of=lora_model("two")), "has no LoRA 'one'"),
        (lambda: rewarded_soup({"a": "default"}, [1.0], adapters_of=tiny_arm()), "has no LoRA 'default'"),
        (lambda: rewarded_soup({"a": "soup"}, [1.0], adapters_of=lora_model("soup")), "which is a policy"),
        (lambda: rewarded_soup({"a": tiny_arm()}, [1.0]), "Load LoRAs into one `PeftModel`"),
        (
            lambda: rewarded_soup({"a": tiny_llama(), "b": tiny_llama(hidden_size=48)}, [0.5, 0.5]),
            "policies differ in",
        ),
        (
            lambda: rewarded_soup({"a": tiny_llama(), "b": tiny_llama(num_hidden_layers=3)}, [0.5, 0.5]),
            r"policies differ in model.layers.2.*: shapes none and",
        ),
        (
            lambda: rewarded_soup({"a": tiny_llama(), "b": lora_model("default").get_base_model()}, [0.5, 0.5]),
            "A policy, a LlamaForCausalLM, has adapters in it",
        ),
        (
            lambda: rewarded_soup({"a": tiny_llama(), "b": tiny_llama(tie_word_embeddings=True)}, [0.5, 0.5]),
            "tied to the embedding",
        ),
        (lambda: rewarded_soup({"a": packed(0), "b": packed(1)}, [0.5, 0.5]), "whole numbers in .*packed that differ"),
    ],
)
def test_bad_soups(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def log_probs(arm, ids, last):
    with torch.no_grad():
        logits = copy.deepcopy(arm).double()(ids).logits
    return torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[-last:, 0]


def test_token_rewards_are_the_log_probabilities_and_their_ratio():
    arm, tokenizer = tiny_arm(), tiny_tokenizer()
    set_preference(arm, [0.5, 0.5])
    found = token_rewards(arm, tokenizer, "w1 w2 w3", "w4 w5 w6 w7", {"helpful": 0.2, "harmless": 0.8})
    ids = torch.tensor([tokenizer("w1 w2 w3 w4 w5 w6 w7")["input_ids"]])
    torch.testing.assert_close(get_preference(arm), torch.tensor([0.5, 0.5]))
    set_preference(arm, [0.2, 0.8])
    own, untrained = log_probs(arm, ids, 4), log_probs(copy.deepcopy(arm).unload(), ids, 4)
    torch.testing.assert_close(torch.tensor([t.reward for t in found]).double(), own, atol=1e-4, rtol=1e-4)
    ratios = torch.tensor([t.log_ratio for t in found]).double()
    torch.testing.assert_close(ratios, own - untrained, atol=1e-4, rtol=1e-4)
    assert [t.token_id for t in found] == ids[0, 3:].tolist()
    assert found.total.text == tokenizer.decode(ids[0, 3:])
    assert found.total.log_ratio == pytest.approx(ratios.sum().item(), abs=1e-4)
    assert found.to_dicts()[0].keys() == {"text", "token_id", "reward", "log_ratio"}
    set_preference(arm, [1.0, 0.0])
    elsewhere = log_probs(arm, ids, 4)
    compared = token_rewards(arm, tokenizer, "w1 w2 w3", "w4 w5 w6 w7", [0.2, 0.8], reference=[1.0, 0.0])
    ratios = torch.tensor([t.log_ratio for t in compared]).double()
    torch.testing.assert_close(ratios, own - elsewhere, atol=1e-4, rtol=1e-4)
    other = tiny_llama(3)
    compared = token_rewards(tiny_llama(1), tokenizer, "w1 w2 w3", "w4 w5", reference=other)
    expected = (log_probs(tiny_llama(1), ids[:, :5], 2) - log_probs(other, ids[:, :5], 2)).tolist()
    assert [t.log_ratio for t in compared] == pytest.approx(expected, abs=1e-4)


def test_colours_follow_the_log_ratio():
    arm, tokenizer = tiny_arm(), tiny_tokenizer()
    found = token_rewards(arm, tokenizer, [{"role": "user", "content": "w1"}], "w4 w5 w6", [0.2, 0.8])
    page = found.to_html()
    colours = [tuple(map(int, c)) for c in re.findall(r"rgb\((\d+),(\d+),(\d+)\)", page)]
    assert len(colours) == 3
    for token, (r, _, b) in zip(found, colours):
        assert (b > r) == (token.log_ratio > 0)
    largest = max(range(3), key=lambda i: abs(found[i].log_ratio))
    assert colours[largest] in ((90, 150, 255), (255, 110, 100))
    pieces = re.findall(r">([^<]*)</span>", page)
    text = tokenizer.decode(tokenizer("w4 w5 w6")["input_ids"])
    assert html.unescape("".join(pieces)) == text
    assert re.sub(r"\x1b\[[0-9;]*m", "", found.to_terminal()) == text
    assert found._repr_html_() == page
    assert "script" not in page
    with pytest.raises(ValueError, match="`scale` is 0"):
        found.to_html(scale=0)


def test_texts_are_escaped_and_characters_of_several_tokens_are_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    arm = tiny_arm(tiny_llama(1, vocab_size=256))
    found = token_rewards(arm, tokenizer, "a", "<é🙂>\n", [0.2, 0.8])
    assert [t.text for t in found] == ["<", "", "é", "", "", "", "🙂", ">", "\n"]
    page = found.to_html()
    assert "&lt;" in page
    assert "<é" not in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: token_rewards(tiny_arm(), t, "w1", "", [0.5, 0.5]), "at least one token each"),
        (lambda t: token_rewards(tiny_llama(), t, "w1", "w2"), "no adapter to compare it without"),
    ],
)
def test_bad_token_rewards(make, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        make(tokenizer)


def test_token_rewards_set_the_preference_of_no_other_adapter():
    """Of one with other objectives neither, whichever is active."""
    arm, tokenizer = tiny_arm(), tiny_tokenizer()
    other = PBLoraConfig(objectives=["a", "b", "c"], target_modules=["q_proj"], init_weights=False)
    arm.add_adapter("other", other)
    set_preference(arm, [0.2, 0.3, 0.5], "other")
    set_preference(arm, [0.3, 0.7], "default")
    alone = token_rewards(tiny_arm(), tokenizer, "w1 w2", "w3", [0.6, 0.4]).total
    for active, preference in (("default", [0.6, 0.4]), ("other", [0.1, 0.1, 0.8])):
        arm.set_adapter(active)
        assert token_rewards(arm, tokenizer, "w1 w2", "w3", [0.6, 0.4], adapter_name="default").total == alone
        assert token_rewards(arm, tokenizer, "w1 w2", "w3", preference).total.log_ratio != 0
        assert get_preference(arm, "other").tolist() == pytest.approx([0.2, 0.3, 0.5])
        assert get_preference(arm, "default").tolist() == pytest.approx([0.3, 0.7])
