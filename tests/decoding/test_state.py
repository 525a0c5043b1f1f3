# SPDX-License-Identifier: Apache-2.0
"""Nothing hidden: a call leaves models as they were, however it ends; what changes below a live guide is noticed."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from decoding.tables import DOORS, MASK, PROMPTS, log_probs, lora_model, tiny_judge
from peft import IA3Config, LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import LogitsProcessorList

from peft_pblora import PBLoraConfig, get_preference, set_preference
from peft_pblora.kv_cache import cache_argument, cache_in
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor
from trl_parm.decoding import Rollout, args, genarm, parm
from trl_parm.decoding.terms import language_models


IDS = PROMPTS[1:2]
FORMULAS = {
    "PBLoRA": (lambda: tiny_arm(tiny_llama(0)), lambda arm: parm(arm, [0.9, 0.1])),
    "LoRAs": (
        lambda: lora_model("first", "second"),
        lambda arm: genarm({"a": "first", "b": "second"}, [0.4, 0.6], adapters_of=arm),
    ),
}
every_adapter = pytest.mark.parametrize("adapter", FORMULAS)
every_door = pytest.mark.parametrize("door", DOORS)


def guide_of(arm, adapter: str, door: str, formula=None):
    """A function that decodes, as `generate`, by one of the doors."""
    formula = FORMULAS[adapter][1](arm) if formula is None else formula
    if door == "model":
        return Guided(arm.get_base_model(), formula).generate
    processor = GuidedLogitsProcessor(formula)

    def generate(*args, logits_processor=(), **kwargs):
        processors = LogitsProcessorList([processor, *logits_processor])
        return arm.get_base_model().generate(*args, logits_processor=processors, **kwargs)

    return generate


def text(generate, ids=IDS, **settings):
    return generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=-1, **settings)


IMPORT = """
import logging, sys, warnings
import torch, transformers, peft, peft_pblora
from torch.nn.modules import module
from transformers import cache_utils, generation

def state():
    kinds = [transformers.PreTrainedModel, transformers.GenerationMixin, peft.PeftModel, peft.tuners.lora.Linear,
             transformers.LogitsProcessorList, torch.nn.Module, cache_utils.Cache, cache_utils.DynamicCache]
    loggers = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    loggers["root"] = logging.root
    return {
        "loggers": {n: (one.level, list(one.filters), list(one.handlers), one.disabled) for n, one in loggers.items()},
        "hooks": [len(v) for n, v in vars(module).items() if n.startswith("_global_") and hasattr(v, "__len__")],
        "classes": {kind.__name__: {n: id(v) for n, v in vars(kind).items()} for kind in kinds},
        "peft": [sorted(map(str, one)) for one in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,)],
        "warnings": list(warnings.filters),
        "flags": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
    }

before = state()
import trl_parm
import trl_parm.decoding
after = state()
for name, logger in after["loggers"].items():
    if name not in before["loggers"] and name.split(".")[0] in ("trl_parm", "peft_pblora"):
        assert logger[:3] == (logging.NOTSET, [], []), name
after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}
for key in before:
    assert before[key] == after[key], key
