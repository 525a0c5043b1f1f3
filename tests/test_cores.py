# SPDX-License-Identifier: Apache-2.0
"""One row for each adapter: its core against a naive twin, and what every adapter must do, in float64."""

import peft
import pytest
import torch
from adapter_table import OBJECTIVES, TABLE, every_adapter, make_adapter, make_model
from conftest import tiny_gpt2, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig, set_preference
from peft_pblora.cores import MoSLoraCore, PBLoraCore, SVDLoraCore


preferences = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda w: [x / sum(w) for x in w])


@every_adapter
@given(preference=preferences, seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_core_equals_its_naive_twin(row, preference, seed):
    adapter = make_adapter(row, 5, 4, seed)
    alpha = torch.tensor(preference, dtype=torch.float64)
    rows = torch.stack([alpha, alpha.flip(0)])
    twins = [row.twin(adapter.core, a) for a in rows]
    for preference, expected in ((alpha, twins[0]), (rows, [torch.stack(parts) for parts in zip(*twins)])):
        matrix, shift = adapter.core(preference)
        torch.testing.assert_close(matrix, expected[0])
        torch.testing.assert_close(torch.zeros_like(expected[1]) if shift is None else shift, expected[1])


@every_adapter
@given(one=preferences, other=preferences, share=st.floats(0, 1), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_adapter_is_linear_in_the_preference(row, one, other, share, seed):
    """Δ(tα + (1 − t)α') = tΔ(α) + (1 − t)Δ(α'), with the shift."""
    adapter = make_adapter(row, 5, 4, seed)
    x, nothing = torch.randn(2, 4, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    one, other = (torch.tensor(p, dtype=torch.float64) for p in (one, other))
    mixed = adapter(x, nothing, share * one + (1 - share) * other)
    torch.testing.assert_close(mixed, share * adapter(x, nothing, one) + (1 - share) * adapter(x, nothing, other))


@every_adapter
@given(preference=preferences, seed=st.integers(0, 100), wide=st.booleans())
@settings(max_examples=10, deadline=None)
def test_folded_factored_and_dense_agree(row, preference, seed, wide):
    m, n = (9, 5) if wide else (5, 9)
    adapter = make_adapter(row, m, n, seed)
    alpha = torch.tensor(preference, dtype=torch.float32)
    matrix, shift = row.twin(adapter.core, alpha.double())
    x, y = torch.randn(2, 3, n, dtype=torch.float64), torch.randn(2, 3, m, dtype=torch.float64)
    dense = y + row.scaling * ((x @ adapter.A.weight.T @ matrix.T + shift) @ adapter.B.weight.T)
    adapter.condition.set(alpha)
    torch.testing.assert_close(adapter(x, y), dense)
    with torch.no_grad():
        torch.testing.assert_close(adapter.eval()(x, y.clone()), dense)
    adapter.condition.set(alpha.expand(2, 3))
    torch.testing.assert_close(adapter.train()(x, y), dense)
    with torch.no_grad():
        torch.testing.assert_close(adapter.eval()(x, y.clone()), dense)
        twice = adapter(x.repeat_interleave(2, 0), y.repeat_interleave(2, 0))
        torch.testing.assert_close(twice, dense.repeat_interleave(2, 0))


@every_adapter
def test_gradients_are_exact(row):
    adapter = make_adapter(row, 3, 4)
    names = [name for name, _ in adapter.named_parameters()]
    x, y = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    for alpha in ([0.2, 0.3, 0.5], [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]):
        adapter.condition.set(torch.tensor(alpha))

        def forward(x, *values):
            return torch.func.functional_call(adapter, dict(zip(names, values)), (x, y))

        inputs = (x.requires_grad_(), *[p.detach().requires_grad_() for p in adapter.parameters()])
        assert torch.autograd.gradcheck(forward, inputs)


@every_adapter
def test_fresh_adapter_is_the_identity(row):
    ids = torch.arange(8)[None]
    model = get_peft_model(tiny_llama(), row.config(objectives=OBJECTIVES, target_modules=["q_proj"], **row.settings))
    torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits)


@every_adapter
def test_parameters_and_scaling_are_as_stated(row):
    adapter = make_adapter(row, 5, 4)
    assert sum(p.numel() for p in adapter.parameters()) == row.parameters(5, 4)
    assert adapter.scaling == row.scaling
    assert all(p.numel() for p in adapter.parameters())


@every_adapter
def test_config_without_arguments_and_round_trip(row, tmp_path):
    assert row.config().objectives == ["objective_1", "objective_2"]
    config = row.config(objectives=OBJECTIVES, default_preference=[0.2, 0.3, 0.5], **row.settings)
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is row.config
    assert loaded.to_dict() == config.to_dict()


@every_adapter
def test_save_and_load_under_another_name(row, tmp_path):
    model, ids = make_model(row), torch.arange(8)[None]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="other").eval()
    for preference in ([1.0, 0.0, 0.0], [0.2, 0.3, 0.5]):
        set_preference(model, preference)
        set_preference(loaded, preference)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@every_adapter
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2], ids=["Linear", "Conv1D"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The adapter's shift was merged")
def test_merge_and_unmerge(row, base):
    targets = {"target_modules": ["c_attn"]} if base is tiny_gpt2 else {}
    model, ids = make_model(row, base(), **targets), torch.arange(8)[None]
    before = {name: p.clone() for name, p in model.named_parameters()}
    set_preference(model, [0.2, 0.3, 0.5])
    expected = model(ids).logits
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("objectives", "r2", "parts"), [(2, 8, [4, 4]), (3, 7, [3, 2, 2]), (1, 2, [2]), (3, 3, [1, 1, 1])]
)
def test_a_disjoint_start_is_an_identity_for_each_objective_on_dimensions_of_its_own(objectives, r2, parts):
    core = PBLoraCore(objectives, 0, r2, disjoint=True)
    blocks = [core(row)[0] for row in torch.eye(objectives)]
    assert [int(block.sum()) for block in blocks] == parts
    torch.testing.assert_close(sum(blocks), torch.eye(r2))
    assert all(torch.equal(block, torch.diag(block.diagonal())) for block in blocks)


