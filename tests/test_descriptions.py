# SPDX-License-Identifier: Apache-2.0
"""Objectives by frozen embeddings of their descriptions: how they are made, trained with, saved and added to."""

import copy
import json

import pytest
import torch
from conftest import OBJECTIVES, tiny_gpt2, tiny_llama, tiny_tokenizer
from peft import PeftConfig, PeftModel, get_peft_model
from training_runs import trainer

from peft_pblora import (
    MoSLoraConfig,
    PBLoraConfig,
    embed_objectives,
    load_adapter,
    save_as_lora,
    set_preference,
    write_card,
)


TEXTS = {"helpful": "w1 w2 w3", "harmless": "w9 w8"}
SETTINGS = {"objective_descriptions": TEXTS, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def described(**changes) -> MoSLoraConfig:
    return MoSLoraConfig(**{**SETTINGS, **changes})


def embedded(model=None, **changes) -> MoSLoraConfig:
    return embed_objectives(described(**changes), tiny_llama() if model is None else model, tiny_tokenizer())


def random_arm(config, seed=1, base=None):
    """An adapter whose B and M are not zero."""
    torch.manual_seed(seed)
    arm = get_peft_model(tiny_llama() if base is None else base, config)
    for name, parameter in arm.named_parameters():
        if name.endswith(("B.weight", "core.M")):
            torch.nn.init.normal_(parameter, std=0.3)
    return arm.eval()


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2(), tiny_llama().to(torch.bfloat16)], ids=str)
def test_an_embedding_is_the_normalised_mean_of_those_of_the_tokens(model):
    config = embedded(model)
    table = model.get_input_embeddings().weight.double()
    for text, found in zip(TEXTS.values(), config.objective_embeddings, strict=True):
        ids = [tiny_tokenizer().convert_tokens_to_ids(word) for word in text.split()]
        mean = sum(table[i] for i in ids) / len(ids)
        torch.testing.assert_close(torch.tensor(found).double(), mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_embedding_changes_nothing_that_it_is_given():
    config, model = described(), tiny_llama()
    before = copy.deepcopy(config), {name: p.clone() for name, p in model.named_parameters()}
    made = embed_objectives(config, model, tiny_tokenizer())
    assert config == before[0]
    assert made.target_modules is not config.target_modules
    assert all(torch.equal(p, before[1][name]) for name, p in model.named_parameters())
    assert config.lacks_embeddings
    assert not made.lacks_embeddings
    assert embed_objectives(made, tiny_llama(3), tiny_tokenizer()) == made  # what is there stays


def test_the_order_is_that_of_the_objectives():
    assert described().objectives == list(TEXTS)
    config = embedded(objectives=["harmless", "helpful"])
    assert list(config.objective_descriptions) == ["harmless", "helpful"]
    assert config.objective_embeddings == embedded().objective_embeddings[::-1]


def test_frozen_embeddings_are_data_of_the_configuration_and_not_weights(tmp_path):
    """So that they need no model to load, travel to any dtype unrounded, and do not train."""
    arm, ids = random_arm(embedded()), torch.arange(2, 12)[None]
    assert not any("embeddings" in name for name in arm.state_dict())
    arm.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["objective_descriptions"] == TEXTS
    assert torch.tensor(stored["objective_embeddings"]).shape == (2, 32)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for α in ([1.0, 0.0], [0.3, 0.7]):
        set_preference(arm, α)
        set_preference(loaded, α)
        torch.testing.assert_close(loaded(ids).logits, arm(ids).logits)
    half = load_adapter(tiny_llama().to(torch.bfloat16), tmp_path)
    core = half.base_model.model.model.layers[0].self_attn.q_proj.adapter("default").core
    assert core.embeddings.tolist() == torch.tensor(stored["objective_embeddings"]).tolist()
    assert not core.embeddings.requires_grad


def test_a_model_of_another_kind_and_size_takes_a_configuration_with_embeddings():
    config = embedded(target_modules=["c_attn"], fan_in_fan_out=True)
    arm = random_arm(config, base=tiny_gpt2())
    core = arm.base_model.model.transformer.h[0].attn.c_attn.adapter("default").core
    assert core.embeddings.tolist() == torch.tensor(config.objective_embeddings).tolist()
    ids = torch.arange(2, 12)[None]
    found = []
    for α in ([1.0, 0.0], [0.0, 1.0]):
        set_preference(arm, α)
        found.append(arm(ids).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The adapter's shift was merged", "ignore:.lora_bias=True")
def test_export_and_merge_at_a_preference(tmp_path):
    arm, ids = random_arm(embedded()), torch.arange(2, 12)[None]
    set_preference(arm, [0.3, 0.7])
    expected = arm(ids).logits
    save_as_lora(arm, tmp_path / "lora", [0.3, 0.7])
    torch.testing.assert_close(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")(ids).logits, expected)
    torch.testing.assert_close(arm.merge_and_unload()(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("global_weight", [0.0, 1.0])
def test_the_trainer_embeds_and_trains_all_but_the_embeddings(tmp_path, tokenizer, global_weight):
    run = trainer(tmp_path, tokenizer, peft_config=described(), global_weight=global_weight)
    assert run.adapter_config.objective_embeddings == embedded().objective_embeddings
    run.train()
    core = run.model.base_model.model.model.layers[0].self_attn.q_proj.adapter("default").core
    assert core.M.abs().max() > 0
    assert core.embeddings.tolist() == torch.tensor(embedded().objective_embeddings).tolist()
    run.save_model(str(tmp_path / "saved"))
    again = load_adapter(tiny_llama(), tmp_path / "saved")
    assert again.peft_config["default"].objective_embeddings == embedded().objective_embeddings
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "- **helpful**, weight 0.5 unless set: w1 w2 w3" in card


def test_a_run_with_other_descriptions_is_another_run(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(tmp_path, tokenizer, peft_config=described(), **settings).train()
    other = described(objective_descriptions={**TEXTS, "helpful": "w4"})
    with pytest.raises(ValueError, match="another training: adapter.objective_descriptions.helpful was w1 w2 w3"):
        trainer(tmp_path, tokenizer, peft_config=other, **settings).train(resume_from_checkpoint=True)


def test_a_further_objective_by_its_description(tmp_path):
    """The adapter's weights are for any number of objectives; at weight 0 of the new one it is what it was."""
    arm, ids = random_arm(embedded(default_preference=[0.2, 0.8])), torch.arange(2, 12)[None]
    arm.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    wider = embed_objectives(config, tiny_llama(), tiny_tokenizer(), {"humorous": "w20 w21"})
    assert (wider.objectives, wider.default_preference) == (
        [*TEXTS, "humorous"],
        [*config.default_preference, 0.0],
    )
    assert wider.objective_embeddings[:2] == config.objective_embeddings
    loaded = load_adapter(tiny_llama(), tmp_path, config=wider).eval()
    set_preference(arm, [0.3, 0.7])
    set_preference(loaded, [0.3, 0.7, 0.0])
    torch.testing.assert_close(loaded(ids).logits, arm(ids).logits)
    set_preference(loaded, {"helpful": 0.3, "harmless": 0.2, "humorous": 0.5})
    assert (loaded(ids).logits - arm(ids).logits).abs().max() > 1e-3
    core = loaded.base_model.model.model.layers[0].self_attn.q_proj.adapter("default").core
    e = tiny_llama().get_input_embeddings().weight[tiny_tokenizer().convert_tokens_to_ids(["w20", "w21"])].mean(0)
    o = [*map(torch.tensor, config.objective_embeddings), e / e.norm()]
    gamma, delta = (core.M @ (0.3 * o[0] + 0.2 * o[1] + 0.5 * o[2])).chunk(2)
    matrix, shift = core(torch.tensor([0.3, 0.2, 0.5]))
    torch.testing.assert_close(matrix, torch.diag(1 + gamma))
    torch.testing.assert_close(shift, delta)
    loaded.save_pretrained(tmp_path / "wider")
    write_card(tmp_path / "wider")
    assert "humorous" in (tmp_path / "wider/README.md").read_text()


def bad(**changes):
    return lambda: described(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad(objective_descriptions={}), "describes .*, but the objectives are|list of one or more"),
        (
            bad(objective_descriptions={"helpful": " ", "harmless": "w1"}),
            "of the objective 'helpful' is ' ', but it mu",
        ),
        (bad(objective_descriptions={"helpful": None, "harmless": "w1"}), "'helpful' is None, but it must be a text"),
        (bad(objectives=["helpful", "funny"]), "describes .*, but the objectives are .*'funny'"),
        (bad(objectives=["helpful", "harmless", "funny"]), "a text for each of them"),
        (bad(objective_descriptions=["a", "b"], objectives=OBJECTIVES), "Give a mapping"),
        (bad(embedding_size=8), "`embedding_size` is 8, the size of embeddings that are learned"),
        (bad(objective_embeddings=[[1.0, 2.0]]), "must be 2 lists of equally many finite numbers"),
        (bad(objective_embeddings=[[1.0, 2.0], [1.0]]), "must be 2 lists of equally many"),
        (bad(objective_embeddings=[[1.0], [float("nan")]]), "finite numbers"),
        (bad(objective_embeddings=[[], []]), "must be 2 lists"),
        (bad(objective_embeddings="none"), "must be 2 lists"),
        (lambda: get_peft_model(tiny_llama(), described()), "have no embeddings yet"),
        (lambda: embed_objectives(MoSLoraConfig(), tiny_llama(), tiny_tokenizer()), "has no `objective_descriptions`"),
        (lambda: embed_objectives(PBLoraConfig(), tiny_llama(), tiny_tokenizer()), "has no `objective_descriptions`"),
        (lambda: embed_objectives(described(), tiny_llama(vocab_size=10), tiny_tokenizer()), "does not know"),
        (lambda: embed_objectives(embedded(), tiny_llama(), tiny_tokenizer(), {"helpful": "w1"}), "already"),
        (lambda: embed_objectives(embedded(), tiny_llama(), tiny_tokenizer(), {"funny": ""}), "must be a text"),
        (
            lambda: embed_objectives(embedded(), tiny_llama(hidden_size=16), tiny_tokenizer(), {"funny": "w1"}),
            "have size 16, but those of the adapter 32",
        ),
    ],
)
def test_bad_descriptions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_that_lacks_embeddings_stays_as_it_was():
    model = tiny_llama()
    with pytest.raises(ValueError, match="Make the configuration with `embed_objectives"):
        get_peft_model(model, described())
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
