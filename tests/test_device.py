# SPDX-License-Identifier: Apache-2.0
"""What runs on a GPU says what it says on the CPU, and a guided step neither waits for the GPU nor mixes devices.

Tests that take a `device` run on the CPU too, where they show that the tests themselves hold.
"""

import copy
import traceback

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import tiny_arm, tiny_llama
from decoding.tables import BETAS, DECODERS, MASK, PROMPTS, ROWS, Models, generate, lora_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StaticCache

from peft_pblora import set_preference
from peft_pblora.kv_cache import cache_argument, cache_in
from trl_parm import BASE, LM, PARM, GenARM, Guided, GuidedLogitsProcessor, PARMLogitsProcessor, SpeculativeDecoding
from trl_parm.decoding.cache import GuidedCache
from trl_parm.noise import Sampling, gumbel_noise


CUDA = pytest.param("cuda:0", marks=pytest.mark.cuda)
LENGTH = {"max_new_tokens": 10, "eos_token_id": -1}


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> torch.device:
    return torch.device(request.param)


def text(model, device, prompts=3, **settings):
    """Greedy tokens of the tests' prompts, or of the one without padding."""
    rows = slice(1, 2) if prompts == 1 else slice(3)
    ids, mask = PROMPTS[rows].to(device), MASK[rows].to(device)
    return model.generate(ids, attention_mask=mask, **{**LENGTH, **settings}).cpu()


@pytest.mark.parametrize("door", ["model", "processor"])
@pytest.mark.parametrize(
    ("name", "on_base", "mode"),
    [
        ("PARM", True, {}),
        ("PARM, α and β a row", True, {}),
        ("PARM, α and β a row", False, {"num_beams": 3, "num_return_sequences": 2}),
        ("PARM", True, {"cache_implementation": "static", "disable_compile": True}),
        ("GenARM, α and β a row", False, {}),
        ("MOD, forward KL, α a row", False, {}),
        ("two preferences of one ARM and the untrained one", True, {"num_beams": 3}),
        ("PARM", False, {"prompts": 1, "prompt_lookup_num_tokens": 3}),
        ("PARM", False, {"prompts": 1, "assistant_model": "reference"}),
    ],
)
def test_decoders_answer_as_their_formula_does_in_float64_on_a_cpu(name, on_base, mode, door, device):
    decoder, models = DECODERS[name], Models.make(on_base)
    mode, settings = dict(mode), {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 10}
    naive = {"assistant": "small"} if "assistant_model" in mode else {}
    expected = generate(Models.make(on_base), decoder, "naive", **naive, **_without(mode, "assistant_model"))
    for model in (models.base, models.arm, models.first, models.second, models.reference):
        model.to(device)
    if "assistant_model" in mode:
        mode["assistant_model"] = models.reference
    rows = slice(1, 2) if mode.pop("prompts", 3) == 1 else slice(3)
    inputs = {"inputs": PROMPTS[rows].to(device), "attention_mask": MASK[rows].to(device)}
    if door == "model":
        found = Guided(models.base, decoder.formula(models)).generate(**inputs, **settings, **mode)
    else:
        guide = GuidedLogitsProcessor(decoder.formula(models))
        found = models.base.generate(**inputs, logits_processor=[guide], **settings, **mode)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=1e-3)


def _without(settings, name):
    return {key: value for key, value in settings.items() if key != name}


@pytest.mark.parametrize("draft", ["auto", "prompt", "model"])
def test_speculative_text_is_the_plain_one(draft, device):
    """Drawing with `top_k=1` goes the way of sampling, and has one outcome."""
    base, arm, small = tiny_llama(0).to(device), tiny_arm(tiny_llama(1)).to(device), tiny_llama(2).to(device)
    guided = PARM(base, arm, ROWS, BETAS)
    plain = text(PARM(tiny_llama(0), tiny_arm(tiny_llama(1)), ROWS, BETAS), "cpu")
    one = SpeculativeDecoding(small if draft == "model" else draft, draft_tokens=3)
    for settings in ({}, {"do_sample": True, "top_k": 1}):
        assert torch.equal(text(guided, device, custom_generate=one, **settings), plain)
    assert one.drafted


