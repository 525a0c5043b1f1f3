# SPDX-License-Identifier: Apache-2.0
"""Damaged adapters are refused, with the file and what is wrong, by all that load them; whole ones load as before."""

import json

import peft
import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer
from decoding.architectures import tiny
from pair_data import pairs
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from test_export import write_official_adapter
from training_runs import PBLORA, trainer, two_sets
from training_runs import config as training_config
from transformers import PhiConfig, PhiForCausalLM

from peft_pblora import (
    MoSLoraConfig,
    PBLoraConfig,
    SVDLoraConfig,
    check_adapter,
    load_adapter,
    loading,
    set_preference,
)
from trl_parm import BASE, LM, Guided, GuidedLogitsProcessor, PreferenceARMTrainer, rewarded_soup
from trl_parm.cli.main import main
from trl_parm.demo.loading import load_models
from trl_parm.evaluation.methods import Entry
from trl_parm.evaluation.models import Models
from trl_parm.evaluation.unloaded import Unloaded
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


NAMELESS = "The adapter '.*' names no base model: `base_model_name_or_path` in its adapter_config.json is empty"


def nameless(base):
    """The folder of an adapter that was made on a model in memory, as PEFT writes it."""
    folder = base.parent / "nameless"
    tiny_arm(tiny_llama()).save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    return folder


def test_an_adapter_that_names_no_base_model_is_told_so(base):
    folder = nameless(base)
    with pytest.raises(ValueError, match=f"{NAMELESS}.*, or load it onto that model.$"):
        load_adapter(None, folder)
    assert load_adapter(backbone(base), folder).get_base_model() is not None
    models = Models(str(base))
    for load in (models.guide, models.adapter, models.apart, models.whole, Unloaded(str(base)).adapter):
        with pytest.raises(ValueError, match=NAMELESS):
            load(str(folder))
    assert models.guide(str(folder), backbone=str(base)).model.get_base_model() is models.base


MODELS = {
    "parm": "arm", "arm_alone": "arm", "cage": "arm", "untrained_arm": "arm", "genarm": "arms", "mod": "policies",
    "rewarded_soups": "policies",
}  # fmt: skip


@pytest.mark.parametrize("method", MODELS)
def test_a_method_whose_adapter_names_no_base_model_is_refused_before_all_else(base, method):
    name = str(nameless(base))
    value = name if MODELS[method] == "arm" else dict.fromkeys(OBJECTIVES, name)
    entry = Entry.of({"method": method, MODELS[method]: value})
    with pytest.raises(ValueError, match=NAMELESS):
        entry.check_models(OBJECTIVES, str(base))


