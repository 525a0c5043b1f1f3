# SPDX-License-Identifier: Apache-2.0
"""More of the preference as run-time state: inference mode, compilers, accelerate, copies on disk, casts."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.state import AcceleratorState
from adapter_table import TABLE, every_adapter, make_model
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from decoding.architectures import ARCHITECTURES, tiny
from distributed_worker import gradients, loss_of
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter

from peft_pblora import (
    MoSLoraConfig,
    PBLoraConfig,
    SVDLoraConfig,
    get_objectives,
    get_preference,
    save_as_lora,
    set_preference,
    use_preference,
)
from peft_pblora.layer import PreferenceLinear
from trl_parm import PARM, PARMLogitsProcessor


IDS = torch.arange(2, 18).view(2, 8)
ROWS = [[1.0, 0.0], [0.25, 0.75]]


@pytest.mark.parametrize(("before", "inside"), [(ROWS, [0.2, 0.8]), ([0.2, 0.8], ROWS), ([0.2, 0.8], [0.9, 0.1])])
def test_a_preference_set_in_inference_mode_can_be_trained_at(before, inside):
    arm = tiny_arm()
    set_preference(arm, inside)
    loss_of(arm.train(), IDS).backward()
    expected = gradients(arm)
    arm.zero_grad()
    set_preference(arm, before)
    with torch.inference_mode():
        set_preference(arm, inside)
        arm.eval()(IDS)
    loss_of(arm.train(), IDS).backward()
    torch.testing.assert_close(gradients(arm), expected)


def test_a_model_made_in_inference_mode_takes_preferences():
    with torch.inference_mode():
        arm = tiny_arm()
        arm(IDS)
    outputs = []
    for preference in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]):
        set_preference(arm, preference)
        with torch.no_grad():
            outputs.append(arm(IDS).logits)
    torch.testing.assert_close(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("preferences", [[[0.5, 0.5], [1.0, 0.0]], [ROWS, ROWS[::-1]]], ids=["one", "rows"])
def test_training_compiled_does_not_recompile_for_a_new_preference(preferences):
    arm, eager = tiny_arm().train(), tiny_arm().train()
    compiled = torch.compile(arm, fullgraph=True, backend="aot_eager")
    stances = ["default", "fail_on_recompile"]
    for preference, stance in zip(preferences, stances, strict=True):
        for model in (arm, eager):
            set_preference(model, preference)
            model.zero_grad()
        with torch.compiler.set_stance(stance):
            loss_of(compiled, IDS).backward()
        loss_of(eager, IDS).backward()
        torch.testing.assert_close(gradients(arm), gradients(eager), atol=1e-6, rtol=1e-5)


def test_compiled_before_any_preference_was_set():
    arm = tiny_arm()
    compiled = torch.compile(arm, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(IDS)
        with torch.compiler.set_stance("fail_on_recompile"):
            set_preference(arm, [1.0, 0.0])
            torch.testing.assert_close(compiled(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)
            with use_preference(arm, [0.3, 0.7]):
                torch.testing.assert_close(compiled(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(compiled(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)


@every_adapter
@pytest.mark.parametrize("preference", [[0.2, 0.3, 0.5], [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]], ids=["one", "rows"])
def test_weights_that_accelerate_keeps_on_disk(row, preference, tmp_path):
    model, reference = make_model(row), make_model(row)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {p.is_meta for name, p in model.named_parameters() if "lora_adapter" in name} == {True}
    for chosen in (preference, [1.0, 0.0, 0.0]):
        set_preference(model, chosen)
        set_preference(reference, chosen)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_exporting_weights_that_accelerate_keeps_elsewhere(tmp_path):
    model = make_model(TABLE["moslora"])
    set_preference(model, [0.2, 0.3, 0.5])
    expected = model(IDS).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    save_as_lora(model, tmp_path, [0.2, 0.3, 0.5])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_through_accelerator_in_bf16():
    AcceleratorState._reset_state(reset_partial_state=True)  # which a training in this process has left
    arm, reference = tiny_arm(), tiny_arm()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(arm)
    for preference in ([0.2, 0.8], ROWS):
        set_preference(prepared, preference)
        set_preference(reference, preference)
        assert torch.equal(get_preference(prepared), torch.tensor(preference))
        for mode in (True, False):
            prepared.train(mode)
            with torch.set_grad_enabled(mode):
                found = prepared(input_ids=IDS).logits
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, reference(IDS).logits, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_preference_stays_float32_and_raises_no_dtype(dtype):
    arm = tiny_arm()
    set_preference(arm, torch.tensor([0.25, 0.75], dtype=torch.float64))
    arm.to(dtype)
    assert get_preference(arm).dtype == torch.float32
    for preference in ([0.25, 0.75], ROWS):
        set_preference(arm, torch.tensor(preference, dtype=torch.float64))
        assert arm(IDS).logits.dtype == dtype
        with torch.no_grad():
            assert arm(IDS).logits.dtype == dtype


def test_preference_survives_torch_save_of_the_whole_model():
    arm, file = tiny_arm(), io.BytesIO()
    set_preference(arm, ROWS)
    with torch.no_grad():
        expected = arm(IDS).logits
    torch.save(arm, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(get_preference(loaded), torch.tensor(ROWS))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)


def test_default_preference_is_said_by_one_line_under_pythons_filter():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            tiny_arm(objectives=["quick", "slow"], default_preference=[0.3, 0.7])(IDS)
    said = [str(warning.message) for warning in caught if "No preference was set" in str(warning.message)]
    assert len(said) == 1
    assert "quick=0.3, slow=0.7" in said[0]


@every_adapter
@pytest.mark.parametrize("rows", [False, True])
def test_a_graph_keeps_the_preference_that_it_was_made_with(row, rows):
    """Another one is set before backward: at the end of a block, or for a second loss in the same step."""
    expected, model = make_model(row).train(), make_model(row).train()
    losses = []
    for preference in ([0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        preference = [preference, preference[::-1]] if rows else preference
        set_preference(expected, preference)
        loss_of(expected, IDS).backward()
        with use_preference(model, preference):
            losses.append(loss_of(model, IDS))
    sum(losses).backward()
    torch.testing.assert_close(gradients(model), gradients(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_a_context_around_forward_and_backward(reentrant):
    results = []
    for checkpointing in (False, True):
        arm = tiny_arm().train()
        if checkpointing:
            arm.gradient_checkpointing_enable({"use_reentrant": reentrant})
            arm.enable_input_require_grads()
        for preference in ([0.2, 0.8], ROWS):
            with use_preference(arm, preference):
                loss_of(arm, IDS).backward()
        results.append(gradients(arm))
    torch.testing.assert_close(results[0], results[1])


def test_objectives_of_a_loaded_adapter_normalize_by_name(tmp_path):
    tiny_arm().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path)
    with use_preference(loaded, {"harmless": 3, "helpful": 1}, normalize=True):
        assert get_preference(loaded).tolist() == [0.25, 0.75]
    assert get_preference(loaded).tolist() == [1 / len(OBJECTIVES)] * 2


def conditions(model, name="default") -> set[int]:
    layers = (module for module in model.modules() if isinstance(module, PreferenceLinear))
    return {id(layer.adapter(name).condition) for layer in layers if name in layer.adapters}


def injected(config, model):
    return inject_adapter_in_model(config, inject_adapter_in_model(config, model), adapter_name="second")


def added(config, model):
    model = get_peft_model(model, config)
    model.add_adapter("second", config)
    return model


@pytest.mark.parametrize("make", [added, injected])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_the_layers_of_an_adapter_share_one_condition_and_those_of_two_do_not(make, copier):
    settings = {"target_modules": ["q_proj", "down_proj"], "default_preference": [0.1, 0.9]}
    model = make(PBLoraConfig(objectives=OBJECTIVES, **settings), tiny_llama())
    twin = copier(model)
    found = [conditions(one, name) for one in (model, twin) for name in ("default", "second")]
    assert [len(one) for one in found] == [1] * 4
    assert len(set.union(*found)) == 4
    set_preference(twin, [1.0, 0.0], "second")
    for one, name, expected in (
        (twin, "second", [1.0, 0.0]),
        (twin, "default", [0.1, 0.9]),
        (model, None, [0.1, 0.9]),
    ):
        torch.testing.assert_close(get_preference(one, name), torch.tensor(expected))


@pytest.mark.parametrize("make", [added, injected])
def test_an_adapter_added_under_the_name_of_a_deleted_one_starts_anew(make):
    model = make(PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"]), tiny_llama())
    set_preference(model, [1.0, 0.0])
    config = PBLoraConfig(objectives=["a", "b", "c"], target_modules=["q_proj", "k_proj"])
    if make is added:
        model.set_adapter("second")
        model.delete_adapter("default")
        model.add_adapter("default", config)
    else:
        delete_adapter(model, "default", "pblora_")
        inject_adapter_in_model(config, model)
    assert len(conditions(model)) == 1
    assert get_objectives(model, "default") == ["a", "b", "c"]
    torch.testing.assert_close(get_preference(model, "default"), torch.full((3,), 1 / 3))
    assert get_preference(model, "second").tolist() == [1.0, 0.0]


def test_two_methods_on_one_model_keep_their_objectives():
    """Both under the same name, as PEFT injects them."""
    model = inject_adapter_in_model(PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"]), tiny_llama())
    model = inject_adapter_in_model(SVDLoraConfig(objectives=["a", "b"], target_modules=["v_proj"]), model)
    attention = model.model.layers[0].self_attn
    objectives = [layer.adapter("default").condition.objectives for layer in (attention.q_proj, attention.v_proj)]
    assert objectives == [OBJECTIVES, ["a", "b"]]
    set_preference(model, [0.25, 0.75])
    for layer in (attention.q_proj, attention.v_proj):
        assert layer.adapter("default").condition.preference.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("copier", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_a_preference_reaches_adapters_of_another_method_below(order, copier):
    inner = MoSLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"], init_weights=False)
    outer = PBLoraConfig(objectives=OBJECTIVES, target_modules=["k_proj"], init_weights=False)
    base = tiny_llama()
    if order == "before":
        inject_adapter_in_model(inner, base, adapter_name="inner")
    model = get_peft_model(base, outer)
    if order == "after":
        inject_adapter_in_model(inner, base, adapter_name="inner")
    model = copier(model).eval()
    set_preference(model, [1.0, 0.0])
    attention = model.base_model.model.model.layers[1].self_attn
    for layer, name in ((attention.q_proj, "inner"), (attention.k_proj, "default")):
        assert layer.adapter(name).condition.preference.tolist() == [1.0, 0.0]
    set_preference(model, [0.0, 1.0], "inner")
    assert get_preference(model).tolist() == [1.0, 0.0]
    assert get_preference(model, "inner").tolist() == [0.0, 1.0]
    with use_preference(model, [0.5, 0.5]):
        assert attention.q_proj.adapter("inner").condition.preference.tolist() == [0.5, 0.5]
    assert get_preference(model, "inner").tolist() == [0.0, 1.0]


def test_the_default_preference_is_said_once_for_each_adapter():
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"])
    model, said = added(config, tiny_llama()), []
    for name in ("default", "second", "default", "second"):
        model.set_adapter(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(IDS)
        said.append(len(caught))
    assert said == [1, 1, 0, 0]


SEVERAL = ["Llama", "GPT-2", "Mixtral", "LFM2"]


def config_for(name, **settings):
    settings |= {"target_modules": ARCHITECTURES[name].attention, "fan_in_fan_out": name == "GPT-2"}
    return PBLoraConfig(objectives=OBJECTIVES, lora_alpha=40, init_weights=False, **settings)


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize("name", SEVERAL)
def test_calls_of_a_peft_model_are_the_arm_once_there_is_a_processor(name, task):
    """Without a task PEFT calls the model below past the tuner."""
    base = tiny(name)
    arm = get_peft_model(base, config_for(name, task_type=task)).eval()
    set_preference(arm, [0.3, 0.7])
    write = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, plain = arm(input_ids=IDS).logits, tiny(name)(IDS).logits
        text = arm.generate(input_ids=IDS, **write)
        processor = PARMLogitsProcessor(arm, [0.3, 0.7])
        assert torch.equal(arm(input_ids=IDS).logits, expected)
        assert torch.equal(arm(IDS).logits, expected)
        assert torch.equal(arm.generate(input_ids=IDS, **write), text)
        assert torch.equal(base(IDS).logits, plain)
        guided = PARM(base, arm, [0.3, 0.7]).generate(IDS, **write)
        assert torch.equal(base.generate(IDS, logits_processor=[processor], **write), guided)
        for given in ([processor], (processor,)):
            assert torch.equal(arm.generate(IDS, None, given, **write), guided)
            assert torch.equal(arm.generate(IDS, logits_processor=given, **write), guided)
        assert torch.equal(arm.generate(IDS, None, [lambda ids, scores: scores], **write), text)
    assert not torch.equal(guided, text)
    assert not torch.equal(guided, base.generate(IDS, **write))


@pytest.mark.parametrize("name", SEVERAL)
def test_what_stepped_aside_in_a_model_of_transformers_is_set_active_on_its_layers(name):
    model, plain = inject_adapter_in_model(config_for(name), tiny(name)).eval(), tiny(name)(IDS).logits
    set_preference(model, [0.3, 0.7])
    expected = model(IDS).logits
    PARMLogitsProcessor(model, [0.3, 0.7], adapter_name="default")
    assert torch.equal(model(IDS).logits, plain)
    set_adapter(model, "default")  # as transformers does
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("switch", ["disabled and enabled", "another added", "another deleted"])
@pytest.mark.parametrize("name", SEVERAL)
def test_what_stepped_aside_stays_aside_unless_it_is_set_active(name, switch):
    base, plain = tiny(name), tiny(name)(IDS).logits
    arm = get_peft_model(base, config_for(name, task_type="CAUSAL_LM")).eval()
    arm.add_adapter("second", config_for(name, task_type="CAUSAL_LM"))
    set_preference(arm, [0.3, 0.7])
    expected = arm(IDS).logits
    PARMLogitsProcessor(arm, [0.3, 0.7])
    if switch == "disabled and enabled":
        with arm.disable_adapter():
            assert torch.equal(arm(IDS).logits, plain)
    elif switch == "another added":
        arm.add_adapter("third", config_for(name, task_type="CAUSAL_LM"))
    else:
        for layer in arm.modules():
            if isinstance(layer, PreferenceLinear):
                layer._active_adapter = ["default", "second"]
        arm.delete_adapter("second")
    assert torch.equal(base(IDS).logits, plain)
    arm.set_adapter("default")
    assert torch.equal(base(IDS).logits, expected)
