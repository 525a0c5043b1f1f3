# SPDX-License-Identifier: Apache-2.0
"""LoRAs of one base model as one PBLoRA, against the soup and against dense weights in float64."""

import copy
import json

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from decoding.architectures import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from peft_pblora import (
    from_loras,
    load_adapter,
    sample_preferences,
    save_as_lora,
    set_preference,
)
from peft_pblora.card.text import MARK
from trl_parm import PARM, rewarded_soup


IDS = torch.arange(2, 18).view(2, 8)
BASES = {"Llama": tiny_llama, "GPT-2": tiny_gpt2, "Mixtral": lambda: tiny("Mixtral")}
TARGETS = {
    "Llama": ["q_proj", "v_proj", "down_proj"],
    "GPT-2": ["c_attn", "c_proj"],
    "Mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
KINDS = {
    "plain": ({}, {}),
    "other ranks": ({"r": 3}, {"r": 5, "lora_alpha": 7}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "other modules": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "up_proj"]}),
    "layers of one": ({"layers_to_transform": [0]}, {}),
    "patterns": (
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"r": 8, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}},
    ),
    "a pattern of modules": ({"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}, {}),
}


def two_loras(base, first: dict, second: dict, targets=("q_proj", "v_proj")) -> PeftModel:
    """A model with the random LoRAs `a` and `b`."""
    model = None
    for name, settings in (("a", first), ("b", second)):
        torch.manual_seed(ord(name))
        settings = {"r": 4, "lora_alpha": 12, "target_modules": list(targets), **settings}
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def saved(model, folder) -> dict[str, str]:
    model.save_pretrained(str(folder))
    return {"x": str(folder / "a"), "y": str(folder / "b")}


def dense(model, weights: dict[str, float]):
    """The base model with Σ α_i ΔW_i in its weights, in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model.get_base_model(), "set_experts_implementation"):
        model.get_base_model().set_experts_implementation("eager")
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
        for name, weight in weights.items():
            if name in layer.lora_A:
                layer.get_base_layer().weight.data += weight * layer.get_delta_weight(name)
    return model.unload()


def random_preferences() -> list[list[float]]:
    drawn = sample_preferences(3, ["x", "y"], generator=torch.Generator().manual_seed(0))
    return [[1.0, 0.0], [0.0, 1.0], *drawn.tolist()]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_one_adapter_is_the_soup_at_every_preference_on_every_architecture(name, tmp_path):
    model = two_loras(BASES[name](), {}, {"r": 3, "use_rslora": True}, TARGETS[name])
    errors = from_loras({"x": "a", "y": "b"}, tmp_path / "arm", model)
    assert set(errors.values()) == {0.0}
    assert len(errors) == sum(isinstance(layer, LoraLayer) for layer in model.modules())
    arm = load_adapter(BASES[name](), tmp_path / "arm").eval()
    config = arm.peft_config["default"]
    assert (config.objectives, config.r1, config.r2, config.fan_in_fan_out) == (["x", "y"], 0, 7, name == "GPT-2")
    assert config.target_modules == set(TARGETS[name])
    for weights in random_preferences():
        set_preference(arm, weights)
        expected = dense(model, dict(zip("ab", weights)))(IDS).logits
        torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
        soup = rewarded_soup({"x": "a", "y": "b"}, weights, adapters_of=model)
        torch.testing.assert_close(arm(IDS).logits, soup(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_lora_may_have_from_folders_is_exact(kind, tmp_path):
    model = two_loras(tiny_llama(), *KINDS[kind])
    base = tiny_llama()
    folders = saved(model, tmp_path / "loras")
    from_loras(folders, tmp_path / "arm", base)
    assert not any("lora" in name for name, _ in base.named_parameters())
    arm = load_adapter(base, tmp_path / "arm").eval()
    for weights in random_preferences():
        set_preference(arm, weights)
        expected = dense(model, dict(zip("ab", weights)))(IDS).logits
        torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
    from_loras({"x": "a", "y": "b"}, tmp_path / "again", model)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("arm", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


HEADS = {name: ["lm_head", *TARGETS[name][:1]] for name in BASES}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_loras_of_the_output_layer_from_folders_are_exact(name, tmp_path):
    """PEFT saves the layer's own weight beside them."""
    base = tiny(name)
    model = two_loras(tiny(name), {}, {"r": 3}, HEADS[name])
    folders = saved(model, tmp_path / "loras")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "loras/a/adapter_model.safetensors")
    assert set(from_loras(folders, tmp_path / "arm", base).values()) == {0.0}
    from_loras({"x": "a", "y": "b"}, tmp_path / "again", model)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("arm", "again"))
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    for key, parameter in tiny(name).named_parameters():
        assert torch.equal(base.get_parameter(key), parameter)
    arm = load_adapter(base, tmp_path / "arm").eval()
    for weights in random_preferences():
        set_preference(arm, weights)
        expected = dense(model, dict(zip("ab", weights)))(IDS).logits
        torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_loras_of_the_output_layer_on_the_base_that_they_name(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = two_loras(type(tiny_llama()).from_pretrained(tmp_path / "base"), {}, {}, HEADS["Llama"])
    assert set(from_loras(saved(model, tmp_path / "loras"), tmp_path / "arm").values()) == {0.0}
    arm = load_adapter(None, tmp_path / "arm").eval()
    set_preference(arm, [0.4, 0.6])
    expected = dense(model, {"a": 0.4, "b": 0.6})(IDS).logits
    torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_loras_with_other_weights_of_the_base_model_are_refused(tmp_path):
    other = tiny_llama()
    other.lm_head.weight.data *= 1.5
    folders = saved(two_loras(other, {}, {}, HEADS["Llama"]), tmp_path / "head")
    with pytest.raises(ValueError, match="`lm_head.weight` of the model that it was trained on, and 64 of 64 rows"):
        from_loras(folders, tmp_path / "arm", tiny_llama())
    two_loras(tiny_llama(), {}, {}).save_pretrained(tmp_path / "all", save_embedding_layers=True)
    folders = {"x": str(tmp_path / "all/a"), "y": str(tmp_path / "all/b")}
    with pytest.raises(ValueError, match=r"has weights of its base model \(.*lm_head.weight\), but a PBLoRA is"):
        from_loras(folders, tmp_path / "arm", tiny_llama())
    assert not (tmp_path / "arm").exists()


def test_the_base_is_found_by_the_name_that_the_loras_have(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = two_loras(type(tiny_llama()).from_pretrained(tmp_path / "base"), {}, {})
    before = {name: p.clone() for name, p in model.named_parameters()}
    folders = saved(model, tmp_path / "loras")
    from_loras(folders, tmp_path / "arm")
    card = (tmp_path / "arm/README.md").read_text()
    assert MARK in card
    assert "PBLoRA" in card
    arm = load_adapter(None, tmp_path / "arm").eval()
    assert arm.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    set_preference(arm, [0.4, 0.6])
    expected = dense(model, {"a": 0.4, "b": 0.6})(IDS).logits
    torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
    assert {name: p for name, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_adapter_guides_exports_merges_and_trains_on(tmp_path):
    model = two_loras(tiny_llama(), {}, {})
    from_loras({"x": "a", "y": "b"}, tmp_path / "arm", model)
    base = tiny_llama()
    arm = load_adapter(base, tmp_path / "arm", is_trainable=True)
    soup = rewarded_soup({"x": "a", "y": "b"}, [0.3, 0.7], adapters_of=model)
    merged = copy.deepcopy(soup).merge_and_unload()
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = PARM(tiny_llama(), merged, beta=0.5).generate(IDS[:, :4], **options)
    assert torch.equal(PARM(base, arm.eval(), [0.3, 0.7], beta=0.5).generate(IDS[:, :4], **options), expected)
    save_as_lora(arm, tmp_path / "lora", [0.3, 0.7])
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(exported(IDS).logits, soup(IDS).logits, atol=1e-5, rtol=1e-5)
    set_preference(arm, [0.3, 0.7])
    arm(IDS).logits.sum().backward()
    assert all(p.grad is not None for name, p in arm.named_parameters() if ".core.W2" in name)
    torch.testing.assert_close(arm.merge_and_unload()(IDS).logits, soup(IDS).logits, atol=1e-4, rtol=1e-4)


def test_three_objectives_of_which_two_share_a_lora(tmp_path):
    model = two_loras(tiny_llama(), {}, {})
    from_loras({"x": "a", "y": "b", "z": "a"}, tmp_path / "arm", model)
    arm = load_adapter(tiny_llama(), tmp_path / "arm").eval()
    set_preference(arm, [0.2, 0.5, 0.3])
    expected = dense(model, {"a": 0.5, "b": 0.5})(IDS).logits
    torch.testing.assert_close(arm(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 7, 8])
def test_a_smaller_rank_has_the_errors_that_it_states(rank, tmp_path):
    model = two_loras(tiny_llama(), {}, {"layers_to_transform": [0]})
    errors = from_loras({"x": "a", "y": "b"}, tmp_path / "arm", model, rank=rank)
    arm = load_adapter(tiny_llama(), tmp_path / "arm").eval()
    assert arm.peft_config["default"].r2 == rank
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert errors.keys() == layers.keys()
    for place, layer in layers.items():
        own = [layer.get_delta_weight(name) for name in "ab" if name in layer.lora_A]
        whole = torch.stack(own if len(own) == 2 else [*own, torch.zeros_like(own[0])]).double()
        cut = arm.base_model.model.get_submodule(place)
        found = torch.stack([cut.get_delta_weight("default", v) for v in torch.eye(2)]).double()
        error = float((whole - found).norm() / whole.norm())
        assert errors[place] == pytest.approx(error, abs=1e-5)
        assert (errors[place] == 0) == (rank >= 4 * len(own))
        # No better than the best of its rank in each mode, no worse than both tails together.
        tails = [torch.linalg.svdvals(torch.cat(list(whole), dim))[rank:].norm() / whole.norm() for dim in (0, 1)]
        assert max(tails) - 1e-5 <= error <= float(torch.stack(tails).norm()) + 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "has DoRA, but a PBLoRA is a sum of products in linear layers"),
        ({"lora_bias": True}, "has `lora_bias`"),
        ({"bias": "lora_only"}, "has `bias`"),
        ({"modules_to_save": ["lm_head"]}, "has `modules_to_save`"),
        ({"trainable_token_indices": [3]}, "has `trainable_token_indices`"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "has layers that are embeddings"),
    ],
)
@pytest.mark.parametrize("from_folders", [False, True])
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_what_is_no_sum_in_linear_layers_is_refused(settings, message, from_folders, tmp_path):
    in_memory = not from_folders or "trainable_token_indices" not in settings  # which PEFT can't save beside another's
    model = two_loras(tiny_llama(), {}, settings if in_memory else {})
    loras = saved(model, tmp_path / "loras") if from_folders else {"x": "a", "y": "b"}
    if not in_memory:
        changed(loras["y"], **settings)
    with pytest.raises(ValueError, match=message):
        from_loras(loras, tmp_path / "arm", tiny_llama() if from_folders else model)
    assert not (tmp_path / "arm").exists()