def test_the_base_model_of_an_adapter_that_is_not_there_is_named(base):
    """Neither its file nor the network is at fault."""
    folder = nameless(base)
    file = folder / "adapter_config.json"
    for gone in ("/gone/base", "gone/base"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": gone}))
        with pytest.raises(ValueError, match=f"was trained on '{gone}', as `base_model_name_or_path`") as refusal:
            load_adapter(None, folder)
        assert "Get the file again" not in str(refusal.value)


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


HEADS = {
    "PBLoRA": lambda **settings: PBLoraConfig(objectives=OBJECTIVES, init_weights=False, **settings),
    "SVD-LoRA": lambda **settings: SVDLoraConfig(objectives=OBJECTIVES, init_weights=False, **settings),
    "MoSLoRA": lambda **settings: MoSLoraConfig(objectives=OBJECTIVES, init_weights=False, **settings),
    "LoRA": lambda **settings: LoraConfig(init_lora_weights=False, **settings),
}
LAYERS = {"Llama": ["q_proj", "lm_head"], "GPT-2": ["c_proj", "lm_head"], "LFM2": ["q_proj", "lm_head"]}
every_head = pytest.mark.parametrize("kind", HEADS)
every_base = pytest.mark.parametrize("name", LAYERS)
LOADERS = {
    "load_adapter": load_adapter,
    "load_adapter, from meta": lambda model, folder: load_adapter(model, folder, low_cpu_mem_usage=True),
    "PEFT": PeftModel.from_pretrained,
    "PEFT, from meta": lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
}
every_loader = pytest.mark.parametrize(
    ("kind", "how"), [(kind, how) for kind in HEADS for how in LOADERS if kind != "LoRA" or "load_adapter" in how]
)


def with_head(model, kind, folder, targets, **settings):
    """Saves an adapter of the output layer too, and the layer's weight beside it, as PEFT does."""
    torch.manual_seed(1)
    fan_in_fan_out = "c_proj" in targets
    config = HEADS[kind](target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=fan_in_fan_out, **settings)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    return adapted


def parameters(model):
    """The parameters of a model below its adapters, by their names without them, and their values."""
    found = {name.replace(".base_layer.", "."): one for name, one in model.named_parameters(remove_duplicate=False)}
    return found, {name: one.detach().clone() for name, one in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_loader
@every_base
def test_an_adapter_of_the_output_layer_leaves_its_weight_as_it_is(tmp_path, name, kind, how, dtype):
    """The file has it as it was trained on, perhaps in another dtype."""
    with_head(tiny(name).to(dtype), kind, tmp_path, LAYERS[name])
    model = tiny(name)
    before, values = parameters(model)
    loaded = LOADERS[how](model, tmp_path).eval()
    after, _ = parameters(model)
    for key, one in before.items():
        assert after[key] is one
        assert torch.equal(one, values[key])
    check_adapter(loaded, tmp_path)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, tiny(name)(IDS).logits)


@every_head
@every_base
def test_an_adapter_of_the_output_layer_acts_as_it_did(tmp_path, name, kind):
    expected = with_head(tiny(name), kind, tmp_path, LAYERS[name])(IDS).logits
    assert torch.equal(load_adapter(tiny(name), tmp_path).eval()(IDS).logits, expected)
    second = get_peft_model(tiny(name), HEADS[kind](target_modules=LAYERS[name][1:], task_type="CAUSAL_LM"))
    load_adapter(second, tmp_path, "second").set_adapter("second")
    assert torch.equal(second.eval()(IDS).logits, expected)


@every_loader
@every_base
def test_an_output_layer_of_another_model_is_refused(tmp_path, name, kind, how):
    other = tiny(name)
    other.lm_head.weight.data[3] *= 1.5
    with_head(other, kind, tmp_path, LAYERS[name])
    model = tiny(name)
    _, values = parameters(model)
    with pytest.raises(ValueError, match="`lm_head.weight` of the model that it was trained on, and 1 of 64 rows"):
        LOADERS[how](model, tmp_path)
    assert torch.equal(parameters(model)[1]["lm_head.weight"], values["lm_head.weight"])
    if "load_adapter" in how:
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        assert torch.equal(model(IDS).logits, tiny(name)(IDS).logits)


@pytest.mark.parametrize("beside", ["its own layer", "all embeddings"])
@every_head
@every_base
def test_a_damaged_adapter_leaves_the_output_layer(tmp_path, name, kind, beside):
    """PEFT has written the file's over it when the damage is seen."""
    targets = LAYERS[name] if beside == "its own layer" else LAYERS[name][:1]
    other = tiny(name).to(torch.bfloat16) if beside == "its own layer" else tiny(name, 1)
    adapted = with_head(other, kind, tmp_path, LAYERS[name])
    if beside != "its own layer":
        adapted = get_peft_model(adapted.unload(), HEADS[kind](target_modules=targets, task_type="CAUSAL_LM"))
        adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    change(lambda tensors, _: tensors.pop(next(key for key in tensors if "A.weight" in key)))(tmp_path)
    for on in (tiny(name), get_peft_model(tiny(name), HEADS[kind](target_modules=targets, task_type="CAUSAL_LM"))):
        before, values = parameters(on)
        with pytest.raises(ValueError, match="1 of its tensors are missing"):
            load_adapter(on, tmp_path, "second")
        after, found = parameters(on)
        assert all(after[key] is one for key, one in before.items())
        torch.testing.assert_close(found, values, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@every_loader
def test_of_an_output_layer_with_added_tokens_their_rows_are_the_files(tmp_path, kind, how, tied):
    """As `resize_token_embeddings` draws them anew each time."""
    model, trained = (tiny_llama(tie_word_embeddings=tied) for _ in range(2))
    for seed, one in enumerate((model, trained)):
        torch.manual_seed(seed)
        one.resize_token_embeddings(70)
    adapted = with_head(trained, kind, tmp_path, ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"the model's is \(64, 32\). If tokens were added, call `resize_token"):
        LOADERS[how](tiny_llama(tie_word_embeddings=tied), tmp_path)
    before = model.get_output_embeddings().weight
    with pytest.warns(UserWarning, match="The last 6 rows of `lm_head.weight` are the adapter's"):
        loaded = LOADERS[how](model, tmp_path).eval()
    found = loaded.get_base_model().lm_head.get_base_layer().weight
    assert torch.equal(found, adapted.get_base_model().lm_head.get_base_layer().weight)
    if how != "PEFT, from meta":
        assert found is before
    if tied and how != "PEFT, from meta":  # which unties them
        torch.testing.assert_close(loaded(IDS + 58).logits, adapted(IDS + 58).logits)


@every_head
def test_trained_biases_of_an_output_layer_are_loaded(tmp_path, kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}

    def phi():
        torch.manual_seed(0)
        return PhiForCausalLM(PhiConfig(**sizes)).eval()

    for bias in ("all", "none"):
        other = phi()
        model = with_head(other, kind, tmp_path / bias, ["q_proj", "lm_head"], bias=bias)
        model.get_base_model().lm_head.get_base_layer().bias.data += 0.5
        model.save_pretrained(tmp_path / bias)
    loaded = load_adapter(phi(), tmp_path / "all").eval()
    torch.testing.assert_close(loaded.get_base_model().lm_head.get_base_layer().bias.detach(), torch.full((64,), 0.5))
    with pytest.raises(ValueError, match="has the `lm_head.bias` of the model that it was trained on"):
        load_adapter(phi(), tmp_path / "none")


@pytest.mark.parametrize("bias", ["all", "pblora_only"])
def test_trained_biases_of_a_state_are_set_whatever_the_configuration_says(bias):
    settings = {"target_modules": ["c_attn"], "objectives": OBJECTIVES, "fan_in_fan_out": True}
    trained = get_peft_model(tiny_gpt2(), PBLoraConfig(bias=bias, **settings)).eval()
    for name, parameter in trained.named_parameters():
        parameter.data += 0.3 * ("bias" in name and parameter.requires_grad)
    model = get_peft_model(tiny_gpt2(), PBLoraConfig(**settings)).eval()
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained))
    assert torch.equal(model(IDS).logits, trained(IDS).logits)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_output_layer_that_a_start_has_changed_is_loaded(tmp_path, start):
    """Its weight in the file is the residual, which is no base model's."""
    settings = {"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=start, **settings)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * ("lora_B" in name)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_layer_that_was_merged_and_unmerged_is_the_models(tmp_path, dtype):
    arm = with_head(tiny_llama().to(dtype), "PBLoRA", tmp_path, ["q_proj", "lm_head"])
    set_preference(arm, [0.3, 0.7])
    arm.merge_adapter()
    arm.unmerge_adapter()
    arm.save_pretrained(tmp_path)
    load_adapter(tiny_llama(), tmp_path)
    other = with_head(tiny_llama(), "PBLoRA", tmp_path / "other", ["q_proj", "lm_head"])
    set_preference(other, [0.3, 0.7])
    other.merge_adapter()
    expected = other(IDS).logits
    with pytest.raises(ValueError, match=r"`lm_head.weight`, into which adapters .* `unmerge_adapter\(\)` first"):
        load_adapter(other, tmp_path, "second")
    assert torch.equal(other(IDS).logits, expected)
    other.unmerge_adapter()
    load_adapter(other, tmp_path, "second")
    torch.testing.assert_close(other(IDS).logits, expected, atol=1e-5, rtol=1e-5)


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