@pytest.mark.parametrize("moved", ["first", "later"])
@pytest.mark.parametrize("preference", [[0.3, 0.7], ROWS.tolist()], ids=["one", "rows"])
def test_a_preference_comes_from_anywhere(preference, moved, device):
    arm, twin = tiny_arm(), tiny_arm()
    set_preference(twin, preference)
    expected = twin(input_ids=PROMPTS).logits
    with torch.no_grad():
        arm(input_ids=PROMPTS)  # folds the adapter where it is
    if moved == "first":
        arm.to(device)
    for given in (preference, torch.tensor(preference), torch.tensor(preference, device=device)):
        set_preference(arm, given)
        for training in (True, False):
            arm.to(device).train(training)
            with torch.set_grad_enabled(training):
                found = arm(input_ids=PROMPTS.to(device)).logits
            torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    α = torch.tensor(preference, device=device)
    plain = text(PARM(tiny_llama(0), tiny_arm(), preference), "cpu")
    assert torch.equal(text(PARM(tiny_llama(0).to(device), arm, α), device), plain)


def test_bfloat16_differs_from_float32_by_far_less_than_guidance_does(device):
    arm, rounded = tiny_arm(tiny_llama(0)), tiny_arm(tiny_llama(0)).to(device, torch.bfloat16)
    exact, unguided = (
        Guided(arm.get_base_model(), formula)(input_ids=PROMPTS, attention_mask=MASK).logits
        for formula in (BASE + LM(arm, [0.3, 0.7]), 1.0 * BASE)
    )
    guided = PARM(rounded.get_base_model(), rounded, [0.3, 0.7])
    found = guided(input_ids=PROMPTS.to(device), attention_mask=MASK.to(device)).logits
    assert found.dtype == torch.float32
    read = MASK.bool()
    error, effect = ((x - exact)[read].abs().mean() for x in (found.cpu(), unguided))
    assert error < 0.05 * effect


def test_noise_is_a_function_of_seed_and_number(device):
    scores = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(device)
    noise = gumbel_noise(5, 2, scores)
    assert noise.device.type == device.type
    assert torch.equal(noise, gumbel_noise(5, 2, scores[:1]))
    assert not torch.equal(noise, gumbel_noise(5, 3, scores))
    sampling = Sampling(0.8, top_k=50, top_p=0.9, min_p=0.01)
    torch.testing.assert_close(sampling.warp(scores).cpu(), sampling.warp(scores.cpu()))
    together = sampling.noisy(scores, [1, 2, 3], [0, 0, 4])
    assert torch.equal(together[2:], sampling.noisy(scores[2:], [3], [4]))


WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim")
"""Operations whose result the CPU needs, so that it waits until a GPU has computed all that came before."""