def changed(folder, **changes) -> str:
    file = f"{folder}/adapter_config.json"
    with open(file) as opened:
        config = json.load(opened)
    with open(file, "w") as opened:
        json.dump({**config, **changes}, opened)
    return folder


def test_loras_that_do_not_belong_together_are_refused(tmp_path):
    model = two_loras(tiny_llama(), {}, {})
    folders, out, base = saved(model, tmp_path / "loras"), tmp_path / "arm", tiny_llama()
    changed(folders["x"], base_model_name_or_path="one/base")
    changed(folders["y"], base_model_name_or_path="another/base")
    with pytest.raises(ValueError, match="differ in `base_model_name_or_path`: .* has 'one/base', .* 'another/base'"):
        from_loras(folders, out, base)
    changed(folders["y"], base_model_name_or_path="one/base")
    with pytest.raises(ValueError, match="base model 'one/base' can't be read. Pass the model as `model`"):
        from_loras(folders, out)
    from_loras(folders, tmp_path / "whole", base)
    with pytest.raises(ValueError, match="can't be loaded: size mismatch"):
        from_loras(folders, out, tiny_llama(hidden_size=16))
    changed(folders["y"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="started with `init_lora_weights='pissa'`, which changes the weights"):
        from_loras(folders, out, base)
    with pytest.raises(ValueError, match="'nowhere' can't be loaded"):
        from_loras({"x": folders["x"], "y": "nowhere"}, out, base)
    with pytest.raises(ValueError, match="is an adapter of the method .*PBLORA, but it must be a LoRA"):
        from_loras({"x": str(tmp_path / "whole")}, out, base)
    assert not out.exists()


@pytest.mark.parametrize(
    ("loras", "options", "message"),
    [
        ({"x": "a", "y": "c"}, {}, "'c' is not there, but it must be a LoRA in the model, whose adapters are a, b"),
        ({}, {}, "it must be a list of one or more non-empty names"),
        ({"x": "a", "y": "b"}, {"rank": 9}, "`rank` is 9, but it must lie between 1 and 8"),
        ({"x": "a", "y": "b"}, {"rank": 0}, "`rank` is 0"),
        ({"x": "a", "y": "b"}, {"rank": 2.0}, "`rank` is 2.0, but it must be a whole number"),
        ({"x": "a", "y": "b"}, {"rank": True}, "`rank` is True, but it must be a whole number"),
        (["a", "b"], {}, "`loras` is \\['a', 'b'\\], but it must be a mapping from each objective"),
    ],
)
def test_other_bad_input_is_refused(loras, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_loras(loras, tmp_path / "arm", two_loras(tiny_llama(), {}, {}), **options)
    assert not (tmp_path / "arm").exists()


def test_merged_loras_and_folders_of_anybody_else_are_refused(tmp_path):
    model = two_loras(tiny_llama(), {}, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        from_loras({"x": "a", "y": "b"}, tmp_path / "mine", model)
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="'a' is merged into the weights"):
        from_loras({"x": "a", "y": "b"}, tmp_path / "arm", model)
    model.unmerge_adapter()
    for _ in range(2):  # its own folder is replaced
        from_loras({"x": "a", "y": "b"}, tmp_path / "arm", model)