"""


def test_importing_the_package_changes_nothing_of_others():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], check=True, timeout=120)


def state(model: nn.Module) -> dict:
    """All that a call could leave behind in a model."""
    found = {f"weight {name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"trains {name}"] = parameter.requires_grad, parameter.grad is None
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)]
        adapters = [vars(module).get(key) for key in ("_active_adapter", "_disable_adapters", "merged_adapters")]
        found[name] = type(module), module.training, sorted(vars(module)), hooks, copy.deepcopy(adapters)
    return found


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def gradients(arm) -> dict[str, torch.Tensor]:
    """Of the adapters that are active."""
    arm.train()
    arm.zero_grad()
    arm(input_ids=PROMPTS, labels=PROMPTS).loss.backward()
    found = {name: p.grad.clone() for name, p in arm.named_parameters() if p.grad is not None}
    arm.zero_grad()
    arm.eval()
    return found


class Interrupt:
    """Breaks a forward of a layer off, after so many."""

    def __init__(self, layer: nn.Module, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if self.left < 0:
            raise self.error("broken off")


def returns(generate, arm):
    text(generate)


def fails(generate, arm):
    def fail(input_ids, scores):
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        text(generate, logits_processor=[fail])


def is_interrupted(generate, arm, error: type[BaseException] = KeyboardInterrupt):
    for after in range(6):
        for layer in (arm.get_base_model().model.layers[1].mlp, arm.get_base_model().model.layers[0].self_attn.q_proj):
            stop = Interrupt(layer, after, error)
            with pytest.raises(error, match="broken off"):
                text(generate, ids=IDS + after)
            stop.handle.remove()


def fails_in_a_forward(generate, arm):
    is_interrupted(generate, arm, ValueError)


def is_dropped(generate, arm):
    """A generator of guided forwards that nobody goes on with."""

    def forwards():
        model, output, ids = getattr(generate, "__self__", None) or arm.get_base_model(), None, IDS
        while True:
            output = model(ids, use_cache=True, past_key_values=cache_in(output or {}))
            ids = output.logits[:, -1:].argmax(-1)
            yield ids

    steps = forwards()
    next(steps)
    next(steps)
    steps.close()


ENDS = [returns, fails, is_interrupted, fails_in_a_forward, is_dropped]


@every_adapter
@every_door
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_call_leaves_the_model_as_it_was_however_it_ends(end, door, adapter):
    """Bit by bit, what it answers and its gradients included; and the next guided call is right."""
    arm = FORMULAS[adapter][0]()
    if adapter == "PBLoRA":
        set_preference(arm, [0.2, 0.8])
    active = list(arm.active_adapters)
    expected = text(guide_of(copy.deepcopy(arm), adapter, door))
    outside, trained = arm(IDS).logits, gradients(arm)
    generate = guide_of(arm, adapter, door)
    before = state(arm)
    end(generate, arm)
    assert_same(before, state(arm))
    assert torch.equal(text(generate), expected)
    assert_same(before, state(arm))
    arm.base_model.set_adapter(active)
    assert torch.equal(arm(IDS).logits, outside)
    after = gradients(arm)
    assert trained.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in trained.items())
    if adapter == "PBLoRA":
        assert get_preference(arm).tolist() == pytest.approx([0.2, 0.8])


@every_adapter
def test_a_guided_model_leaves_adapters_active_and_a_processor_says_what_it_did(adapter):
    arm = FORMULAS[adapter][0]()
    before = state(arm)
    guided = Guided(arm.get_base_model(), FORMULAS[adapter][1](arm))
    assert_same(before, state(arm))
    processor = GuidedLogitsProcessor(guided.formula)
    with torch.no_grad(), arm.disable_adapter():
        plain = arm(IDS).logits
    assert torch.equal(arm.get_base_model()(IDS).logits, plain)
    # Calls of the `PeftModel` are still the ARM, if the adapter is one of ours.
    assert torch.equal(arm(IDS).logits, plain) == (adapter == "LoRAs")
    arm.set_adapter(guided.terms[0].adapter_names[0])
    with pytest.raises(ValueError, match="was made active, or replaced, after the processor was made"):
        text(arm.get_base_model().generate, logits_processor=[processor])


@every_adapter
@every_door
@pytest.mark.parametrize("dump", [pickle.dumps, lambda one: torch.save(one, io.BytesIO())], ids=["pickle", "torch"])
def test_models_guides_and_formulas_are_pickled_after_guidance(dump, door, adapter):
    arm = FORMULAS[adapter][0]()
    formula = FORMULAS[adapter][1](arm)
    guided, processor = Guided(arm.get_base_model(), formula), GuidedLogitsProcessor(formula)
    text(guided.generate)
    text(arm.get_base_model().generate, logits_processor=[processor])
    for one in (arm.get_base_model(), arm, formula, guided, processor):
        dump(one)


@every_adapter
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_copies_guide_as_their_originals_and_apart_from_them(copier, adapter):
    arm = FORMULAS[adapter][0]()
    guided = Guided(arm.get_base_model(), FORMULAS[adapter][1](arm))
    expected = text(guided.generate)
    twin = copier(guided)
    assert twin.terms[0].backbone is twin.backbone is not guided.backbone
    for parameter in arm.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(text(twin.generate), expected)
    assert not torch.equal(text(guided.generate), expected)
    original = FORMULAS[adapter][0]()
    processor = GuidedLogitsProcessor(FORMULAS[adapter][1](original))
    base, again = copier((original.get_base_model(), processor))
    assert language_models(again.formula)[0].backbone is base
    assert torch.equal(text(base.generate, logits_processor=[again]), expected)


@every_adapter
@every_door
def test_two_threads_on_one_base(door, adapter):
    """Each writes its own text, during and after."""
    arm = FORMULAS[adapter][0]()
    if adapter == "PBLoRA":
        formulas = [parm(arm, [1.0, 0.0]), parm(arm, [0.0, 1.0])]
    else:
        formulas = [BASE + LM(arm, adapter_name=name) for name in ("first", "second")]
    guides = [guide_of(arm, adapter, door, formula) for formula in formulas]
    prompts = [IDS, IDS + 3]
    expected = [text(generate, ids) for generate, ids in zip(guides, prompts)]
    assert not torch.equal(expected[0], text(guides[1], prompts[0]))
    found: list[list] = [[], []]

    def run(i):
        for _ in range(8):
            found[i].append(text(guides[i], prompts[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 8
        assert all(torch.equal(one, expected[i]) for one in found[i])
        assert torch.equal(text(guides[i], prompts[i]), expected[i])


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("who", ["first", "second", "judge"])
def test_a_processor_that_was_interrupted_writes_the_same_text_again(who, after):
    """Some models, or some of their layers, have read a token then that others have not."""
    models = {"first": tiny_llama(1), "second": tiny_llama(2), "judge": tiny_judge()}
    for model in models.values():
        model.requires_grad_(False)
    formula = genarm({"a": models["first"], "b": models["second"]}, [0.5, 0.5], beta=0.25)
    processor = GuidedLogitsProcessor(formula + args(models["judge"], weight=9.0, k=4) - BASE)
    base = tiny_llama(0)
    expected = text(base.generate, logits_processor=[GuidedLogitsProcessor(processor.formula)])
    stop = Interrupt(models[who].model.layers[1], after, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match="broken off"):
        text(base.generate, logits_processor=[processor])
    stop.handle.remove()
    assert torch.equal(text(base.generate, logits_processor=[processor]), expected)


def second(arm, seed=9):
    """Puts another adapter under the name of the first, as a service's update does."""
    other = tiny_arm(tiny_llama(0), seed=seed)
    arm.delete_adapter("default")
    arm.add_adapter("default", PBLoraConfig(**{**other.peft_config["default"].to_dict(), "peft_type": None}))
    weights = {k: v for k, v in other.state_dict().items() if "pblora" in k}
    arm.load_state_dict(weights, strict=False)
    arm.base_model.set_adapter([])
    return other


