# SPDX-License-Identifier: Apache-2.0
"""How the adapted layers start, what they never build, what they refuse, and what importing them leaves alone."""

import copy
import importlib
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import peft
import pytest
import torch
from adapter_table import TABLE, every_adapter, make_model
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconMambaConfig,
    JambaConfig,
    Llama4TextConfig,
    Mamba2Config,
    MambaConfig,
    PhimoeConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from peft_pblora import MoSLoraConfig, PBLoraConfig, as_preference, sample_preferences, set_preference
from peft_pblora.adapter import LowRankAdapter
from peft_pblora.condition import Condition
from peft_pblora.cores import MoSLoraCore, PBLoraCore, SVDLoraCore
from peft_pblora.layer import PreferenceLinear
from peft_pblora.model import is_linear, register


IDS = torch.arange(2, 18).view(2, 8)


def assert_uniform(weight: torch.Tensor, fan_in: int) -> None:
    """kaiming_uniform(a=√5) is U(−b, b) with b = 1/√fan_in, of standard deviation b/√3."""
    assert weight.abs().max() <= fan_in**-0.5
    assert weight.std().item() == pytest.approx((fan_in * 3) ** -0.5, rel=0.1)


def assert_normal(weight: torch.Tensor, deviation: float) -> None:
    assert weight.mean().item() == pytest.approx(0, abs=deviation / 10)
    assert weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_parameters_start_as_the_authors_draw_them():
    torch.manual_seed(0)
    core = PBLoraCore(3, 50, 20)
    adapter = LowRankAdapter(80, 60, core, 1.0, Condition(["a", "b", "c"], [0.2, 0.3, 0.5]))
    assert_uniform(adapter.A.weight, 80)
    assert not adapter.B.weight.any()
    assert_uniform(core.W1, 50)
    assert_uniform(core.W2, 400)
    assert_normal(SVDLoraCore(3, 2000).sigma, 0.02)
    assert_normal(torch.cat([SVDLoraCore(3, 1).c for _ in range(2000)]), 0.5)
    moslora = MoSLoraCore(3, 4, embedding_size=1000)
    assert not moslora.M.any()
    assert_normal(moslora.embeddings, 1.0)


