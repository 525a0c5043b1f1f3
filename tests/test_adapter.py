# SPDX-License-Identifier: Apache-2.0
"""The adapter against its equation, written out densely in float64."""

import contextlib
import copy
import importlib
import pickle
from dataclasses import dataclass

import peft
import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_gpt2, tiny_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

import peft_pblora
from peft_pblora import PBLoraConfig, PreferenceConfig, get_preference, set_preference, use_preference
from peft_pblora.adapter import LowRankAdapter
from peft_pblora.condition import Condition
from peft_pblora.cores import Core, PBLoraCore
from peft_pblora.model import register


RANKS = [(2, 3), (0, 3), (2, 0)]


def dense_delta(adapter: LowRankAdapter, preference: torch.Tensor, r1: int, r2: int) -> torch.Tensor:
    """ΔW(α) = s · (B1 W1 A1 + B2 reshape(α φ) A2), one entry of α at a time."""
    a, b, core = adapter.A.weight, adapter.B.weight, adapter.core
    delta = torch.zeros(b.shape[0], a.shape[1], dtype=a.dtype)
    if r1:
        delta += b[:, :r1] @ core.W1 @ a[:r1]
    for weight, phi in zip(preference.to(a.dtype), core.W2 if r2 else []):
        delta += weight * b[:, r1:] @ phi.reshape(r2, r2) @ a[r1:]
    return adapter.scaling * delta


@pytest.mark.parametrize(("r1", "r2"), RANKS)
@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("rows", [None, 1, 2, 4])
def test_forward_equals_dense_twin(r1, r2, n, m, rows):
    torch.manual_seed(0)
    core = PBLoraCore(3, r1, r2)
    adapter = LowRankAdapter(n, m, core, 1.5, Condition(["a", "b", "c"], [0.2, 0.3, 0.5]), identity=False).double()
    preference = torch.distributions.Dirichlet(torch.ones(3)).sample((rows,) if rows else ())
    adapter.condition.set(preference)
    x, result = torch.randn(4, 7, n, dtype=torch.float64), torch.randn(4, 7, m, dtype=torch.float64)
    per_row = preference.expand(4, 3) if rows is None else preference.repeat_interleave(4 // rows, dim=0)
    expected = torch.stack([y + h @ dense_delta(adapter, p, r1, r2).T for h, y, p in zip(x, result, per_row)])
    torch.testing.assert_close(adapter(x, result), expected)


def test_gradients_are_exact():
    torch.manual_seed(0)
    core = PBLoraCore(2, 2, 2)
    adapter = LowRankAdapter(4, 3, core, 0.7, Condition(OBJECTIVES, [0.4, 0.6]), identity=False).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in adapter.named_parameters()]

    def forward(x, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values)), (x, torch.zeros(2, 3).double()))

    assert torch.autograd.gradcheck(forward, (x, *[p.detach().requires_grad_() for p in adapter.parameters()]))


def test_rows_that_do_not_fit_the_batch():
    arm = tiny_arm()
    set_preference(arm, [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="set for 2 rows, but the batch has 3"):
        arm(input_ids=torch.ones(3, 4, dtype=torch.long))


@pytest.mark.parametrize(("r1", "r2"), RANKS)
def test_fresh_adapter_is_the_identity_and_has_the_stated_shapes(r1, r2):
    base = tiny_llama()
    ids = torch.arange(8)[None]
    expected = base(ids).logits
    config = PBLoraConfig(objectives=OBJECTIVES, r1=r1, r2=r2, lora_alpha=6, target_modules=["q_proj"])
    model = get_peft_model(base, config)
    torch.testing.assert_close(model(ids).logits, expected)
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj.adapters["default"]
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    expected_shapes = {"A.weight": (r1 + r2, 32), "B.weight": (32, r1 + r2)}
    expected_shapes |= {"core.W1": (r1, r1)} if r1 else {}
    expected_shapes |= {"core.W2": (2, r2 * r2)} if r2 else {}
    assert shapes == expected_shapes
    assert adapter.scaling == 6 / (r2 or r1)


def test_output_is_linear_in_the_preference():
    arm = tiny_arm()
    layer = arm.base_model.model.model.layers[0].self_attn.q_proj
    deltas = {}
    for preference in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.7]):
        set_preference(arm, preference)
        deltas[tuple(preference)] = layer.get_delta_weight("default")
    torch.testing.assert_close(deltas[0.3, 0.7], 0.3 * deltas[1.0, 0.0] + 0.7 * deltas[0.0, 1.0])