@every_door
@pytest.mark.parametrize("at", [[1.0, 0.0], None], ids=["its own α", "the model's α"])
def test_an_adapter_that_was_replaced_guides_with_its_new_weights(door, at):
    """The same prompt again, so that nothing but the adapter says that the answers changed."""
    arm = tiny_arm(tiny_llama(0))
    set_preference(arm, [1.0, 0.0])
    generate = guide_of(arm, "PBLoRA", door, parm(arm, at, beta=0.5))
    old = text(generate)
    twin = second(arm)
    set_preference(twin, [1.0, 0.0])
    set_preference(arm, [1.0, 0.0])
    new = text(guide_of(twin, "PBLoRA", door, parm(twin, at, beta=0.5)))
    assert not torch.equal(old, new)
    assert torch.equal(text(generate), new)


@every_door
@pytest.mark.parametrize("kind", ["LoRA", "embeddings", "IA3"])
@pytest.mark.parametrize("on_base", [True, False], ids=["on the base", "apart"])
def test_an_adapter_of_pefts_that_was_replaced_guides_with_its_new_weights(kind, on_base, door):
    """Its layers are the same objects, the adapter in them is another one."""

    def config():
        if kind == "IA3":
            return IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        targets = ["embed_tokens"] if kind == "embeddings" else ["q_proj", "v_proj"]
        return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")

    def with_weights(model, seed):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.data.normal_(1.0 if kind == "IA3" else 0.0, 0.5)
        return model.eval()

    model = with_weights(get_peft_model(tiny_llama(0), config(), adapter_name="guide"), 1)
    base = model.get_base_model() if on_base else tiny_llama(4)
    formula = BASE + 2.0 * LM(model, adapter_name="guide")
    processors = [GuidedLogitsProcessor(formula)] if door == "processor" else []
    guided = Guided(base, formula) if door == "model" else base
    old = guided.generate(IDS, max_new_tokens=6, logits_processor=processors)
    model.delete_adapter("guide")
    model.add_adapter("guide", config())
    with_weights(model, 2)
    new = guided.generate(IDS, max_new_tokens=6, logits_processor=processors)
    twin = with_weights(get_peft_model(tiny_llama(0), config(), adapter_name="guide"), 2)
    formula = BASE + 2.0 * LM(twin, adapter_name="guide")
    expected = Guided(tiny_llama(0 if on_base else 4), formula).generate(IDS, max_new_tokens=6)
    assert not torch.equal(old, expected)
    assert torch.equal(new, expected)


