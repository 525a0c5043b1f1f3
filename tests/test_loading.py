# SPDX-License-Identifier: Apache-2.0
"""Damaged adapters are refused, with the file and what is wrong, by all that load them; whole ones load as before."""

import json

import peft
import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from pair_data import pairs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import write_official_adapter
from training_runs import PBLORA, trainer, two_sets
from training_runs import config as training_config

from peft_pblora import MoSLoraConfig, PBLoraConfig, check_adapter, load_adapter, loading
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, PreferenceARMTrainer, rewarded_soup
from trl_parm.cli.main import main
from trl_parm.demo.loading import load_models
from trl_parm.evaluation.models import Models
from trl_parm.reward_models import RewardSource


IDS = torch.arange(2, 10)[None]


def lora(model, **config):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


KINDS = {
    "pblora": lambda base: tiny_arm(base),
    "moslora": lambda base: get_peft_model(base, MoSLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "lora": lora,
    "dora": lambda base: lora(base, use_dora=True),
    "lora with a head": lambda base: lora(base, modules_to_save=["lm_head"]),
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def backbone(base):
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = str(base)
    return model


def saved(base, kind="pblora", name="adapter"):
    folder = base.parent / name
    model = KINDS[kind](backbone(base))
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder, model


def change(edit):
    """A change of the tensors in an adapter's file; `edit` gets their names and the last of them."""

    def damage(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors, max(tensors))
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def cut(size):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"no pickle")


DAMAGES = {
    "truncated": (cut(-20), "can't be loaded"),
    "empty": (cut(0), "can't be loaded"),
    "a pointer to a file": (lambda f: (f / "adapter_model.safetensors").write_text("version"), "can't be loaded"),
    "a broken pickle": (pickled, "adapter_model.bin' can't be loaded"),
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "no tensors": (change(lambda tensors, last: tensors.clear()), "has no tensors"),
    "one missing": (change(lambda tensors, last: tensors.pop(last)), "1 of its tensors are missing|there is no "),
    "one renamed": (
        change(lambda t, last: t.update({last.replace("layers.1", "layers.7"): t.pop(last)})), "missing|no |nothing"
    ),
    "one too many": (
        change(lambda t, last: t.update({last.replace("layers.1", "layers.7") + "x": t[last].clone()})), "nothing here"
    ),
    "integers": (change(lambda tensors, last: tensors.update({last: tensors[last].int()})), "no floating-point"),
    "another shape": (change(lambda t, last: t.update({last: t[last][:1].clone()})), "size mismatch"),
    "NaN": (change(lambda tensors, last: tensors[last].view(-1)[0].fill_(torch.nan)), "1 of its tensors are NaN"),
    "infinite": (change(lambda tensors, last: tensors[last].fill_(-torch.inf)), "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whole_adapters_load_as_by_peft(base, kind):
    folder, model = saved(base, kind)
    expected = PeftModel.from_pretrained(tiny_llama(), folder).eval()(IDS).logits
    for on in (tiny_llama(), None):
        assert torch.equal(load_adapter(on, folder)(IDS).logits, expected)
    other = load_adapter(lora(tiny_llama()), folder, "other") if kind in ("lora", "dora") else None
    if other is not None:
        other.set_adapter("other")
        assert torch.equal(other(IDS).logits, expected)
    check_adapter(model, folder)


def test_adapters_of_the_authors_code_load(tmp_path):
    write_official_adapter(tmp_path / "official", k=3, r1=4, r2=2)
    expected = PeftModel.from_pretrained(tiny_llama(1), tmp_path / "official").eval()(IDS).logits
    assert torch.equal(load_adapter(tiny_llama(1), tmp_path / "official", "theirs").eval()(IDS).logits, expected)


def state(model):
    """What of a model trains, and what is in training mode."""
    trains = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    return (trains | {id(module): module.training for module in model.modules()}).items()


@pytest.mark.parametrize("kind", ["pblora", "lora", "lora with a head"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_and_leaves_nothing(base, kind, damage):
    folder, _ = saved(base, kind)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    names, expected, switches = [name for name, _ in model.named_modules()], model(IDS).logits, state(model.train())
    with pytest.raises(ValueError, match=message) as refusal:
        load_adapter(model, folder)
    assert str(folder) in str(refusal.value)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(IDS).logits, expected)
    assert state(model) >= switches
    taken = tiny_arm(tiny_llama()) if kind == "pblora" else lora(tiny_llama())
    expected, switches = taken(IDS).logits, state(taken.train())
    with pytest.raises(ValueError, match=message):
        load_adapter(taken, folder, "second")
    assert list(taken.peft_config) == ["default"]
    assert torch.equal(taken(IDS).logits, expected)
    assert state(taken) >= switches


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_a_damaged_adapter_that_changes_the_model_below_it_leaves_its_weights(tmp_path, settings):
    changed(**settings).save_pretrained(tmp_path)
    change(lambda tensors, _: tensors.pop(next(name for name in tensors if "lora_A" in name)))(tmp_path)
    model = tiny_llama(attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="1 of its tensors are missing"):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("config", [LoraConfig, PBLoraConfig])
def test_an_adapter_without_its_trained_biases_is_refused(tmp_path, config, only):
    bias = f"{config().peft_type.lower()}_only" if only else "all"
    settings = {"target_modules": ["c_attn"], "bias": bias, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_gpt2(), config(**settings)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * ("bias" in name and parameter.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(tiny_gpt2(), tmp_path)(IDS).logits, model(IDS).logits)
    change(lambda tensors, _: tensors.pop(next(name for name in tensors if "bias" in name)))(tmp_path)
    other = tiny_gpt2()
    with pytest.raises(ValueError, match=r"1 of its tensors are missing \(.*c_attn.base_layer.bias\)"):
        load_adapter(other, tmp_path)
    assert torch.equal(other(IDS).logits, tiny_gpt2()(IDS).logits)


def test_another_number_of_objectives_is_refused(base):
    folder, _ = saved(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "objectives": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="size mismatch.*its number of objectives"):
        load_adapter(tiny_llama(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be loaded"):
        load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("damage", ["truncated", "one missing", "NaN", "another shape"])
@pytest.mark.parametrize("kind", ["pblora", "lora"])
def test_all_that_load_refuse(base, kind, damage, capsys):
    folder, _ = saved(base, kind)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    for load in (Models(str(base)).guide, Models(str(base)).apart, lambda name: Models(name).base):
        with pytest.raises(ValueError, match=message):
            load(str(folder))
    if kind == "pblora":
        with pytest.raises(ValueError, match=message):
            load_models(str(folder), str(base))
        out = base.parent / "exported"
        assert main(["export", "--adapter", str(folder), "--output_dir", str(out), "--grid_steps", "2"]) == 2
        assert "adapter_model.safetensors" in capsys.readouterr().err
        assert not out.exists()


def test_a_name_that_is_taken_is_refused(base):
    folder, _ = saved(base)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_adapter(tiny_arm(tiny_llama()), folder)


def test_a_configuration_for_a_model_with_adapters_is_refused(base):
    folder, _ = saved(base)
    arm = tiny_arm(tiny_llama())
    with pytest.raises(ValueError, match=r"`config` is given, but the model has adapters already \(default\)"):
        load_adapter(arm, folder, "second", config=arm.peft_config["default"])
    assert list(arm.peft_config) == ["default"]


def test_an_adapter_below_a_folder_is_not_that_of_the_folder(base):
    folder, _ = saved(base)
    _, other = saved(base, name="adapter/sub")
    for name, parameter in other.named_parameters():
        if "pblora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(folder / "sub")
    expected = other(IDS).logits
    loaded = load_adapter(tiny_llama(), folder, subfolder="sub")
    assert torch.equal(loaded.eval()(IDS).logits, expected)
    check_adapter(loaded, folder, subfolder="sub")
    assert torch.equal(loaded(IDS).logits, expected)


def changed(**settings):
    """A LoRA on a model with biases, which PEFT changes below it, with weights of its own."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_llama(attention_bias=True), lora)
    torch.manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}]
    + ([{"kasa_config": peft.KasaConfig()}] if hasattr(peft, "KasaConfig") else []),
    ids=lambda settings: next(iter(settings.items()))[0],
)
def test_an_adapter_that_changes_the_model_below_it_is_on_a_model_of_its_own(tmp_path, settings):
    """PEFT puts residuals in the place of its weights, or other biases, for good."""
    base, model = tiny_llama(attention_bias=True), changed(**settings)
    plain = base(IDS).logits.log_softmax(-1)
    expected = (plain + model(IDS).logits.log_softmax(-1)).log_softmax(-1)
    formula = BASE + LM(model)
    torch.testing.assert_close(Guided(base, formula)(IDS).logits.log_softmax(-1), expected)
    for use in (
        lambda: Guided(model.get_base_model(), formula),
        lambda: GuidedLogitsProcessor(formula),
        lambda: LM(model, disable_adapter=True),
        lambda: rewarded_soup({"a": "default"}, [1.0], adapters_of=model),
    ):
        with pytest.raises(ValueError, match="PEFT changes the model below it|, whose average with others"):
            use()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    models = Models(str(tmp_path / "base"))
    found = Guided(models.base, BASE + models.guide(str(tmp_path / "adapter")).lm())
    torch.testing.assert_close(found(IDS).logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(models.base(IDS).logits.log_softmax(-1), plain)


@pytest.mark.parametrize(("settings", "every"), [({"bias": "all"}, False), ({"init_lora_weights": "pissa"}, True)])
def test_of_a_model_below_an_adapter_only_what_that_changes_is_kept_beside(settings, every):
    """On a large model a copy of all is a lot of memory."""
    model, copied = tiny_llama(attention_bias=True), []
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    detach = torch.Tensor.detach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda tensor: copied.append(tensor) or detach(tensor))
        loading._remember(model, config)
    names = {name for name, one in model.named_parameters() if any(one is found for found in copied)}
    assert names == {name for name, _ in model.named_parameters() if every or name.endswith(".bias")}


def test_a_pissa_that_is_drawn_anew_is_refused(base, tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4", "task_type": "CAUSAL_LM"}
    get_peft_model(backbone(base), LoraConfig(**settings)).save_pretrained(tmp_path / "drawn")
    model = tiny_llama()
    for on in (model, None):
        with pytest.raises(ValueError, match="draws its SVD anew"):
            load_adapter(on, tmp_path / "drawn")
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    with pytest.raises(ValueError, match="draws its SVD anew"):
        trainer(tmp_path / "out", tiny_tokenizer(), data=pairs(4), peft_config=LoraConfig(**settings))


def test_biases_that_are_none_change_nothing():
    model = lora(tiny_llama(), bias="all")
    Guided(model.get_base_model(), BASE + LM(model))


def test_accuracies_of_a_changed_model_are_relative_to_none(tmp_path):
    """Without the adapter it is no untrained model."""
    for settings, known in (({"bias": "all"}, False), ({}, True)):
        run = trainer(
            tmp_path / str(known), tiny_tokenizer(), changed(**settings), pairs(4), pairs(4, 9), None, max_steps=1
        )
        assert any("ratio_accuracy" in name for name in run.evaluate()) is known


def test_an_activated_lora_is_no_guide():
    """It acts only where `PeftModel` has looked for its tokens; read without that, it would be the base model."""
    with pytest.raises(ValueError, match="an activated LoRA"):
        LM(lora(tiny_llama(), alora_invocation_tokens=[5, 6]))


def break_whole(folder, fault):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name][0] = float(fault)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("fault", ["missing", "nan", "inf"])
def test_a_whole_model_that_is_damaged_is_refused(base, tmp_path, fault):
    """transformers fills a missing weight with random numbers, and says nothing of one that is no number."""
    Models(str(base)).base  # noqa: B018
    name = break_whole(base, fault)
    said = f"can't be used as a LlamaForCausalLM: 1 of its weights are .*{name}"
    with pytest.raises(ValueError, match=said):
        Models(str(base)).base  # noqa: B018
    with pytest.raises(ValueError, match=said):
        PreferenceARMTrainer(
            str(base), training_config(tmp_path / "out"), train_dataset=two_sets(), peft_config=PBLORA
        )
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_reward_model(base):
    """Its checkpoint has no head, and transformers would make a random one."""
    with pytest.raises(ValueError, match=r"used as a LlamaForSequenceClassification: .* checkpoint \(score.weight\)"):
        RewardSource(str(base)).load()