class LargestNew(TorchDispatchMode):
    """Notes the largest tensor that is made, the frozen weight and views of it left out."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.largest = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, tensor.numel())
        return output


@every_adapter
@pytest.mark.parametrize("rows", [False, True], ids=["one", "rows"])
def test_nothing_of_the_size_of_the_weight_is_ever_made(row, rows):
    config = row.config(objectives=["a", "b", "c"], target_modules=["0"], init_weights=False, **row.settings)
    model = get_peft_model(nn.Sequential(nn.Linear(60, 50, bias=False)), config)
    set_preference(model, torch.eye(3)[:2] if rows else [0.2, 0.3, 0.5])
    layer = model.base_model.model[0]
    x = torch.randn(2, 3, 60, requires_grad=True)
    with LargestNew(layer.get_base_layer().weight) as seen:
        layer(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    assert 2 * 3 * 60 <= seen.largest < 60 * 50 / 3


def test_the_measure_of_size_sees_a_dense_delta():
    layer = nn.Linear(60, 50, bias=False)
    with LargestNew(layer.weight) as seen:
        torch.randn(50, 4) @ torch.randn(4, 60)
    assert seen.largest == 60 * 50


def test_empty_batches_and_bases_that_are_not_contiguous():
    adapter = LowRankAdapter(6, 5, PBLoraCore(2, 2, 2), 1.0, Condition(OBJECTIVES, [0.5, 0.5]), identity=False).eval()
    for preference in ([0.2, 0.8], [[0.2, 0.8], [1.0, 0.0]]):
        adapter.condition.set(torch.tensor(preference))
        x, result = torch.randn(6, 3, 2).permute(2, 1, 0), torch.randn(5, 3, 2).permute(2, 1, 0)
        expected = adapter(x, result)
        assert adapter(x[:0], result[:0]).shape == (0, 3, 5)
        with torch.no_grad():
            torch.testing.assert_close(adapter(x, result.clone()), expected)
            assert adapter(x[:0], result[:0].clone()).shape == (0, 3, 5)
            flat = adapter(x[:, 0], result[:, 0].clone())
        torch.testing.assert_close(flat, expected[:, 0])


def test_a_fold_made_under_autocast_is_not_rounded():
    torch.manual_seed(0)
    adapter = LowRankAdapter(
        64, 50, PBLoraCore(2, 2, 2), 1.0, Condition(OBJECTIVES, [0.5, 0.5]), identity=False
    ).eval()
    x, result = torch.randn(2, 3, 64), torch.randn(2, 3, 50)
    expected = adapter(x, result)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            adapter(x, result.clone())
        torch.testing.assert_close(adapter(x, result.clone()), expected, atol=1e-5, rtol=1e-5)


def test_what_the_layers_refuse():
    model = make_model(TABLE["pblora"])
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(input_ids=IDS, adapter_names=["default"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(input_ids=IDS, adapter_names=["default"] * 2)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.adapter("default").A.weight[0, 0] = float("nan")
    before = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    after = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("n", "concentration", "message"),
    [
        (0, 1.0, "`n` is 0, but at least one preference must be drawn"),
        (1, [1.0, 1.0], r"`concentration` has shape \(2,\), but there are 3 objectives"),
        (1, 0.0, "`concentration` is 0.0, but it must be positive and finite"),
        (1, [1.0, float("inf"), 1.0], "must be positive and finite"),
    ],
)
def test_bad_samples_are_told_apart(n, concentration, message):
    with pytest.raises(ValueError, match=message):
        sample_preferences(n, ["a", "b", "c"], concentration)


def test_normalize_takes_weights_whose_sum_overflows():
    torch.testing.assert_close(as_preference([3e38, 3e38], OBJECTIVES, normalize=True), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        as_preference([float("inf"), 1.0], OBJECTIVES, normalize=True)


def test_names_of_another_number_than_an_official_adapter_has():
    with pytest.raises(ValueError, match="`objectives` names .* but the adapter has `obj_num` 2"):
        PBLoraConfig(obj_num=2, objectives=["a", "b", "c"])


def test_a_prefix_or_an_enum_member_of_peft_takes_precedence(monkeypatch):
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        monkeypatch.setattr(peft.mapping, name, dict(getattr(peft.mapping, name)))
    del peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PBLORA"], peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["PBLORA"]
    taken = {**peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, "THEIRS": "pblora_"}
    monkeypatch.setattr(peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING", taken)
    with pytest.warns(UserWarning, match="already has a method PBLORA or a parameter prefix 'pblora_'"):
        register("PBLORA", PBLoraConfig)
    assert "PBLORA" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def test_importing_changes_nothing_in_peft_but_its_registries():
    code = """
import sys, types
import accelerate, peft, transformers.integrations.peft
from peft.tuners import tuners_utils

def picture():
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "peft"}
    objects = {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}
    for name, module in modules.items():
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__.split(".")[0] == "peft":
                objects |= {(name, key, member): id(v) for member, v in vars(value).items() if member[:5] != "__abc"
                            and member[:4] != "_abc"}
    return objects, [member.name for member in peft.PeftType]

before, members = picture()
import peft_pblora
after, members_after = picture()
changed = {key for key in before if after.get(key) != before[key]}
assert not changed, changed
assert members == members_after
ours = {"PBLORA", "SVDLORA", "MOSLORA"}
for registry in ("CONFIG", "TUNER", "PREFIX"):
    assert {str(getattr(k, "value", k)) for k in getattr(peft.mapping, f"PEFT_TYPE_TO_{registry}_MAPPING")} >= ours
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_preference_is_set_once_without_a_file_and_without_visiting_layers(monkeypatch):
    arm = tiny_arm(tiny_llama(1))
    condition = arm.base_model.model.model.layers[0].self_attn.q_proj.adapter("default").condition
    weights = {name: id(p) for name, p in arm.named_parameters()}
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("a file was opened"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("something was loaded"))
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: pytest.fail("layers were visited"))
    set_preference(arm, {"helpful": 3, "harmless": 1}, normalize=True)
    assert condition.preference.tolist() == [0.75, 0.25]
    assert condition.version == 1
    monkeypatch.undo()
    assert {name: id(p) for name, p in arm.named_parameters()} == weights


MOE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_local_experts": 4}
ROUTED = {
    "llama4": (Llama4TextConfig(**MOE, intermediate_size_mlp=16, head_dim=8, interleave_moe_layer_step=1), "router"),
    "phimoe": (PhimoeConfig(**MOE), "router"),
}