def test_preference_by_name_changes_the_model_and_back():
    arm = tiny_arm()
    ids = torch.arange(8)[None]
    set_preference(arm, {"helpful": 1.0, "harmless": 0.0})
    helpful = arm(ids).logits
    with use_preference(arm, {"helpful": 0.0, "harmless": 1.0}):
        assert get_preference(arm).tolist() == [0.0, 1.0]
        assert (arm(ids).logits - helpful).abs().max() > 1e-2
    assert get_preference(arm).tolist() == [1.0, 0.0]
    torch.testing.assert_close(arm(ids).logits, helpful)


def test_use_preference_restores_after_an_error():
    arm = tiny_arm()
    before = get_preference(arm)
    with pytest.raises(KeyError), use_preference(arm, [1.0, 0.0]):
        raise KeyError
    assert torch.equal(get_preference(arm), before)


def test_each_row_of_a_batch_can_have_its_own_preference():
    arm = tiny_arm()
    ids = torch.randint(2, 64, (2, 8))
    rows = []
    for row, preference in zip(ids, ([1.0, 0.0], [0.2, 0.8])):
        set_preference(arm, preference)
        rows.append(arm(row[None]).logits[0])
    set_preference(arm, [[1.0, 0.0], [0.2, 0.8]])
    torch.testing.assert_close(arm(ids).logits, torch.stack(rows))


def test_preference_is_neither_parameter_nor_buffer_and_follows_no_dtype():
    arm = tiny_arm()
    set_preference(arm, [0.25, 0.75])
    names = [*dict(arm.named_parameters()), *dict(arm.named_buffers()), *arm.state_dict()]
    assert not any("preference" in name for name in names)
    arm.to(torch.bfloat16)
    clone = copy.deepcopy(arm)
    assert get_preference(arm).dtype == torch.float32
    set_preference(arm, [1.0, 0.0])
    assert get_preference(clone).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("r1", "r2"), RANKS)
