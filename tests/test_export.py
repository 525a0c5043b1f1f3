# SPDX-License-Identifier: Apache-2.0
"""Adapters that travel: exported to plain LoRA, and those of the authors' code."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from adapter_table import every_adapter, make_model
from conftest import OBJECTIVES, needs_add_adapter, tiny_arm, tiny_gpt2, tiny_llama
from decoding.architectures import ARCHITECTURES, Cell, tiny
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_pblora import (
    MoSLoraConfig,
    PBLoraConfig,
    SVDLoraConfig,
    get_preference,
    preference_grid,
    sample_preferences,
    save_as_lora,
    set_preference,
)
from peft_pblora.layer import PreferenceLinear
from peft_pblora.output import NOTES


IDS = torch.arange(2, 18).view(2, 8)
NO_LORA = {
    "Qwen3-Next": "PEFT would load this adapter as another LoRA",  # shared experts are taken for the routed ones
    "DeepSeek-V3": "PEFT would load this adapter as another LoRA",  # and so are dense layers
}
"""With all linear layers as targets."""


@every_adapter
def test_exported_lora_is_exact(row, tmp_path):
    model = make_model(row)
    for preference in ([1.0, 0.0, 0.0], [0.2, 0.3, 0.5]):
        save_as_lora(model, tmp_path / "lora", preference)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        set_preference(model, preference)
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "all linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_peft_loads_is_the_arm_on_every_architecture_or_it_is_refused(name, targets, tmp_path):
    architecture = ARCHITECTURES[name]
    layers = architecture.attention if targets == "attention" else architecture.all_linear
    arm = Cell.adapted(tiny(name), "PBLoRA", layers)
    if name in NO_LORA and targets == "all linear":
        with pytest.raises(ValueError, match=NO_LORA[name]):
            save_as_lora(arm, tmp_path / "lora", [0.3, 0.7])
        assert not (tmp_path / "lora").exists()
        return
    weights = [tensor.clone() for tensor in arm.state_dict().values()]
    save_as_lora(arm, tmp_path / "lora", [0.3, 0.7])
    assert all(torch.equal(old, new) for old, new in zip(weights, arm.state_dict().values(), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        loaded = PeftModel.from_pretrained(tiny(name), tmp_path / "lora").eval()
    set_preference(arm, [0.3, 0.7])
    inputs = {"input_ids": IDS}
    if arm.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    base, expected, found = (model(**inputs).logits for model in (tiny(name), arm, loaded))
    assert (base - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_export_finds_its_modules_by_their_names_where_the_targets_mean_others(tmp_path):
    """Named projections of a mixture's experts, which are no modules, are found by PEFT as parameters."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_experts=4, num_experts_per_tok=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base = OlmoeForCausalLM(config).eval()
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    arm = Cell.adapted(copy.deepcopy(base), "PBLoRA", targets)
    save_as_lora(arm, tmp_path, [0.3, 0.7])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    loaded = PeftModel.from_pretrained(base, tmp_path)
    set_preference(arm, [0.3, 0.7])
    torch.testing.assert_close(loaded(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not any("experts" in key for key in get_peft_model_state_dict(loaded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_and_unmerging_costs_no_more_precision_than_lora(dtype, tmp_path):
    """The same ΔW as PBLoRA and as the LoRA it exports to, merged into and taken out of the same base weights."""
    save_as_lora(tiny_arm(), tmp_path, [0.25, 0.75])
    ours = tiny_arm(tiny_llama(1).to(dtype))
    set_preference(ours, [0.25, 0.75])
    errors = []
    for model in (ours, PeftModel.from_pretrained(tiny_llama(1).to(dtype), tmp_path)):
        weights = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "get_base_layer")]
        before = [weight.clone() for weight in weights]
        model.merge_adapter()
        model.unmerge_adapter()
        after = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "get_base_layer")]
        assert all(weight.dtype == dtype for weight in after)
        errors.append(max((a - b).abs().max().item() for a, b in zip(after, before)))
    assert errors[0] <= errors[1] * 1.5 + 1e-7