@pytest.mark.parametrize("name", ROUTED)
def test_all_linear_leaves_out_what_gives_more_than_the_output_of_a_linear_layer(name):
    """Routers that inherit from `nn.Linear` and return tuples. It draws no random number to find out."""
    settings, router = ROUTED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    expected = model(IDS).logits
    routers = {key for key, module in model.named_modules() if key.rpartition(".")[2] == router}
    assert routers
    state = torch.get_rng_state()
    assert not any(is_linear(model.get_submodule(key)) for key in routers)
    assert torch.equal(torch.get_rng_state(), state)
    arm = get_peft_model(model, PBLoraConfig(objectives=OBJECTIVES, target_modules="all-linear"))
    adapted = {key for key, module in model.named_modules() if isinstance(module, PreferenceLinear)}
    assert adapted
    assert not adapted & routers
    assert not set(arm.peft_config["default"].target_modules) & routers
    torch.testing.assert_close(arm(IDS).logits, expected)
    with pytest.raises(TypeError, match="does not give the output of a linear layer"):
        get_peft_model(arm.unload(), PBLoraConfig(objectives=OBJECTIVES, target_modules=[router]))


def test_all_linear_takes_linear_layers_with_a_forward_of_their_own():
    settings = FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(settings)
    arm = get_peft_model(model, PBLoraConfig(objectives=OBJECTIVES, target_modules="all-linear"))
    layers = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert {key.rpartition(".")[2] for key in arm.peft_config["default"].target_modules} == layers


SSM = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2, "pad_token_id": 0}
JAMBA = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2}
JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1}
STATE_SPACES = {
    "Mamba": (MambaConfig(**SSM, state_size=4), ["dt_proj", "out_proj", "conv1d"]),
    "Mamba2": (Mamba2Config(**SSM, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8), ["out_proj"]),
    "FalconMamba": (FalconMambaConfig(**SSM, state_size=4), ["dt_proj", "out_proj"]),
    "Jamba": (JambaConfig(**SSM, **JAMBA), ["dt_proj"]),
}


@pytest.mark.parametrize("name", STATE_SPACES)
def test_layers_that_a_model_does_not_call_are_left_out_or_refused(name):
    settings, uncalled = STATE_SPACES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    for target in uncalled:
        config = PBLoraConfig(objectives=OBJECTIVES, target_modules=[target])
        with pytest.raises(ValueError, match=f"Module '{target}' .*`target_modules`"):
            get_peft_model(copy.deepcopy(model), config)
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules="all-linear", init_weights=False)
    arm = get_peft_model(copy.deepcopy(model), config)
    adapted = {key.rpartition(".")[2] for key, layer in arm.named_modules() if isinstance(layer, PreferenceLinear)}
    assert "in_proj" in adapted
    assert not adapted & set(uncalled)
    expected = arm(IDS, use_cache=False).logits
    assert not torch.allclose(expected, model(IDS, use_cache=False).logits, atol=1e-3)
    merged = arm.merge_and_unload()
    torch.testing.assert_close(merged(IDS, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


class Attends(nn.Module):
    """Attention of PyTorch's own, which reads the weight of its last layer and does not call it."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(16, 2, batch_first=True, **sizes), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])


SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP |= {"image_size": 8, "patch_size": 4}
ATTENDING = {
    "PyTorch's": (Attends, "attention.out_proj", (2, 3, 16)),
    "PyTorch's, with other keys": (lambda: Attends(kdim=16, vdim=16), "attention.out_proj", (2, 3, 16)),
    "SigLIP": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIGLIP)), "head.attention.out_proj", (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("row", [TABLE["pblora"], TABLE["svdlora"], TABLE["moslora"]])
def test_the_last_layer_of_pytorchs_attention_is_left_out_or_refused(name, row):
    make, uncalled, shape = ATTENDING[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    (uncalled,) = (key for key, _ in model.named_modules() if key.endswith(uncalled))
    settings = {"objectives": ["a", "b", "c"], "init_weights": False, **row.settings}
    for targets in ([uncalled.rpartition(".")[2]], rf".*{uncalled}"):
        with pytest.raises(ValueError, match="Module 'out_proj' is the output of an `nn.MultiheadAttention`"):
            get_peft_model(copy.deepcopy(model), row.config(target_modules=targets, **settings))
    arm = get_peft_model(copy.deepcopy(model), row.config(target_modules="all-linear", **settings)).eval()
    assert uncalled not in arm.peft_config["default"].target_modules
    set_preference(arm, [0.2, 0.3, 0.5])
    expected, plain, merged = arm(x), model(x), arm.merge_and_unload()(x)
    expected, plain, merged = (getattr(found, "pooler_output", found) for found in (expected, plain, merged))
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


class Packed(nn.Linear):
    """A layer whose weight is packed by its first forward and unpacked to be saved, as 4 bits on a CPU are."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=False)
        self.register_forward_hook(lambda layer, x, y: layer.pack(True))

    def pack(self, packed: bool) -> None:
        if packed != self.weight.quant_state.packing_format_for_cpu:
            self.weight.data = self.weight.data.flip(0)
        self.weight.quant_state.packing_format_for_cpu = packed

    def forward(self, x):
        packed = self.weight.quant_state.packing_format_for_cpu
        return nn.functional.linear(x, self.weight.flip(0) if packed else self.weight, self.bias)

    def _save_to_state_dict(self, *args):
        self.pack(False)
        super()._save_to_state_dict(*args)


@pytest.mark.parametrize("forwards", [(), ("before",), ("between",), ("before", "between")], ids=str)
def test_a_weight_that_a_forward_packs_is_unpacked_to_be_merged(forwards):
    torch.manual_seed(0)
    base = nn.Sequential(Packed(12, 8))
    original = base[0].weight.detach().clone()
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["0"], init_weights=False)
    model = get_peft_model(base, config).eval()
    set_preference(model, [0.3, 0.7])
    x = torch.randn(3, 12)
    expected = nn.functional.linear(x, original, base[0].bias) + x @ base[0].get_delta_weight("default").T
    if "before" in forwards:
        torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    if "between" in forwards:
        torch.testing.assert_close(model(x), expected)
        model.train()
        model(x)
        model.eval()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    base[0].get_base_layer().pack(False)
    torch.testing.assert_close(base[0].get_base_layer().weight.data, original)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("before", [False, True])
def test_four_bits_are_merged_right_after_a_forward(before):
    bitsandbytes = importlib.import_module("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4"))
    base = base.to("cpu")
    model = get_peft_model(base, PBLoraConfig(objectives=OBJECTIVES, target_modules=["0"], init_weights=False)).eval()
    set_preference(model, [0.3, 0.7])
    x = torch.randn(20, 64)
    with torch.no_grad():
        expected = unpacked_forward(model, x)
        if before:
            model(x)
        model.merge_adapter()
        assert (model(x) - expected).norm() < 0.3 * expected.norm()  # four bits again
        model.unmerge_adapter()
        assert (model(x) - expected).norm() < 0.3 * expected.norm()