def test_save_and_load(tmp_path, r1, r2):
    arm = tiny_arm(r1=r1, r2=r2)
    ids = torch.arange(8)[None]
    set_preference(arm, [0.2, 0.8])
    expected = arm(ids).logits
    arm.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path, adapter_name="other")
    assert loaded.peft_config["other"].objectives == OBJECTIVES
    assert get_preference(loaded).tolist() == [0.5, 0.5]
    set_preference(loaded, [0.2, 0.8])
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_auto_class_loads_base_and_adapter(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "base")
    arm = tiny_arm(type(tiny_llama()).from_pretrained(tmp_path / "base"))
    arm.save_pretrained(tmp_path / "arm")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "arm")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, arm(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_remembers_its_preference(dtype):
    arm = tiny_arm(tiny_llama(1).to(dtype), target_modules=["q_proj", "down_proj"])
    before = arm.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight.clone()
    ids = torch.arange(8)[None]
    set_preference(arm, [0.9, 0.1])
    expected = arm(ids).logits
    arm.merge_adapter(safe_merge=True)
    weight = arm.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert weight.dtype == dtype
    torch.testing.assert_close(arm(ids).logits, expected, atol=0.3 if dtype != torch.float32 else 1e-4, rtol=0.1)
    with pytest.raises(ValueError, match="is merged.*unmerge_adapter"):
        set_preference(arm, [0.1, 0.9])
    arm.unmerge_adapter()
    after = arm.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    torch.testing.assert_close(after, before, atol={torch.float32: 1e-6}.get(dtype, 2e-2), rtol=1e-2)
    set_preference(arm, [0.1, 0.9])


def test_rows_of_preferences_can_not_be_merged():
    arm = tiny_arm()
    set_preference(arm, [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="can't be merged"):
        arm.merge_adapter()


def test_of_several_adapters_all_are_merged_or_none():
    """Whichever layers they are in."""
    arm = tiny_arm()
    second = PBLoraConfig(objectives=["short", "kind"], target_modules=["v_proj"], init_weights=False)
    arm.add_adapter("second", second)
    arm.base_model.set_adapter(["default", "second"])
    set_preference(arm, [0.3, 0.7])
    before, ids = copy.deepcopy(arm.state_dict()), torch.arange(8)[None]
    expected = arm(ids).logits
    set_preference(arm, [[1.0, 0.0], [0.0, 1.0]], "second")
    with pytest.raises(ValueError, match="can't be merged"):
        arm.merge_adapter()
    set_preference(arm, [0.3, 0.7], "second")
    torch.testing.assert_close(arm.state_dict(), before, atol=0, rtol=0)
    layer = arm.base_model.model.model.layers[0].self_attn.v_proj
    shared = layer.adapter("second").B.weight
    with torch.no_grad():
        former = shared[0, 0].item()
        shared[0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter second"):
            layer.merge(safe_merge=True)
        shared[0, 0] = former
    torch.testing.assert_close(arm.state_dict(), before, atol=0, rtol=0)
    arm.merge_adapter()
    torch.testing.assert_close(arm(ids).logits, expected, atol=1e-4, rtol=1e-4)
    arm.unmerge_adapter()
    torch.testing.assert_close(arm.state_dict(), before, atol=1e-5, rtol=1e-5)


def test_disabled_adapter_is_the_base_model():
    arm = tiny_arm()
    ids = torch.arange(8)[None]
    with arm.disable_adapter():
        torch.testing.assert_close(arm(ids).logits, tiny_llama(1)(ids).logits)


def test_conv1d_layers():
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        arm = tiny_arm(tiny_gpt2(), target_modules=["c_attn"])
    ids = torch.arange(8)[None]
    expected = arm(ids).logits
    merged = arm.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_two_adapters_have_preferences_of_their_own():
    arm = tiny_arm()
    arm.add_adapter("second", PBLoraConfig(objectives=["short"], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    set_preference(arm, [0.3, 0.7], adapter_name="default")
    assert get_preference(arm, "second").tolist() == [1.0]
    torch.testing.assert_close(get_preference(arm, "default"), torch.tensor([0.3, 0.7]))
    with pytest.raises(ValueError, match="no preference-conditioned adapter 'third'; it has"):
        set_preference(arm, [1.0], adapter_name="third")


def test_model_without_adapter():
    with pytest.raises(ValueError, match="get_peft_model"):
        set_preference(tiny_llama(), [1.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectives": ["a", "a"]}, "has a name twice"),
        ({"objectives": []}, "one or more non-empty names"),
        ({"objectives": "helpful"}, "Give a list of names"),
        ({"objectives": None}, "`objectives` is None. Give a list of names"),
        ({"default_preference": [0.5, 0.6]}, "must sum to 1"),
        ({"r1": 0, "r2": 0}, "one must be positive"),
        ({"r1": -1}, "0 or larger"),
        ({"r1": 4.0}, "`r1` is 4.0, but it must be a whole number"),
        ({"r2": True}, "`r2` is True, but it must be a whole number"),
        ({"obj_num": 2.0}, "`obj_num` is 2.0, but it must be a whole number"),
        ({"lora_alpha": "8"}, "`lora_alpha` is '8', but it must be a number"),
        ({"lora_dropout": None}, "`lora_dropout` is None, but it must be a number"),
        ({"lora_alpha": 0}, "The scaling is 0.0, with which the adapter does nothing"),
        ({"lora_alpha": float("nan")}, "The scaling is nan"),
        ({"lora_dropout": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        PBLoraConfig(**settings)


def test_default_preference_is_used():
    arm = tiny_arm(default_preference=[0.1, 0.9])
    torch.testing.assert_close(get_preference(arm), torch.tensor([0.1, 0.9]))


def test_registration_is_idempotent_and_leaves_peft_alone():
    importlib.reload(peft_pblora)
    assert "PBLORA" not in peft.PeftType.__members__
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PBLORA"] is PBLoraConfig


def test_a_method_of_that_name_in_peft_takes_precedence(monkeypatch):
    theirs = type("TheirConfig", (peft.PeftConfig,), {})
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "PBLORA", theirs)
    with pytest.warns(UserWarning, match="PEFT already has a method PBLORA.*takes precedence"):
        register("PBLORA", PBLoraConfig)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PBLORA"] is theirs
    with pytest.raises(RuntimeError, match="belongs to .*TheirConfig, not to peft_pblora"):
        PBLoraConfig()


class ScaleCore(Core):
    """W(α) = diag(M α)."""

    def __init__(self, objectives: int, r: int) -> None:
        super().__init__()
        self.rank, self.M = r, torch.nn.Parameter(torch.empty(r, objectives))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.M)

    def forward(self, preference):
        return torch.diag_embed(preference @ self.M.T), None


@dataclass
class ScaleConfig(PreferenceConfig):
    r: int = 2
    scaling = 1.0

    def build_core(self) -> ScaleCore:
        return ScaleCore(len(self.objectives), self.r)


@pytest.fixture
def tuner():
    yield register("SCALELORA", ScaleConfig)
    for registry in ("CONFIG", "TUNER", "PREFIX"):
        del getattr(peft.mapping, f"PEFT_TYPE_TO_{registry}_MAPPING")["SCALELORA"]


def test_a_method_is_a_core_and_a_configuration(tuner, tmp_path):
    assert register("SCALELORA", ScaleConfig) is tuner
    assert (tuner.__name__, tuner.tuner_layer_cls.__name__) == ("ScaleModel", "ScaleLinear")
    torch.manual_seed(0)
    config = ScaleConfig(objectives=OBJECTIVES, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    arm, ids = get_peft_model(tiny_llama(), config).eval(), torch.arange(8)[None]
    assert all(".scalelora_adapter." in name for name, p in arm.named_parameters() if p.requires_grad)
    set_preference(arm, [0.2, 0.8])
    clone = pickle.loads(pickle.dumps(arm))
    assert type(clone.base_model) is tuner
    arm.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert type(loaded.peft_config["default"]) is ScaleConfig
    set_preference(loaded, [0.2, 0.8])
    for other in (clone, loaded.eval()):
        torch.testing.assert_close(other(ids).logits, arm(ids).logits)
    with pytest.raises(ValueError, match="`name` is 'ScaleLora', but PEFT's methods have names in capitals"):
        register("ScaleLora", ScaleConfig)


@pytest.mark.parametrize("thing", ["config", "type", "tuner", "layer"])
def test_what_is_derived_is_pickled(thing):
    arm = tiny_arm()
    layer = arm.base_model.model.model.layers[0].self_attn.q_proj
    config = arm.peft_config["default"]
    found = {"config": config, "type": config.peft_type, "tuner": type(arm.base_model), "layer": type(layer)}[thing]
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert type(again) is type(found)
    assert peft_pblora.PBLoraModel is type(arm.base_model)


def test_dropout_only_in_training():
    arm = tiny_arm(lora_dropout=0.5)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(arm(ids).logits, arm(ids).logits)
    arm.train()
    assert not torch.equal(arm(ids).logits, arm(ids).logits)


@pytest.mark.parametrize("preference", [[0.2, 0.8], [[0.2, 0.8], [0.9, 0.1]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_under_autocast(preference, dtype):
    """Layers that return their input's dtype under autocast, as those of bitsandbytes do."""
    torch.manual_seed(0)
    adapter = LowRankAdapter(6, 5, PBLoraCore(2, 2, 2), 1.0, Condition(OBJECTIVES, [0.5, 0.5]), identity=False).eval()
    adapter.condition.set(torch.tensor(preference))
    x, result = torch.randn(2, 3, 6).to(dtype), torch.randn(2, 3, 5).to(dtype)
    expected = adapter(x.float(), result.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = adapter(x, result.clone())
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("frozen_afterwards", [False, True])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad], ids=lambda o: o.__name__
)
@pytest.mark.parametrize("fused", [True, False])
def test_what_an_optimizer_changes_is_folded_anew(optimizer, fused, frozen_afterwards):
    """In evaluation mode, with forwards without gradients wherever they may stand; fused steps leave no versions."""
    arm = tiny_arm().eval()
    set_preference(arm, [0.3, 0.7])
    ids = torch.tensor([[5, 9, 20, 3]])
    trained = optimizer([p for p in arm.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(3):
        trained.zero_grad()
        loss = arm(ids, labels=ids).loss
        with torch.no_grad():
            arm(ids)
        loss.backward()
        with torch.no_grad():
            arm(ids)
        trained.step()
        expected = arm(ids).logits.detach()
        arm.requires_grad_(not frozen_afterwards)
        with torch.no_grad():
            torch.testing.assert_close(arm(ids).logits, expected)
        for name, parameter in arm.named_parameters():
            parameter.requires_grad_("adapter" in name)


def test_data_that_is_replaced_twice_is_folded_anew():
    """The second may lie at the address of the first."""
    arm = tiny_arm().eval()
    set_preference(arm, [0.3, 0.7])
    ids = torch.tensor([[5, 9, 20, 3]])
    with torch.no_grad():
        arm(ids)
        for _ in range(2):
            for name, parameter in arm.named_parameters():
                if "adapter" in name:
                    parameter.data = parameter.data * 2
        torch.testing.assert_close(arm(ids).logits, copy.deepcopy(arm)(ids).logits)


def test_replicas_keep_folds_of_their_own():
    arm = tiny_arm().eval()
    adapter = arm.base_model.model.model.layers[0].self_attn.q_proj.pblora_adapter["default"]
    assert adapter._replicate_for_data_parallel()._folds is not adapter._folds


def test_what_a_hook_has_seen_or_given_stays():
    """The adapter adds to the layer's output in place, where nobody else has it."""
    arm, seen = tiny_arm().eval(), []
    layer, ids = arm.base_model.model.model.layers[0].self_attn.q_proj, torch.tensor([[5, 9, 20, 3]])
    constant = torch.zeros(1, 4, layer.out_features)
    with torch.no_grad():
        patch = layer.base_layer.register_forward_hook(lambda *args: constant)
        first, second = arm(ids).logits, arm(ids).logits
        patch.remove()
        watch = layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        arm(ids)
        watch.remove()
        assert torch.equal(first, second)
        assert not constant.any()
        torch.testing.assert_close(seen[0][1], layer.base_layer(seen[0][0]))


BASES = {"Llama": (tiny_llama, ["q_proj", "down_proj"]), "GPT-2": (tiny_gpt2, ["c_attn"])}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_what_a_block_leaves_merged_stays_at_its_preference(name, ends):
    make, targets = BASES[name]
    settings = {"target_modules": targets, "fan_in_fan_out": name == "GPT-2"}
    arm, ids = tiny_arm(make(), **settings), torch.arange(8)[None]
    arm.add_adapter("second", PBLoraConfig(objectives=OBJECTIVES, init_weights=False, **settings))
    set_preference(arm, [0.5, 0.5])
    former = arm(ids).logits
    with contextlib.suppress(KeyError), use_preference(arm, [1.0, 0.0]):
        expected = arm(ids).logits
        arm.merge_adapter()
        if ends != "well":
            raise KeyError
    assert get_preference(arm).tolist() == [1.0, 0.0]
    assert get_preference(arm, "second").tolist() == [0.5, 0.5]
    torch.testing.assert_close(arm(ids).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'default' is merged at one preference"), use_preference(arm, [0.5, 0.5]):
        pass
    arm.unmerge_adapter()
    with use_preference(arm, [0.5, 0.5]):
        torch.testing.assert_close(arm(ids).logits, former, atol=1e-5, rtol=1e-5)
        arm.merge_adapter()
        arm.unmerge_adapter()
    assert get_preference(arm).tolist() == [1.0, 0.0]
    torch.testing.assert_close(arm(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_error_in_a_block_that_merges_is_the_users_own():
    arm = tiny_arm()
    with pytest.raises(KeyError), use_preference(arm, [1.0, 0.0]):
        arm.merge_adapter()
        raise KeyError
