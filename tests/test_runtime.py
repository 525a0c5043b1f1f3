# SPDX-License-Identifier: Apache-2.0
"""The preference as run-time state: what copies, compilers, checkpointing, beams and several processes do to it."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from distributed_worker import PREFERENCES, batch, gradients, loss_of
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from peft_pblora import PBLoraConfig, get_preference, set_preference, use_preference
from peft_pblora.adapter import LowRankAdapter
from peft_pblora.condition import Condition
from peft_pblora.cores import Core


IDS = torch.arange(2, 18).view(2, 8)
HERE = Path(__file__).parent


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_preference_survives_copies_and_is_not_shared(copier):
    arm = tiny_arm()
    set_preference(arm, [0.25, 0.75])
    clone = copier(arm)
    torch.testing.assert_close(clone(IDS).logits, arm(IDS).logits)
    set_preference(clone, [1.0, 0.0])
    assert get_preference(arm).tolist() == [0.25, 0.75]


def test_default_preference_is_announced_once():
    arm, chosen = tiny_arm(), tiny_arm()
    with pytest.warns(UserWarning, match=r"No preference was set.*helpful=0.5, harmless=0.5"):
        arm(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arm(IDS)
        set_preference(chosen, [0.5, 0.5])
        chosen(IDS)


class DeepCore(Core):
    """W(α) = diag(scale · (M α + b)), with a module and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.rank, self.gate = 2, torch.nn.Sequential(torch.nn.Linear(2, 2))
        self.register_buffer("scale", torch.ones(1))

    def reset_parameters(self):
        self.gate[0].reset_parameters()

    def forward(self, preference):
        return torch.diag_embed(self.scale * self.gate(preference)), None


@pytest.mark.parametrize("change", ["weight", "bias", "scale", "other weight"])
def test_fold_is_dropped_when_a_module_or_a_buffer_of_the_core_changes(change):
    adapter = LowRankAdapter(4, 3, DeepCore(), 1.0, Condition(OBJECTIVES, [0.2, 0.8]), identity=False).eval()
    adapter.condition.was_set = True
    x, nothing = torch.randn(2, 4), torch.zeros(2, 3)
    with torch.no_grad():
        before = adapter(x, nothing.clone())
        if change == "other weight":
            adapter.core.gate[0].weight = torch.nn.Parameter(torch.randn(2, 2))
        else:
            (adapter.core.scale if change == "scale" else getattr(adapter.core.gate[0], change)).add_(1)
        after = adapter(x, nothing.clone())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, adapter(x, nothing))


def test_fold_is_dropped_when_the_preference_or_a_weight_changes():
    arm = tiny_arm()
    layer = arm.base_model.model.model.layers[1].self_attn.q_proj.adapter("default")
    other = copy.deepcopy(arm)

    def check():
        with torch.no_grad():
            cached = arm(IDS).logits
        other.load_state_dict(arm.state_dict())
        set_preference(other, get_preference(arm))
        torch.testing.assert_close(cached, other(IDS).logits, atol=1e-5, rtol=1e-5)
        return cached

    set_preference(arm, [0.2, 0.8])
    outputs = [check()]
    assert layer._folds
    set_preference(arm, [0.9, 0.1])
    outputs.append(check())
    with torch.no_grad():
        layer.core.W2.mul_(2)
    outputs.append(check())
    layer.A.weight.data = layer.A.weight.data * 2
    outputs.append(check())
    arm.load_state_dict({k: v * 1.1 if "pblora" in k else v for k, v in arm.state_dict().items()})
    outputs.append(check())
    arm.double()
    outputs.append(arm(IDS).logits.float())
    arm.float()
    check()
    for before, after in zip(outputs, outputs[1:-1]):
        assert not torch.allclose(before, after)
    arm.train()
    assert not layer._folds