def unpacked_forward(model, x):
    """What the layer gives while it trains, when bitsandbytes packs nothing."""
    model.train()
    result = model(x)
    model.eval()
    return result


def tied(**changes):
    model = tiny_llama(tie_word_embeddings=True)
    config = PBLoraConfig(objectives=OBJECTIVES, init_weights=False, **changes)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_of_a_tied_output_layer_is_not_merged_into_the_embedding(way):
    model = tied(target_modules=["lm_head", "q_proj"])
    before, logits = [p.clone() for p in model.parameters()], model(IDS).logits
    with pytest.raises(ValueError, match="lm_head is another module's too"):
        getattr(model, way)()
    assert all(map(torch.equal, before, model.parameters()))
    torch.testing.assert_close(model(IDS).logits, logits)


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("active", ["default", "head"])
def test_of_a_tied_model_the_adapters_that_are_merged_decide(way, active):
    model = tied(target_modules=["q_proj"])
    model.add_adapter("head", PBLoraConfig(objectives=OBJECTIVES, target_modules=["lm_head"], init_weights=False))
    # Merged into a model that stays adapted, one adapter acts beside the active one.
    acting = ["default", "head"] if (way, active) == ("merge_adapter", "head") else ["default"]
    model.base_model.set_adapter(acting)
    expected = model(IDS).logits
    model.set_adapter(active)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="lm_head is another module's too"):
        getattr(model, way)(adapter_names=["head"])
    assert all(map(torch.equal, before, model.parameters()))
    merged = getattr(model, way)(adapter_names=["default"]) or model
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_method_is_not_merged_into_the_embedding_either():
    model = tiny_llama(tie_word_embeddings=True)
    inject_adapter_in_model(MoSLoraConfig(objectives=OBJECTIVES, target_modules=["lm_head"]), model, "head")
    model = get_peft_model(model, PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="lm_head is another module's too"):
        model.merge_adapter()


def test_other_layers_of_a_tied_model_merge():
    model = tied(target_modules=["q_proj"])
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