def test_exported_lora_loads_where_this_package_was_never_imported(tmp_path):
    model = tiny_arm()
    tiny_llama(1).save_pretrained(tmp_path / "base")
    save_as_lora(model, tmp_path / "lora", {"helpful": 0.25, "harmless": 0.75})
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
assert not any(name.startswith(("peft_pblora", "trl_parm")) for name in sys.modules)
torch.save(model(torch.arange(2, 18).view(2, 8)).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    set_preference(model, [0.25, 0.75])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_export_pads_to_a_rank_that_an_engine_accepts(tmp_path):
    model = tiny_arm()
    save_as_lora(model, tmp_path, [0.5, 0.5], rank=8)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in weights.items() if "lora_A" in key} == {8}
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path).eval()
    set_preference(model, [0.5, 0.5])
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    for rank in (4, 0):
        with pytest.raises(ValueError, match=f"`rank` is {rank}, but the adapter has rank 5 already"):
            save_as_lora(model, tmp_path / "small", [0.5, 0.5], rank=rank)
    assert not (tmp_path / "small").exists()


def test_export_of_a_whole_grid(tmp_path):
    model = tiny_arm()
    folders = save_as_lora(model, tmp_path, preference_grid(OBJECTIVES, 2))
    assert [folder.name for folder in folders] == ["harmless", "uniform", "helpful"]
    assert {path.name for path in tmp_path.iterdir()} == {"harmless", "uniform", "helpful"}
    set_preference(model, [1.0, 0.0])
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "helpful").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@every_adapter
def test_vertices_weighted_by_the_preference_are_the_adapter(row, tmp_path):
    model = make_model(row)
    objectives = model.peft_config["default"].objectives
    folders = save_as_lora(model, tmp_path, torch.eye(len(objectives)))
    loaded = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="v0").eval()
    for number, folder in enumerate(folders[1:], 1):
        loaded.load_adapter(folder, f"v{number}")
    biased = any(config.lora_bias for config in loaded.peft_config.values())
    for preference in sample_preferences(3, objectives, generator=torch.Generator().manual_seed(0)):
        # As an engine that has a scale for each LoRA of a request: all of them are active, each by its weight.
        loaded.base_model.set_adapter([f"v{number}" for number in range(len(folders))])
        for layer in loaded.modules():
            if isinstance(layer, BaseTunerLayer):
                for number, weight in enumerate(preference.tolist()):
                    layer.set_scale(f"v{number}", weight)
        set_preference(model, preference)
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert biased == (model.peft_config["default"].peft_type == "MOSLORA")


@every_adapter
def test_beyond_the_simplex_an_adapter_and_its_export_extrapolate(row, tmp_path):
    model, preference = make_model(row), [1.5, -0.7, 0.4]
    with pytest.raises(ValueError, match="allow_off_simplex=True"):
        set_preference(model, preference)
    set_preference(model, preference, allow_off_simplex=True)
    assert get_preference(model).tolist() == pytest.approx(preference)
    (folder,) = save_as_lora(model, tmp_path / "lora", preference, allow_off_simplex=True)
    loaded = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_export_of_a_grid_at_an_engines_rank(tmp_path):
    model, grid = tiny_arm(), preference_grid(OBJECTIVES, 4)
    for folder, preference in zip(save_as_lora(model, tmp_path, grid, rank=16), grid, strict=True):
        set_preference(model, preference)
        loaded = PeftModel.from_pretrained(tiny_llama(1), folder).eval()
        assert (loaded.peft_config["default"].r, loaded.peft_config["default"].lora_alpha) == (16, 16)
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@every_adapter
@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_export_keeps_the_choice_of_modules(row, choice, tmp_path):
    base = tiny_gpt2 if "fan_in_fan_out" in choice else tiny_llama
    model = make_model(row, base(), **choice)
    save_as_lora(model, tmp_path, [2, 3, 5], normalize=True, rank=8)
    set_preference(model, [0.2, 0.3, 0.5])
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    adapted = [sum(isinstance(m, BaseTunerLayer) for m in arm.modules()) for arm in (loaded, model)]
    assert adapted[0] == adapted[1] > 0
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_export_has_a_card_that_names_the_preference(tmp_path):
    save_as_lora(tiny_arm(), tmp_path, {"helpful": 0.25, "harmless": 0.75})
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", NOTES,
    }  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert "- helpful: 0.25" in card
    assert "- harmless: 0.75" in card


