# SPDX-License-Identifier: Apache-2.0
"""Linear layers with packed weights: the products of float64, whatever happens to weights, and all that PEFT does."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_arm, tiny_llama
from decoding.architectures import ARCHITECTURES, tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_pblora import PBLoraConfig, set_preference
from trl_parm import PARM, PreferenceARMConfig, cpu, optimize_for_cpu, undo_optimize_for_cpu
from trl_parm.cpu import PackedLinear
from trl_parm.decoding import BASE, Guided
from trl_parm.training import model as training_model


IDS = torch.tensor([[5, 6, 7, 8, 3], [9, 1, 2, 4, 4]])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HAS_BFLOAT16 = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="oneDNN has no bfloat16 on this CPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=HAS_BFLOAT16)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def linear(inputs: int = 40, outputs: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["AVX512", "no AVX512"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(cpu, "has_avx512", lambda: request.param)
    return request.param


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(40,), (1, 40), (2, 40), (3, 1, 40), (5, 40), (2, 9, 40), (300, 40), (0, 40)], ids=str
)
def test_products_equal_those_in_float64(avx512, dtype, bias, shape):
    layer = linear(bias=bias)
    packed = PackedLinear.of(layer, dtype)
    x = torch.randn(shape)
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.no_grad():
        found = packed(x)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_gradients_of_inputs_equal_those_in_float64(avx512, dtype, rows):
    layer, x = linear(), torch.randn(rows, 40)
    weights = torch.randn(rows, 24, dtype=torch.float64)
    found = []
    for module, given in ((PackedLinear.of(layer, dtype), x.clone()), (copy.deepcopy(layer).double(), x.double())):
        (module(given.requires_grad_()).double() * weights).sum().backward()
        found.append(given.grad.double())
    torch.testing.assert_close(*found, atol=5 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_product_goes_to_the_faster_kernel(avx512, gradients):
    """Without AVX512 those in float32 with one row, or many, are PyTorch's own, to the last bit; no copy is made."""
    for rows, packed in ((1, avx512), (2, True), (127, True), (128, avx512), (300, avx512)):
        layer, x = linear(), torch.randn(rows, 40, requires_grad=gradients)
        for dtype in (None, torch.float32):
            ours = PackedLinear.of(layer, dtype)
            with torch.set_grad_enabled(gradients):
                found = ours(x)
            assert (ours._packed is not None) == packed
            assert packed or torch.equal(found, layer(x))


@HAS_BFLOAT16
def test_products_in_bfloat16_are_always_packed(avx512):
    for layer, dtype in ((linear(), torch.bfloat16), (linear().bfloat16(), None)):
        for rows in (1, 2, 128):
            ours = PackedLinear.of(layer, dtype)
            ours(torch.ones(rows, 40, dtype=layer.weight.dtype))
            assert ours._packed is not None