def deleted(arm, names):
    arm.delete_adapter("default" if "default" in arm.peft_config else "first")


@every_adapter
@every_door
@pytest.mark.parametrize("ids", [IDS, IDS + 1], ids=["the same prompt", "another prompt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deleted, "is no longer in the model"),
        (lambda arm, names: arm.unload(), "is no longer in the model"),
        (lambda arm, names: arm.merge_adapter(names), "merged into the weights"),
        (lambda arm, names: arm.merge_and_unload(adapter_names=names), "is no longer in the model"),
    ],
    ids=["deleted", "unloaded", "merged", "merged and unloaded"],
)
def test_an_adapter_that_is_gone_is_refused(change, message, ids, door, adapter):
    """Never the old answers, never those of the base model."""
    arm = FORMULAS[adapter][0]()
    base = arm.get_base_model()
    formula = FORMULAS[adapter][1](arm)
    if door == "model":
        generate = Guided(base, formula).generate
    else:
        processor = GuidedLogitsProcessor(formula)
        generate = lambda *args, **kwargs: base.generate(*args, logits_processor=[processor], **kwargs)  # noqa: E731
    names = formula.terms()[1][1].adapter_names
    text(generate)
    change(arm, list(names))
    with pytest.raises(ValueError, match=f"{message}|is merged into the weights"):
        text(generate, ids)


@every_door
def test_a_guide_that_goes_on_is_told_what_changed_below_it(door):
    """The cache that a call returned, or the processor's own, was made with other weights."""
    arm = tiny_arm(tiny_llama(0))
    base, formula = arm.get_base_model(), parm(arm, [0.9, 0.1])
    if door == "model":
        guided = Guided(base, formula)
        output = text(guided.generate, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, IDS], 1)
        second(arm)
        with pytest.raises(ValueError, match="not made by a guided model with the same models, adapters"):
            text(guided.generate, ids, past_key_values=output.past_key_values)
        return
    processor = GuidedLogitsProcessor(formula)
    scores = torch.zeros(1, 64)
    processor(IDS, scores)
    twin = second(arm)
    longer = torch.cat([IDS, torch.tensor([[9]])], 1)
    expected = torch.log_softmax(scores.double().log_softmax(-1) + log_probs(twin, longer, [0.9, 0.1]), -1)
    torch.testing.assert_close(processor(longer, scores).double(), expected, atol=1e-4, rtol=1e-4)


@every_door
def test_a_model_in_training_mode_is_refused_and_stays_in_it(door):
    arm = tiny_arm(tiny_llama(0)).train()
    generate = None
    with pytest.raises(ValueError, match=r"is in training mode, in which its dropout acts. Call `model.eval\(\)`"):
        generate = guide_of(arm, "PBLoRA", door)
        text(generate)
    assert arm.training


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_was_put_into_training_mode_is_refused_in_a_forward_too(cached):
    arm = tiny_arm(tiny_llama(1), lora_dropout=0.5)
    guided = Guided(tiny_llama(0), parm(arm, [0.9, 0.1]))
    output = guided(input_ids=IDS, use_cache=True)
    given = cache_argument(guided.backbone, cache_in(output)) if cached else {}
    arm.train()
    with pytest.raises(ValueError, match="is in training mode, in which its dropout acts"):
        guided(input_ids=IDS, **given)
    arm.eval()
    assert torch.equal(guided(input_ids=IDS).logits, output.logits)


def added(kind):
    """A model that evaluates, to which an adapter with dropout was added afterwards: it is in training mode itself."""
    arm = tiny_arm(tiny_llama(0)) if kind == "PBLoRA" else lora_model("one")
    config = {"target_modules": ["q_proj"], "lora_dropout": 0.5}
    settings = {"use_dora": kind == "DoRA", "init_lora_weights": False, **config}
    own = PBLoraConfig(objectives=["a", "b"], **config) if kind == "PBLoRA" else LoraConfig(**settings)
    torch.manual_seed(2)
    arm.add_adapter("dropping", own)
    assert not arm.training
    return arm