def test_export_keeps_modules_to_save_and_leaves_the_model_alone(tmp_path):
    model = tiny_arm(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    set_preference(model, [0.9, 0.1])
    save_as_lora(model, tmp_path, [0.5, 0.5])
    torch.testing.assert_close(get_preference(model), torch.tensor([0.9, 0.1]))
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path).eval()
    set_preference(model, [0.5, 0.5])
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "pblora_only"])
def test_export_keeps_trained_biases_whatever_the_adapter_is_called(bias, tmp_path):
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"], bias=bias, init_weights=False)
    model = get_peft_model(tiny_llama(attention_bias=True), config, adapter_name="mine").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    set_preference(model, [0.3, 0.7])
    save_as_lora(model, tmp_path, [0.3, 0.7], adapter_name="mine")
    loaded = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@needs_add_adapter
def test_export_from_transformers_add_adapter(tmp_path):
    model = tiny_llama(1)
    model.add_adapter(PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"], init_weights=False), "arm")
    save_as_lora(model, tmp_path, [0.5, 0.5])
    set_preference(model, [0.5, 0.5])
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_export_from_a_model_of_transformers_keeps_modules_to_save(name, tmp_path):
    make, targets = {"Llama": (tiny_llama, ["q_proj"]), "GPT-2": (tiny_gpt2, ["c_attn"])}[name]
    settings = {"target_modules": targets, "modules_to_save": ["lm_head"], "fan_in_fan_out": name == "GPT-2"}
    model = inject_adapter_in_model(PBLoraConfig(objectives=OBJECTIVES, **settings), make()).eval()
    torch.nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    save_as_lora(model, tmp_path, [0.3, 0.7])
    set_preference(model, [0.3, 0.7])
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


NESTED = {"Llama": (tiny_llama, "q_proj", "v_proj"), "GPT-2": (tiny_gpt2, "c_attn", "c_fc")}


@pytest.mark.parametrize("below", [PBLoraConfig, MoSLoraConfig])
@pytest.mark.parametrize("config", [PBLoraConfig, SVDLoraConfig, MoSLoraConfig])
@pytest.mark.parametrize("name", NESTED)
def test_another_adapter_of_the_name_below_is_not_exported(name, config, below, tmp_path):
    make, lower, upper = NESTED[name]
    settings = {"init_weights": False, "fan_in_fan_out": name == "GPT-2", "task_type": "CAUSAL_LM"}
    base = inject_adapter_in_model(below(objectives=OBJECTIVES[::-1], target_modules=[lower], **settings), make())
    arm = get_peft_model(base, config(objectives=OBJECTIVES, target_modules=[upper], **settings)).eval()
    save_as_lora(arm, tmp_path, {"helpful": 0.9, "harmless": 0.1})
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in keys} == {upper}
    set_preference(arm, {"helpful": 0.9, "harmless": 0.1})
    with torch.no_grad():
        for key, layer in arm.named_modules():
            if isinstance(layer, PreferenceLinear) and key.endswith(lower):
                layer.adapter("default").B.weight.zero_()
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_never_replaces_what_is_no_export(tmp_path):
    """The ARM's own folder with its checkpoints, an export with a file of the user's, and one of a card's edits."""
    arm = tiny_arm()
    arm.save_pretrained(tmp_path / "arm")
    (tmp_path / "arm/checkpoint-10").mkdir()
    (tmp_path / "arm/checkpoint-10/notes.txt").write_text("mine")
    for name in ("beside", "edited", "grid"):
        save_as_lora(arm, tmp_path / name, torch.eye(2) if name == "grid" else [0.5, 0.5])
    (tmp_path / "beside/tokenizer.json").write_text("mine")
    (tmp_path / "edited/README.md").write_text("mine")
    (tmp_path / "grid/helpful/notes.txt").write_text("mine")
    before = files(tmp_path)
    for name in ("arm", "beside", "edited"):
        with pytest.raises(ValueError, match="was not written by 'save_as_lora'"):
            save_as_lora(arm, tmp_path / name, [0.3, 0.7])
    with pytest.raises(ValueError, match="holds notes.txt"):
        save_as_lora(arm, tmp_path / "grid", preference_grid(OBJECTIVES, 4))
    assert files(tmp_path) == before
    save_as_lora(arm, tmp_path / "arm", torch.eye(2))  # beside the adapter's own files
    assert before.items() <= files(tmp_path).items()