def test_a_cpu_without_products_in_bfloat16(monkeypatch):
    """It says so before anything is changed; a model that was loaded in bfloat16 stays as it is."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    model = tiny_llama()
    with pytest.raises(ValueError, match="no products in bfloat16 on this CPU.*Leave `dtype` out"):
        optimize_for_cpu(model, torch.bfloat16)
    assert not packed_layers(cpu.optimize_loaded(model.bfloat16(), "bfloat16"))
    assert cpu.products_of("bfloat16") is None
    assert packed_layers(cpu.optimize_loaded(tiny_llama(), "float32"))


def test_weights_that_train_get_their_gradients():
    layer = PackedLinear.of(linear(), torch.bfloat16).requires_grad_()
    layer(torch.ones(2, 40)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((24, 40), 2.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.data.add_(1.0),
        lambda layer: setattr(layer.weight, "data", layer.weight.data + 1.0),
        lambda layer: layer.load_state_dict({"weight": layer.weight + 1.0}),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1.0)),
        lambda layer: next(layer.parameters()).add_(1.0),
        lambda layer: layer._apply(lambda t: t + 1.0),
    ],
    ids=["data in place", "data replaced", "loaded", "parameter replaced", "in place by parameters()", "applied"],
)
@torch.no_grad()
def test_a_weight_that_changes_is_packed_anew(change):
    layer, x = PackedLinear.of(linear(bias=False), torch.float32), torch.ones(2, 40)
    before = layer(x)
    change(layer)
    torch.testing.assert_close(layer(x), before + 40)


@torch.inference_mode()
def test_a_weight_that_changes_in_inference_mode_is_seen():
    """PyTorch counts no changes of what was made there."""
    layer, x = PackedLinear.of(linear(bias=False), torch.float32), torch.ones(2, 40)
    before = layer(x)
    assert torch.equal(before, layer.plain()(x))
    next(layer.parameters()).add_(1.0)
    torch.testing.assert_close(layer(x), before + 40)


def test_a_weight_from_outside_that_changes_in_inference_mode_is_packed_anew():
    layer, x = PackedLinear.of(linear(bias=False), torch.float32), torch.ones(2, 40)
    with torch.inference_mode():
        before = layer(x)
        assert layer._packed is not None
        next(layer.parameters()).add_(1.0)
        torch.testing.assert_close(layer(x), before + 40)


@pytest.mark.parametrize("training", [True, False])
@every_dtype
def test_what_a_fused_optimizer_changes_is_seen(dtype, training):
    """It leaves versions as they are; a forward without gradients may come between backward and step too."""
    layer, x = PackedLinear.of(linear(bias=False), dtype).train(training), torch.ones(2, 40)
    layer.requires_grad_()
    twin = copy.deepcopy(layer).plain()
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, fused=True) for one in (layer, twin)]
    for _ in range(3):
        for one, optimizer in zip((layer, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = one(x).square().sum()
            with torch.no_grad():
                one(x)
            loss.backward()
            with torch.no_grad():
                one(x)
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), twin(x))
    assert torch.equal(layer.weight, twin.weight)


def test_a_weight_that_would_train_but_has_not_is_packed():
    """As of every model that was loaded to be read."""
    layer = PackedLinear.of(linear(), torch.float32).requires_grad_().eval()
    with torch.no_grad():
        layer(torch.ones(2, 40))
    assert layer._packed is not None
    layer(torch.ones(2, 40))
    assert layer._packed is None
    with torch.no_grad():
        layer.eval()(torch.ones(2, 40))
    assert layer._packed is not None


def test_what_cannot_be_multiplied_packed_is_multiplied_as_ever():
    layer, packed = linear(), PackedLinear.of(linear(), torch.bfloat16)
    x = torch.randn(2, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(packed).double()(x.double()), copy.deepcopy(layer).double()(x.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), layer(x))
        assert torch.equal(torch.compile(packed, backend="eager")(x), layer(x))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ARCHITECTURES),
        pytest.param("Llama", torch.bfloat16, marks=HAS_BFLOAT16),
    ],
    ids=str,
)
def test_models_answer_as_before_and_come_back(name, dtype):
    model = tiny(name).eval()
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        assert optimize_for_cpu(model, dtype) is model
        found = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, before, atol=20 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert packed_layers(model)
        assert list(model.state_dict()) == names
        undo_optimize_for_cpu(model)
        assert not packed_layers(model)
        assert torch.equal(model(**inputs, use_cache=False).logits, before)


def test_hooks_names_and_tied_weights_stay(tmp_path):
    model = tiny_llama(tie_word_embeddings=True).eval()
    seen = []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    optimize_for_cpu(model, torch.float32)
    with torch.no_grad():
        before = model(IDS).logits
    assert seen == [1]
    hook.remove()
    model(IDS)
    assert seen == [1]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(IDS).logits, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(undo_optimize_for_cpu(model)))):
        torch.testing.assert_close(other(IDS).logits, before)


@every_dtype
@pytest.mark.parametrize("first", ["packed", "adapted"])
@pytest.mark.parametrize("kind", ["pblora", "lora"])
def test_adapters_act_merge_and_come_off(dtype, first, kind):
    config = {
        "pblora": lambda: PBLoraConfig(
            objectives=["a", "b"], target_modules=["q_proj", "up_proj"], init_weights=False
        ),
        "lora": lambda: LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    }[kind]()
    plain, model = tiny_llama().eval(), tiny_llama().eval()
    torch.manual_seed(1)
    twin = get_peft_model(plain, config).eval()
    torch.manual_seed(1)
    if first == "packed":
        optimize_for_cpu(model, dtype)
    arm = get_peft_model(model, config).eval()
    if first == "adapted":
        optimize_for_cpu(arm, dtype)
    assert len(packed_layers(arm)) == 2 * 7 + 1  # the layers of the model, and none of the adapter
    close = {"atol": 20 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for model_ in (arm, twin) if kind == "pblora" else ():
        set_preference(model_, [0.2, 0.8])
    with torch.no_grad():
        torch.testing.assert_close(arm(IDS).logits, twin(IDS).logits, **close)
        arm.merge_adapter()
        twin.merge_adapter()
        torch.testing.assert_close(arm(IDS).logits, twin(IDS).logits, **close)
        arm.unmerge_adapter()
        twin.unmerge_adapter()
        torch.testing.assert_close(arm(IDS).logits, twin(IDS).logits, **close)
        whole, expected = arm.merge_and_unload(), twin.merge_and_unload()
        torch.testing.assert_close(whole(IDS).logits, expected(IDS).logits, **close)


def test_guided_texts_are_the_same_in_float32():
    texts = []
    for pack in (False, True):
        arm = tiny_arm().eval()
        if pack:
            optimize_for_cpu(arm, torch.float32)
        guided = PARM(arm.get_base_model(), arm, {"helpful": 0.3, "harmless": 0.7}, beta=0.5)
        texts.append(guided.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, num_beams=2))
    assert torch.equal(*texts)


@pytest.mark.parametrize("rows", [16, 32, 48, 64])
def test_as_many_rows_as_a_layer_has_features_are_no_state(rows):
    """A packed copy that is made in a forward is not taken for what a text leaves on its model."""
    model = optimize_for_cpu(tiny_llama(), torch.float32)
    ids = torch.randint(2, 60, (rows, 4), generator=torch.Generator().manual_seed(0))
    found = Guided(model, BASE).generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    expected = tiny_llama().generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(found, expected)


def test_the_dtype_is_that_of_the_units(monkeypatch):
    for units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cpu, "has_bfloat16_units", lambda units=units: units)
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
        layers = packed_layers(optimize_for_cpu(tiny_llama()))
        assert {layer.dtype for layer in layers} == {expected}
        assert {layer.weight.dtype for layer in layers} == {torch.float32}
    with pytest.warns(UserWarning, match="no units for bfloat16"):
        optimize_for_cpu(tiny_llama(), torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_for_cpu(tiny_llama(), torch.float32)


def test_what_cannot_be_packed_is_refused():
    model = optimize_for_cpu(tiny_llama())
    with pytest.raises(ValueError, match="packed already. Call `undo_optimize_for_cpu`"):
        optimize_for_cpu(model)
    with pytest.raises(ValueError, match="in float32 or bfloat16"):
        optimize_for_cpu(tiny_llama(), torch.float16)
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match="weights on `meta`"):
        optimize_for_cpu(model)
    with pytest.raises(ValueError, match="No linear layer of the Sequential could be packed"):
        optimize_for_cpu(nn.Sequential(nn.ReLU(), nn.Linear(2, 2).double()))


def test_quantized_layers_stay_and_a_model_of_them_alone_is_refused():
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quanto.quantize(model, weights=quanto.qint8)
    with pytest.raises(ValueError, match="which is not quantized"):
        optimize_for_cpu(model)


def test_a_single_layer_is_packed_too():
    layer = linear()
    packed = optimize_for_cpu(layer, torch.float32)
    assert isinstance(packed, PackedLinear)
    assert type(undo_optimize_for_cpu(packed)) is nn.Linear


@pytest.mark.parametrize("sharding", [None, "FSDP", "ZeRO 3"])
def test_a_model_whose_weights_will_be_sharded_is_not_packed_for_training(tmp_path, monkeypatch, sharding):
    tiny_llama().save_pretrained(tmp_path)
    if sharding == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(training_model, "is_deepspeed_zero3_enabled", lambda: sharding == "ZeRO 3")
    args = PreferenceARMConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    packed = packed_layers(training_model.load_model(str(tmp_path), args, None))
    assert bool(packed) == (sharding is None)