@every_door
@pytest.mark.parametrize("kind", ["PBLoRA", "DoRA"])
def test_an_adapter_that_was_added_in_training_mode_is_refused_for_its_dropout(kind, door):
    arm = added(kind)
    arm.base_model.set_adapter("dropping")
    with pytest.raises(ValueError, match="adapter 'dropping' of .* is in training mode, in which its dropout acts"):
        text(guide_of(arm, kind, door, BASE + LM(arm, adapter_name="dropping")))
    generate = guide_of(arm.eval(), kind, door, BASE + LM(arm, adapter_name="dropping"))
    text(generate)
    for module in arm.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with pytest.raises(ValueError, match="adapter 'dropping' of .* is in training mode"):
        text(generate, IDS[:, 1:])


@every_door
def test_a_dropout_that_does_not_act_is_nobodys_concern(door):
    """Of an adapter that is not asked, and of a LoRA beside others in one forward."""
    arm = added("PBLoRA")
    arm.base_model.set_adapter("default")
    expected = text(guide_of(tiny_arm(tiny_llama(0)), "PBLoRA", door))
    assert torch.equal(text(guide_of(arm, "PBLoRA", door, parm(arm, [0.9, 0.1], adapter_name="default"))), expected)
    lora = added("LoRA")
    formula = BASE + LM(lora, adapter_name="dropping")
    found = text(guide_of(lora, "LoRA", door, formula))
    assert torch.equal(found, text(guide_of(lora.eval(), "LoRA", door, formula)))


@every_door
def test_a_lora_that_was_scaled_guides_with_its_new_scale(door):
    guide = lora_model("one")
    generate = guide_of(guide, "LoRA", door, BASE + LM(guide))
    before = text(generate)
    with rescale_adapter_scale(guide, 8.0):
        expected = text(guide_of(guide, "LoRA", door, BASE + LM(guide)))
        assert not torch.equal(expected, before)
        assert torch.equal(text(generate), expected)
    assert torch.equal(text(generate), before)


@every_door
def test_weights_that_were_trained_are_noticed(door):
    arm = tiny_arm(tiny_llama(0))
    generate = guide_of(arm, "PBLoRA", door)
    before = text(generate)
    with torch.no_grad():
        arm.base_model.model.model.layers[1].self_attn.v_proj.adapters["default"].B.weight.mul_(-3)
    assert torch.equal(text(generate), text(guide_of(arm, "PBLoRA", door)))
    assert not torch.equal(text(generate), before)


def changed(model):
    model.load_state_dict(type(model)(model.config).state_dict())


def replaced(model):
    head = model.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().flip(0))


def with_another_layer(model):
    model.model.layers[1] = tiny_llama(9).model.layers[1]


def trained(model):
    """By a fused optimizer, which raises no version of a weight."""
    model(IDS).logits.square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.3, fused=True).step()
    model.zero_grad()


def trained_and_frozen(model):
    trained(model)
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [changed, replaced, with_another_layer, trained, trained_and_frozen])
@pytest.mark.parametrize("who", ["guide", "judge", "policy"])
def test_a_processor_notices_whatever_happens_to_weights(who, change):
    models = {"guide": tiny_llama(2), "judge": tiny_judge(), "policy": tiny_llama(3)}

    def processor():
        if who == "guide":
            return GuidedLogitsProcessor(BASE + 2 * LM(models["guide"]))
        rollout = Rollout(models["policy"], 2) if who == "policy" else None
        return GuidedLogitsProcessor(args(models["judge"], weight=9.0, k=4, rollout=rollout))

    base, old = tiny_llama(0), processor()
    scores = base(IDS).logits[:, -1].detach()
    before = old(IDS, scores)
    change(models[who])
    models[who].eval()
    torch.testing.assert_close(old(IDS, scores), processor()(IDS, scores))
    assert not torch.equal(old(IDS, scores), before)


@pytest.mark.parametrize("door", DOORS)
def test_padding_and_mask_are_not_changed(door):
    arm = tiny_arm(tiny_llama(0))
    ids, mask = PROMPTS.clone(), MASK.clone()
    guide_of(arm, "PBLoRA", door)(ids, attention_mask=mask, max_new_tokens=3)
    assert torch.equal(ids, PROMPTS)
    assert torch.equal(mask, MASK)