@pytest.mark.parametrize(("r1", "r2"), [(4, 4), (0, 1)])
def test_a_disjoint_start_that_can_t_be(r1, r2):
    with pytest.raises(ValueError, match="Set `r1` to 0 and `r2` to 2 or more"):
        PBLoraConfig(r1=r1, r2=r2, disjoint_start=True)


def test_merging_a_shift_into_a_layer_without_bias_warns():
    with pytest.warns(UserWarning, match="shift was merged into a bias that the layer did not have"):
        make_model(TABLE["moslora"]).merge_adapter()


@every_adapter
def test_pefts_conversion_to_lora_is_exact_or_refused(row):
    """It knows no shift."""
    model, ids = make_model(row), torch.randint(2, 64, (2, 6))
    set_preference(model, [0.2, 0.3, 0.5])
    shifts = row.config is MoSLoraConfig
    assert model.supports_lora_conversion() is not shifts
    if shifts:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=8)
        return
    config, tensors = convert_to_lora(model, rank=8)
    converted = get_peft_model(tiny_llama(), config).eval()
    set_peft_model_state_dict(converted, tensors)
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@every_adapter
def test_mixed_batch_by_adapter_names(row):
    model, ids = make_model(row), torch.randint(2, 64, (4, 6))
    model.add_adapter("second", row.config(objectives=["one"], target_modules=["q_proj"], **row.settings_for(1)))
    for name, parameter in model.named_parameters():
        if ".second.B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    set_preference(model, [0.2, 0.3, 0.5], adapter_name="default")
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(ids).logits
    with model.disable_adapter():
        expected["__base__"] = model(ids).logits
    names = ["default", "__base__", "second", "default"]
    mixed = model.eval()(input_ids=ids, adapter_names=names).logits
    for index, name in enumerate(names):
        torch.testing.assert_close(mixed[index], expected[name][index], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(input_ids=ids, adapter_names=["third"] * 4)
    torch.testing.assert_close(model(ids).logits, expected["second"])


def test_mixed_batch_with_a_preference_for_each_row():
    model, ids = make_model(TABLE["pblora"]), torch.randint(2, 64, (4, 6))
    rows = torch.eye(3)[[0, 1, 2, 0]]
    set_preference(model, rows)
    expected = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    for names in (["__base__", "default", "default", "default"], ["default", "__base__", "default", "__base__"]):
        mixed = model(input_ids=ids, adapter_names=names).logits
        for index, name in enumerate(names):
            torch.testing.assert_close(mixed[index], (base if name == "__base__" else expected)[index])


def test_hooks_of_a_mixed_batch_are_gone_after_an_error():
    model, ids = make_model(TABLE["pblora"]), torch.randint(2, 64, (2, 6))
    before = model(ids).logits
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(input_ids=ids, adapter_names=["default"] * 3)
    torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SVDLoraConfig, {"r": -1}, "`r` is -1, but it must be 0 or larger"),
        (SVDLoraConfig, {"r": 8.0}, "`r` is 8.0, but it must be a whole number"),
        (MoSLoraConfig, {"r": "8"}, "`r` is '8', but it must be a whole number"),
        (MoSLoraConfig, {"embedding_size": None}, "`embedding_size` is None, but it must be a whole number"),
        (MoSLoraConfig, {"r": 0}, "r must be positive"),
        (MoSLoraConfig, {"embedding_size": -1}, "`embedding_size` 0 or larger"),
        (PBLoraConfig, {"trainable_token_indices": [1]}, "`trainable_token_indices` is not supported"),
        (PBLoraConfig, {"target_modules": "q", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        (PBLoraConfig, {"target_modules": "q", "layers_pattern": "h"}, "`layers_pattern` cannot be used"),
        (PBLoraConfig, {"target_modules": ["q"], "layers_pattern": "h"}, "`layers_to_transform` must also be"),
    ],
)
def test_bad_config(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (lambda: PBLoraCore(2, -1, 2), "must be 0 or larger and one must be positive"),
        (lambda: SVDLoraCore(2, -1), "must be 0 or larger"),
        (lambda: MoSLoraCore(2, 0), "must be positive"),
    ],
)
def test_bad_core(core, message):
    with pytest.raises(ValueError, match=message):
        core()


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "k", "total"), [(LLAMA_7B, 2, 6_296_064), (LLAMA_7B, 3, 6_297_600), (TINYLLAMA, 3, 1_536_128)]
)
def test_parameter_totals_of_the_papers(shape, k, total):
    with torch.device("meta"):
        base = tiny_llama(vocab_size=32000, **{"num_key_value_heads": shape["num_attention_heads"], **shape})
        config = PBLoraConfig(objectives=OBJECTIVES[:k], target_modules=["q_proj", "k_proj", "v_proj"])
        model = get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