def test_compiled_model_does_not_recompile_for_a_new_preference():
    arm = tiny_arm()
    set_preference(arm, [0.5, 0.5])
    compiled = torch.compile(arm, fullgraph=True, backend="aot_eager")
    for preference in ([1.0, 0.0], [0.3, 0.7], [0.0, 1.0]):
        set_preference(arm, preference)
        with torch.no_grad(), torch.compiler.set_stance("default" if preference[0] == 1.0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(IDS).logits, arm(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_the_preference_of_the_forward(reentrant):
    results = []
    for checkpointing in (False, True):
        arm = tiny_arm().train()
        if checkpointing:
            arm.gradient_checkpointing_enable({"use_reentrant": reentrant})
            arm.enable_input_require_grads()
        set_preference(arm, [0.2, 0.8])
        loss_of(arm, IDS).backward()
        results.append(gradients(arm))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_refuses_a_preference_that_changed_before_backward(reentrant):
    arm = tiny_arm().train()
    arm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    arm.enable_input_require_grads()
    with use_preference(arm, [0.2, 0.8]):
        loss = loss_of(arm, IDS)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        loss.backward()
    arm.train()
    set_preference(arm, [0.2, 0.8])
    first = loss_of(arm, IDS)
    set_preference(arm, [0.9, 0.1])
    second = loss_of(arm, IDS)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        (first + second).backward()


def checkpointed_arm(reentrant=False, **config):
    arm = tiny_arm(**config).train()
    arm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    arm.enable_input_require_grads()
    return arm


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_a_repeat_is_refused_wherever_the_adapter_is_in_its_block(target):
    """The repeat of a block stops at the last tensor that its backward needs, which may be the adapter's own."""
    arm = checkpointed_arm(target_modules=[target], layers_to_transform=[1])
    with use_preference(arm, [0.2, 0.8]):
        loss = loss_of(arm, IDS)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["without gradients", "generated", "refused", "without backward"])
def test_checkpointing_goes_on_at_another_preference_after_a_forward_that_has_no_backward(first, reentrant):
    expected, arm = tiny_arm().train(), checkpointed_arm(reentrant)
    set_preference(expected, [0.2, 0.8])
    loss_of(expected, IDS).backward()
    set_preference(arm, [1.0, 0.0])
    if first == "generated":
        arm.generate(input_ids=IDS, max_new_tokens=2, use_cache=False, pad_token_id=0)
    else:
        with torch.set_grad_enabled(first != "without gradients"):
            former = loss_of(arm, IDS)
    set_preference(arm, [0.2, 0.8])
    if first == "refused":
        with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
            former.backward()
    if first == "without backward" and reentrant:  # whether one comes is not known there
        arm.train()
    arm.zero_grad()
    loss_of(arm, IDS).backward()
    torch.testing.assert_close(gradients(arm), gradients(expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_a_preference_that_is_as_it_was(reentrant):
    """Such as after a look at another one in between."""
    expected, arm = tiny_arm().train(), checkpointed_arm(reentrant)
    for model in (expected, arm):
        set_preference(model, [0.2, 0.8])
        loss = loss_of(model, IDS)
        with torch.no_grad(), use_preference(model, [0.9, 0.1]):
            model(IDS)
        set_preference(model, [0.2, 0.8])
        loss.backward()
    torch.testing.assert_close(gradients(arm), gradients(expected))


def test_checkpointed_steps_at_many_preferences_train():
    """Several forwards before a backward, and a preference after the other: the gradients of steps without it."""
    results = []
    for checkpointing in (False, True):
        arm = tiny_arm().train()
        if checkpointing:
            arm.gradient_checkpointing_enable({"use_reentrant": False})
            arm.enable_input_require_grads()
        for preference in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
            set_preference(arm, preference)
            (loss_of(arm, IDS) + loss_of(arm, IDS.flip(1))).backward()
            loss_of(arm, IDS).backward()
        results.append(gradients(arm))
    torch.testing.assert_close(results[0], results[1])
    assert all(gradient.abs().max() > 0 for gradient in results[0].values())


def assert_rows_equal_rows_alone(arm, settings):
    """Each row generated with its own preference equals the row generated alone."""
    set_preference(arm, [[1.0, 0.0], [0.0, 1.0]])
    together = arm.generate(input_ids=IDS, **settings)
    alone = []
    for row, preference in zip(IDS, ([1.0, 0.0], [0.0, 1.0])):
        set_preference(arm, preference)
        alone.append(arm.generate(input_ids=row[None], **settings))
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_rows_of_preferences_follow_the_rows_that_generate_makes(mode):
    arm = tiny_arm()
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **mode}
    if "do_sample" in mode:
        settings.update(do_sample=True, top_k=1)
    assert_rows_equal_rows_alone(arm, settings)


def test_rows_of_preferences_in_an_encoder_decoder_with_beams():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    arm = tiny_arm(model, target_modules=["q", "v"]).eval()
    settings = {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": None}
    assert_rows_equal_rows_alone(arm, settings)


def test_a_reference_adapter_can_be_copied_by_name_as_trl_does():
    arm = tiny_arm()
    arm.add_adapter("ref", PBLoraConfig(**{**arm.peft_config["default"].to_dict(), "peft_type": None}))
    state = arm.state_dict()
    copied = 0
    for name, parameter in arm.named_parameters():
        if ".default." in name:
            parameter = state[name.replace(".default.", ".ref.")].copy_(parameter.detach())
            copied += 1
    assert copied == sum("pblora_" in name for name in state) // 2
    set_preference(arm, [0.3, 0.7])
    expected = arm(IDS).logits
    arm.set_adapter("ref")
    torch.testing.assert_close(arm(IDS).logits, expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_preference_stays_off_the_meta_device(tmp_path, low_cpu_mem_usage):
    from peft import PeftModel

    tiny_arm().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(1), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert get_preference(loaded).tolist() == [0.5, 0.5]
    with torch.device("meta"):
        on_meta = get_peft_model(tiny_llama(), PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"]))
    set_preference(on_meta, [0.2, 0.8])
    torch.testing.assert_close(get_preference(on_meta), torch.tensor([0.2, 0.8]))


@pytest.mark.parametrize(
    "kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("fsdp-factors", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_gradients_of_one(tmp_path, kind):
    """Per-row preferences, different on each rank; the authors' pattern trains with a stale preference under FSDP2."""
    arm = tiny_arm().train()
    set_preference(arm, PREFERENCES)
    loss_of(arm, batch()).backward()
    meeting = str(tmp_path / "meeting")  # a file, since a free port may be taken by the time that it is used
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, str(HERE / "distributed_worker.py")]
    workers = [
        subprocess.Popen([*command, str(rank), "2", meeting, kind, str(tmp_path / "gradients.pt")], env=environment)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt")
    expected = gradients(arm)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