def test_an_export_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    arm = tiny_arm()
    save_as_lora(arm, tmp_path / "lora", [0.5, 0.5])
    before = files(tmp_path)
    monkeypatch.setattr("peft_pblora.export.exported_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_as_lora(arm, tmp_path / "lora", [0.3, 0.7])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "preferences",
    [
        torch.tensor([[0.33333, 0.66667], [0.33334, 0.66666]]),
        torch.tensor([[1.0, 0.0], [1.0, 1e-9], [0.9999999, 1e-7], [0.5, 0.5], [0.50000006, 0.49999994]]),
        sample_preferences(40, OBJECTIVES, 0.1, torch.Generator().manual_seed(0)),
    ],
    ids=["near", "near names", "drawn"],
)
def test_every_preference_has_a_folder_of_its_own(tmp_path, preferences):
    folders = save_as_lora(tiny_arm(), tmp_path, preferences)
    assert len({folder.name.casefold() for folder in folders}) == len(preferences)
    written = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    arm = tiny_arm()
    for one in (0, len(folders) - 1):
        save_as_lora(arm, tmp_path / "again", preferences[one])
        again = load_file(tmp_path / "again/adapter_model.safetensors")
        assert all(torch.equal(again[key], written[one][key]) for key in again)


@pytest.mark.parametrize(
    "objectives",
    [
        ["../../up", "{}/root"],
        ["..", "."],
        ["a/b", "a\\b"],
        ["Helpful", "helpful"],
        ["uniform", "other"],
        [".hidden", "-rf"],
        ["x" * 400, "y" * 400],
    ],
    ids=str,
)
def test_no_objective_decides_where_an_export_goes(tmp_path, objectives):
    """Nor does one share the folder of another, or of the uniform preference."""
    (tmp_path / "grid").mkdir()
    objectives = [name.replace("{}", str(tmp_path)) for name in objectives]
    arm = tiny_arm(objectives=objectives)
    folders = save_as_lora(arm, tmp_path / "grid", preference_grid(objectives, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["grid"]
    assert sorted((tmp_path / "grid").iterdir()) == sorted(folders)
    assert len({folder.name.casefold() for folder in folders}) == 3
    for folder, weight in zip(folders, (0, 0.5, 1)):
        assert f": {weight:g}\n" in (folder / "README.md").read_text()
        set_preference(arm, [weight, 1 - weight])
        loaded = PeftModel.from_pretrained(tiny_llama(1), folder).eval()
        torch.testing.assert_close(loaded(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)


def test_bad_exports(tmp_path):
    with pytest.raises(ValueError, match="The preference helpful is in the grid twice"):
        save_as_lora(tiny_arm(), tmp_path / "a", [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    with pytest.raises(ValueError, match="must sum to 1"):
        save_as_lora(tiny_arm(), tmp_path / "a", [0.5, 0.6])
    with pytest.raises(ValueError, match="no preference-conditioned adapter 'other'"):
        save_as_lora(tiny_arm(), tmp_path / "a", [0.5, 0.5], adapter_name="other")
    assert not (tmp_path / "a").exists()


def write_official_adapter(folder, k: int, r1: int, r2: int) -> dict[str, dict[str, torch.Tensor]]:
    """A folder with the tensor names and config keys of the authors' code; returns its tensors by module."""
    torch.manual_seed(3)
    r, outputs = r1 + r2, {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    modules = {
        f"model.layers.{layer}.self_attn.{name}": {"A": (r, 32), "B": (m, r), "W1": (r1, r1), "W2": (k, r2 * r2)}
        for layer in range(2)
        for name, m in outputs.items()
    }
    tensors = {m: {part: torch.randn(shape) * 0.3 for part, shape in parts.items()} for m, parts in modules.items()}
    folder.mkdir()
    save_file(
        {f"base_model.model.{m}.pblora_{part}": t for m, parts in tensors.items() for part, t in parts.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "PBLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "inference_mode": True,
        "r1": r1, "r2": r2, "obj_num": k, "pref_vec_init": [1.0] + [0.0] * (k - 1), "lora_alpha": 8,
        "lora_dropout": 0.0, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def with_official_delta(tensors, preference, r1: int, r2: int):
    """The base model with the authors' dense delta added: s · (B1 W1 A1 + B2 (α φ).view(r2, r2) A2), s = 8 / r2."""
    model = tiny_llama(1).double()
    for name, parts in tensors.items():
        a, b, w1, phi = (parts[part].double() for part in ("A", "B", "W1", "W2"))
        w2 = (torch.tensor(preference, dtype=torch.float64) @ phi).view(r2, r2)
        delta = 8 / r2 * (b[:, :r1] @ w1 @ a[:r1] + b[:, r1:] @ w2 @ a[r1:])
        model.get_submodule(name).weight.data += delta
    return model


def test_official_adapters_load_unchanged(tmp_path):
    tensors = write_official_adapter(tmp_path / "official", k=3, r1=4, r2=2)
    model = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "official", adapter_name="theirs").eval()
    assert model.peft_config["theirs"].objectives == ["objective_1", "objective_2", "objective_3"]
    assert get_preference(model).tolist() == [1.0, 0.0, 0.0]
    for preference in ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]):
        set_preference(model, preference)
        expected = with_official_delta(tensors, preference, 4, 2)(IDS).logits
        torch.testing.assert_close(model(IDS).logits.double(), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "ours" / "theirs").eval()
    set_preference(again, preference)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_objective_names_can_be_given_to_an_official_adapter(tmp_path):
    write_official_adapter(tmp_path / "official", k=2, r1=4, r2=2)
    config = PeftConfig.from_pretrained(tmp_path / "official")
    config.objectives = ["harmless", "helpful"]  # the authors' order in their safety task
    model = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "official", config=config)
    set_preference(model, {"helpful": 0.25, "harmless": 0.75})
    assert get_preference(model).tolist() == [0.75, 0.25]


def test_objective_names_can_be_written_into_an_official_folder(tmp_path):
    write_official_adapter(tmp_path / "official", k=2, r1=4, r2=2)
    path = tmp_path / "official" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "objectives": ["harmless", "helpful"]}))
    model = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "official")
    set_preference(model, {"helpful": 0.25, "harmless": 0.75})
    assert get_preference(model).tolist() == [0.75, 0.25]


def test_an_official_preference_off_the_simplex_is_not_taken_over():
    with pytest.warns(UserWarning, match="`pref_vec_init` is not used: .*must sum to 1"):
        config = PBLoraConfig(obj_num=2, pref_vec_init=[0.5, 0.9])
    assert config.initial_preference == [0.5, 0.5]


def test_the_state_dict_has_no_adapter_name_and_no_preference():
    keys = list(get_peft_model_state_dict(tiny_arm()))
    assert keys
    assert not any("default" in key or "preference" in key for key in keys)
