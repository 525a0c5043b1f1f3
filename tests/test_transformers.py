# SPDX-License-Identifier: Apache-2.0
"""The adapters inside transformers' own adapter methods, which never see a PeftModel."""

import peft
import pytest
import torch
from adapter_table import TABLE, every_adapter, make_model
from conftest import OBJECTIVES, needs_add_adapter, tiny_llama
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from peft_pblora import PBLoraConfig, get_preference, set_preference, write_card


IDS = torch.arange(2, 18).view(2, 8)
PREFERENCE = [0.2, 0.3, 0.5]


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@every_adapter
def test_load_adapter_and_from_pretrained_on_an_adapter_folder(row, base, tmp_path):
    model = make_model(row, AutoModelForCausalLM.from_pretrained(base))
    set_preference(model, PREFERENCE)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "arm")
    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(tmp_path / "arm"), adapter_name="arm")
    for copy in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "arm")):
        assert get_preference(copy.eval()).tolist() == pytest.approx([1 / 3] * 3)
        set_preference(copy, PREFERENCE)
        torch.testing.assert_close(copy(IDS).logits, expected)


@pytest.mark.parametrize("row", [TABLE["pblora, r2=0"], TABLE["svdlora"], TABLE["moslora"]])
def test_the_block_of_the_saved_card_loads_the_adapter(row, base, tmp_path):
    model = make_model(row, AutoModelForCausalLM.from_pretrained(base))
    for _ in range(2):
        model.save_pretrained(tmp_path / "arm")
        write_card(tmp_path / "arm")
    card = (tmp_path / "arm" / "README.md").read_text()
    assert card.count("## Loading this adapter") == 1
    block = card.split("```python\n")[1].split("```")[0]
    assert block.startswith("import peft_pblora\n")
    block = block.replace("path/to/this/folder", str(tmp_path / "arm")).split("\ninputs =")[0]
    block = "\n".join(line for line in block.splitlines() if not line.startswith("tokenizer ="))
    exec(block, scope := {})
    set_preference(model, [1 / 3] * 3)
    torch.testing.assert_close(scope["arm"].eval()(IDS).logits, model(IDS).logits)


@needs_add_adapter
@every_adapter
def test_add_disable_delete_and_save(row, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = model(IDS).logits
    settings = {"objectives": ["a", "b", "c"], "target_modules": ["q_proj"], "init_weights": False, **row.settings}
    model.add_adapter(row.config(**settings), "one")
    set_preference(model, PREFERENCE)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, plain)
    model.add_adapter(row.config(**settings), "two")
    model.set_adapter("one")
    torch.testing.assert_close(model(IDS).logits, adapted)
    model.disable_adapters()
    torch.testing.assert_close(model(IDS).logits, plain)
    model.enable_adapters()
    model.delete_adapter("two")
    torch.testing.assert_close(model(IDS).logits, adapted)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved").eval()
    set_preference(loaded, PREFERENCE)
    torch.testing.assert_close(loaded(IDS).logits, adapted)


@every_adapter
def test_injection_without_a_peft_model(row):
    settings = row.settings_for(len(OBJECTIVES))
    config = row.config(objectives=OBJECTIVES, target_modules=["q_proj"], init_weights=False, **settings)
    model = inject_adapter_in_model(config, tiny_llama()).eval()
    other = inject_adapter_in_model(config, tiny_llama()).eval()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    for m in (model, other):
        set_preference(m, [0.3, 0.7])
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*\.(q|v)_proj"}, 4),
        ({"target_modules": None}, 4),
        ({"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["down_proj"]}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
    ],
    ids=str,
)
def test_target_modules_in_every_form(choice, expected):
    model = peft.get_peft_model(tiny_llama(), PBLoraConfig(objectives=OBJECTIVES, **choice))
    assert sum(hasattr(module, "adapters") for module in model.modules()) == expected


def test_unsupported_modules_are_named():
    with pytest.raises(TypeError, match="is not supported. Currently, only"):
        peft.get_peft_model(tiny_llama(), PBLoraConfig(objectives=OBJECTIVES, target_modules=["embed_tokens"]))