class Operations(TorchDispatchMode):
    """The names of all operations, and for each that waits the line of ours that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if function._schema.name.removeprefix("aten::") in WAITING:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
            self.waiting.append([line for line in lines if "trl_parm/" in line or "peft_pblora/" in line][-1:])
        return function(*args, **(kwargs or {}))


def formulas():
    shared, small, loras = tiny_arm(tiny_llama(0)), tiny_arm(tiny_llama(1)), lora_model("a", "b")
    return {
        "PARM": PARM(shared.get_base_model(), shared, [0.3, 0.7]),
        "PARM, α and β a row": PARM(shared.get_base_model(), shared, ROWS, BETAS),
        "PARM, weak to strong": PARM(tiny_llama(0), small, [0.3, 0.7]),
        "GenARM": GenARM(loras.get_base_model(), {"a": "a", "b": "b"}, [0.4, 0.6], adapters_of=loras),
        "MOD-w2s": Guided(tiny_llama(0), BASE + LM(small, [0.3, 0.7]) - LM(small, disable_adapter=True)),
    }


def decode_a_token(guided, device, operations):
    """A step of three rows after their prompts, with caches of fixed size: to find out which rows are alike waits."""
    caches = guided._parts(lambda term, copies: StaticCache(config=term.backbone.config, max_cache_len=16), False)
    ids, mask = torch.ones(3, 5, dtype=torch.long, device=device), torch.ones(3, 6, dtype=torch.long, device=device)
    settings = {"use_cache": True, "prompt_length": 5}
    cache = cache_argument(guided.backbone, GuidedCache(caches))
    cache = cache_in(guided(input_ids=ids, attention_mask=mask[:, :5], **settings, **cache))
    with operations:
        arguments = cache_argument(guided.backbone, cache)
        return guided(input_ids=ids[:, :1], attention_mask=mask, **settings, **arguments).logits


@pytest.mark.parametrize("name", formulas())
def test_a_guided_step_waits_for_nothing(name):
    operations = Operations()
    decode_a_token(formulas()[name], "cpu", operations)
    assert operations.count > 100
    assert operations.waiting == []


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of PyTorch does not know CUDA")
@pytest.mark.parametrize("name", formulas())
def test_a_guided_step_mixes_no_devices(name):
    """On tensors that only claim to be on a GPU, whose operations refuse tensors of another device."""
    guided, fake = formulas()[name], FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for model in {id(m): m for m in (guided.backbone, *(term.backbone for term in guided.terms))}.values():
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    moved = {n: torch.empty_like(t, device="cuda") for n, t in tensors.items() if t is not None}
                    tensors |= {n: nn.Parameter(t) if tensors is module._parameters else t for n, t in moved.items()}
        operations = Operations()
        assert decode_a_token(guided, "cuda", operations).device.type == "cuda"
    assert operations.waiting == []


@pytest.mark.cuda
@pytest.mark.parametrize("door", ["model", "processor", "speculative"])
@pytest.mark.parametrize(("of_base", "of_guide"), [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
def test_base_and_guide_on_two_devices(of_base, of_guide, door):
    if of_guide == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plain = text(PARM(tiny_llama(0), tiny_arm(), ROWS, BETAS), "cpu")
    base, arm = tiny_llama(0).to(of_base), tiny_arm().to(of_guide)
    if door == "processor":
        found = text(base, of_base, logits_processor=[PARMLogitsProcessor(arm, ROWS, BETAS)])
    else:
        settings = {"custom_generate": SpeculativeDecoding(draft_tokens=2)} if door == "speculative" else {}
        found = text(PARM(base, arm, ROWS, BETAS), of_base, **settings)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("preference", [[1.0, 0.0], ROWS], ids=["one", "rows"])
@pytest.mark.parametrize("layer", ["cpu", "disk", pytest.param("last GPU", marks=pytest.mark.cuda)])
def test_weights_that_accelerate_keeps_elsewhere(preference, layer, device, tmp_path):
    """All of them, or those of a layer, which are brought for a forward, with what the layer is given."""
    twin, arm = tiny_arm(tiny_llama(0)), tiny_arm(tiny_llama(0))
    plain = text(PARM(twin.get_base_model(), twin, preference), "cpu")
    base = arm.get_base_model()
    if layer == "cpu":
        cpu_offload(base, execution_device=device)
    else:
        there = layer if layer == "disk" else torch.device("cuda", torch.cuda.device_count() - 1)
        names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
        places = {**dict.fromkeys(names, device), "model.layers.1": there}
        dispatch_model(base, places, main_device=device, offload_dir=tmp_path)
    for cache in ({}, {"use_cache": False}):
        assert torch.equal(text(PARM(base, arm, preference), device, **cache), plain)


@pytest.mark.cuda
def test_a_base_in_4_bits_guides_itself_in_one_forward_as_in_two(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(0, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, device_map={"": 0})
    arm = tiny_arm(base)
    found = text(PARM(arm.get_base_model(), arm, [0.3, 0.7]), "cuda")
    expected = text(arm.get_base_model(), "cuda", logits_processor=[PARMLogitsProcessor(arm, [0.3, 0.7])])
    assert torch.equal(found, expected)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "changes",
    [{}, {"preference_per": "pair"}, {"share_prompt": True}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=str,
)
def test_training_goes_as_on_the_cpu(tmp_path, tokenizer, changes):
    settings = {"optim": "sgd", **changes}
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs in one process are refused")
    ours = trained(tmp_path, tokenizer, use_cpu=False, **copy.deepcopy(settings))
    theirs = trained(tmp_path, tokenizer, **_without(settings, "bf16"))
    close = 3e-2 if "bf16" in changes else 1e-4
    torch.testing.assert_close(ours[0], theirs[0], atol=close, rtol=close)
    for weight, expected in zip(ours[1], theirs[1], strict=True):
        assert (weight.cpu() - expected).norm() <= close * expected.norm() + close
