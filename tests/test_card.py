# SPDX-License-Identifier: Apache-2.0
"""Model cards of saved adapters: what they say, that it is true, and that a card never costs a save."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from adapter_table import every_adapter, make_model
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from pair_data import pairs
from peft import PeftConfig, PeftModel, get_peft_model
from test_cli import write_results
from training_runs import LORA, trainer, two_sets, without_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pblora import PBLoraConfig, add_results, get_preference, set_preference, write_card
from peft_pblora.card import MARK, PROMPT, TEMPLATE, render
from peft_pblora.card.files import QUANTIZED
from trl_parm import PARMLogitsProcessor, PreferenceARMConfig
from trl_parm.cli.main import main
from trl_parm.training import sample
from trl_parm.training.diagnosis import diagnose
from trl_parm.training.sample import guided_answers, make_sample


OBJECTIVES = ["helpful", "harmless"]


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def arm(base):
    return tiny_arm(AutoModelForCausalLM.from_pretrained(base))


def card_of(folder) -> str:
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def code_of(card: str, folder) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("path/to/this/folder", str(folder))


def answers_of(card: str) -> dict[str, str]:
    lines = card.split("## One prompt")[1].split("##")[0].splitlines()
    rows = [line.strip("| ").split(" | ", 1) for line in lines if line.startswith("|")]
    return {row[0]: row[-1] for row in rows[2:]}


def check_metadata(card: str) -> dict:
    """What the Hub demands of the head: known keys of the right types, ids that can be ids."""
    data = ModelCard(card).data.to_dict()
    assert yaml.safe_load(card.split("---\n")[1]) == data
    assert data["library_name"] in ("peft", "transformers")
    assert data.get("pipeline_tag", "text-generation") == "text-generation"
    assert all(isinstance(tag, str) and "/tmp" not in tag for tag in data["tags"])
    for name in [*filter(None, [data.get("base_model")]), *data.get("datasets", [])]:
        validate_repo_id(name)
    known = {"base_model", "datasets", "library_name", "license", "pipeline_tag", "tags"}
    assert set(data) <= known
    return data


def saved_with_sample(arm, base, folder) -> str:
    arm.save_pretrained(folder)
    write_card(folder, sample=make_sample(arm, AutoTokenizer.from_pretrained(base), PROMPT))
    return card_of(folder)


def test_sample_is_what_guided_decoding_gives(arm, base):
    """The sample against `PARMLogitsProcessor` in `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    preferences = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = guided_answers(arm, tokenizer, "w1 w2", preferences, 0.5, 8)
    chat = [{"role": "user", "content": "w1 w2"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    guides = [[], *([PARMLogitsProcessor(arm, row, 0.5)] for row in preferences)]
    for text, guide in zip(found, guides, strict=True):
        output = plain.generate(**inputs, logits_processor=guide, max_new_tokens=8, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert text.removesuffix(" …") == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert text.endswith(" …") == (1 not in new.tolist())
    assert len(set(found)) > 1


def test_saving_writes_what_is_saved_and_nothing_else(arm, tmp_path, monkeypatch):
    """No text is generated, and the card is PEFT's until one is asked for."""
    monkeypatch.setattr(type(arm.get_base_model()), "forward", lambda *_, **__: pytest.fail("a forward"))
    arm.peft_config["default"].save_pretrained(tmp_path / "config")
    assert [file.name for file in (tmp_path / "config").iterdir()] == ["adapter_config.json"]
    arm.save_pretrained(tmp_path / "arm")
    assert TEMPLATE in card_of(tmp_path / "arm")
    write_card(tmp_path / "arm")
    assert "A PBLoRA adapter" in card_of(tmp_path / "arm")
    assert "## One prompt" not in card_of(tmp_path / "arm")


def test_a_card_is_a_function_of_its_arguments(arm, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("os.stat", lambda *_, **__: pytest.fail("a file was looked for"))
    config, facts = arm.peft_config["default"], {"title": "Mine", "base_model": "user/base", "tags": ["b", "a"]}
    before = dict(vars(config)), dict(facts)
    cards = [str(render(config, facts, ["c"])) for _ in range(2)]
    assert (dict(vars(config)), facts) == before
    assert cards[0] == cards[1]
    assert ModelCard(cards[0]).data.base_model == "user/base"


def test_card_of_a_saved_adapter(arm, base, tmp_path):
    set_preference(arm, [0.2, 0.8])
    arm.train()
    arm.get_base_model().lm_head.eval()
    card = saved_with_sample(arm, base, tmp_path / "arm")
    data = check_metadata(card)
    assert "base_model" not in data  # a folder is no id on the Hub
    assert {"pblora", "preference-conditioned"} <= set(data["tags"])
    for part in ("A PBLoRA adapter", "**helpful**", "**harmless**", "lin2025parm", PROMPT):
        assert part in card, part
    assert "xu2025genarm" not in card
    assert set(answers_of(card)) == {"(the base model alone)", "helpful", "uniform", "harmless"}
    # The sample leaves everything as it was.
    assert get_preference(arm).tolist() == pytest.approx([0.2, 0.8])
    assert arm.training
    assert not arm.get_base_model().lm_head.training


@pytest.mark.parametrize("objectives", [["a"], ["a", "b"], ["a", "b", "c"], list("abcdef")])
def test_a_sample_has_every_objective(base, objectives):
    arm = tiny_arm(AutoModelForCausalLM.from_pretrained(base), objectives)
    names = [name for name, _ in make_sample(arm, AutoTokenizer.from_pretrained(base), PROMPT)["answers"]]
    between = ["uniform"] if len(objectives) > 1 else []
    assert names == ["(the base model alone)", objectives[0], *between, *objectives[1:]]


def test_the_card_s_code_runs_and_gives_the_card_s_answer(arm, base, tmp_path):
    card = saved_with_sample(arm, base, tmp_path / "arm")
    code = code_of(card, tmp_path / "arm")
    assert code.startswith("import peft_pblora\n")
    assert "trust_remote_code" not in card
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert answers_of(card)["uniform"].removesuffix(" …") in result.stdout


def test_an_adapter_in_a_folder_of_its_own_has_the_card_above_it(base, tmp_path):
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    first, second = (PBLoraConfig(objectives=own, **settings) for own in (OBJECTIVES, ["brief", "kind"]))
    arm = get_peft_model(AutoModelForCausalLM.from_pretrained(base), first, adapter_name="first")
    arm.add_adapter("second", second)
    for _ in range(2):
        arm.save_pretrained(tmp_path / "arm")
        write_card(tmp_path / "arm", subfolder="first", title="Mine")
        card = card_of(tmp_path / "arm")
        assert "**helpful**" in card
        assert "**brief**" not in card
        assert PeftConfig.from_pretrained(tmp_path / "arm/first").card == {"title": "Mine"}
    code = code_of(card, tmp_path / "arm")
    assert f'arm = PeftModel.from_pretrained(base, "{tmp_path}/arm", subfolder="first")' in code
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arm, tokenizer: setattr(tokenizer, "eos_token", None), "no end token"),
        (lambda arm, tokenizer: arm.merge_adapter(), "merged"),
        (
            lambda arm, tokenizer: setattr(arm.get_base_model(), "forward", lambda input_ids: 1 / 0),
            "unexpected keyword",
        ),
    ],
)
def test_what_hinders_the_sample_stands_in_the_card(arm, base, tmp_path, change, reason):
    tokenizer = AutoTokenizer.from_pretrained(base)
    arm.get_base_model().generation_config.eos_token_id = None
    change(arm, tokenizer)
    arm.save_pretrained(tmp_path / "arm")
    write_card(tmp_path / "arm", sample=make_sample(arm, tokenizer, PROMPT))
    card = card_of(tmp_path / "arm")
    assert reason in card.split("No answer was generated when the adapter was saved: ")[1].splitlines()[0]
    check_metadata(card)


def test_a_sample_that_takes_too_long_is_cut_or_given_up(arm, base, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SECONDS", -1.0)
    assert "it took longer than" in saved_with_sample(arm, base, tmp_path / "arm")
    monkeypatch.setattr(sample, "LEAST_TOKENS", 1)
    found = answers_of(saved_with_sample(arm, base, tmp_path / "arm"))
    assert all(len(answer) <= len("w57 …") and answer.endswith("…") for answer in found.values())


def test_several_processes_generate_nothing(arm, base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert "by one of several processes" in saved_with_sample(arm, base, tmp_path / "arm")


@every_adapter
def test_every_method_s_card(row, base, tmp_path):
    model = make_model(row, AutoModelForCausalLM.from_pretrained(base))
    card = saved_with_sample(model, base, tmp_path / "arm")
    check_metadata(card)
    assert len(answers_of(card)) == 5
    assert card.count("@") == 1


def test_what_a_user_wrote_stays(arm, tmp_path):
    folder = tmp_path / "arm"

    def save():
        arm.save_pretrained(folder)
        write_card(folder)
        return card_of(folder)

    own = save().replace(MARK, "My own words.").split("## Licence")[0]
    (folder / "README.md").write_text(own)
    assert "My own words." in save()
    assert "## Licence" not in save()
    (folder / "README.md").write_text("# Mine\n")
    found = save()
    assert found.startswith("---\n")
    assert "# Mine" in found
    assert code_of(found, folder).startswith("import peft_pblora\n")


def test_facts_travel_and_results_are_added(arm, base, tmp_path):
    config = arm.peft_config["default"]
    config.base_model_name_or_path = "some/model"
    config.card = {"title": "My arm", "license": "mit", "datasets": ["my/data"], "base_license": "apache-2.0"}
    arm.save_pretrained(tmp_path / "arm")
    (tmp_path / "front.png").write_bytes(b"\x89PNG")
    table = [["measure", "value"], ["hypervolume above (helpful 0, harmless -5)", 18.83]]
    add_results(tmp_path / "arm", table, tmp_path / "front.png", data_license="cc-by-4.0")
    for folder in ("arm", "again"):
        write_card(tmp_path / folder)
        card = card_of(tmp_path / folder)
        data = check_metadata(card)
        assert (data["base_model"], data["datasets"], data["license"]) == ("some/model", ["my/data"], "mit")
        assert "base_model:adapter:some/model" in data["tags"]
        for part in ("# My arm", "hypervolume above (helpful 0, harmless -5) | 18.83", "cc-by-4.0"):
            assert part in card, part
        assert ("(front.png)" in card) == (tmp_path / folder / "front.png").exists() == (folder == "arm")
        assert str(tmp_path) not in (tmp_path / folder / "adapter_config.json").read_text()
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)
        loaded.save_pretrained(tmp_path / "again")
        assert PeftConfig.from_pretrained(tmp_path / folder).inference_mode
    add_results(tmp_path / "arm", [["measure"], ["other"]])
    assert "18.83" not in card_of(tmp_path / "arm")


def test_plot_completes_the_card(arm, tmp_path):
    arm.save_pretrained(tmp_path / "arm")
    rows = [
        {"method": "PARM", "preference": [w, 1 - w], "label": str(w), "prompt": f"p{i}", "helpful": w + 0.1 * i,
         "harmless": -w, "tokens": 1, "seconds": 1.0, "extra_parameters": 0, "extra_bytes": 0}
        for w in (0.0, 1.0) for i in range(3)
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["plot", "--results", str(tmp_path / "results.jsonl"), "--output_dir", str(tmp_path / "figures")]
    words += ["--objectives", *OBJECTIVES, "--references", "[-1, -2]", "--resamples", "5", "--card"]
    assert main([*words, str(tmp_path / "arm")]) == 0
    card = card_of(tmp_path / "arm")
    # The front is (0.1, 0) and (1.1, -1): 1.1 · 2 for the first, 1 · 1 more for the second.
    assert "hypervolume | helpful -1, harmless -2 | 3.2 |" in card
    assert "(fronts.png)" in card
    assert (tmp_path / "arm" / "fronts.png").read_bytes() == (tmp_path / "figures" / "fronts.png").read_bytes()
    assert main([*words, str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "nowhere"}, "There is no adapter in 'nowhere'"),
        ({"figure": "no.png"}, "There is no figure at 'no.png'"),
        ({"colour": "red"}, "A card has no colour"),
    ],
)
def test_results_that_can_t_be_added(arm, tmp_path, arguments, message):
    arm.save_pretrained(tmp_path / "arm")
    before = card_of(tmp_path / "arm")
    with pytest.raises(ValueError, match=message):
        add_results(**{"folder": tmp_path / "arm", **arguments})
    assert card_of(tmp_path / "arm") == before


def test_the_licence_of_the_base_is_read_from_its_card(arm, base, tmp_path):
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.")
    arm.save_pretrained(tmp_path / "arm")
    write_card(tmp_path / "arm")
    assert f"Base model, `{base}`: apache-2.0" in card_of(tmp_path / "arm")


def test_a_table_s_cells_stay_in_their_cells():
    facts = {"sample": {"prompt": "a | b", "beta": 1.0, "answers": [["x", "one\ntwo | <b>three"]]}}
    assert "| x | one two \\| &lt;b>three |" in str(render(None, facts))


def test_trainer_s_card_tells_what_was_trained(tmp_path, base, tokenizer):
    two_sets()["helpful"].to_json(tmp_path / "helpful.jsonl")
    data = {"helpful": str(tmp_path / "helpful.jsonl"), "harmless": two_sets()["harmless"]}
    run = trainer(
        tmp_path / "arm", tokenizer, AutoModelForCausalLM.from_pretrained(base), data, two_sets(), max_steps=2,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    run.save_model()
    card = card_of(tmp_path / "arm")
    assert "generated_from_trainer" in check_metadata(card)["tags"]
    value = metrics["eval_helpful_accuracy@harmless"]
    for part in ("| helpful | helpful.jsonl | 6 |", "| harmless | not named | 4 |", "helpful 0.1, harmless 0.1",
                 "Dirichlet(0.5), one for each step", f"{value:.3f} (", "lin2025parm", "- trl ",
                 "max_steps: 2"):  # fmt: skip
        assert part in card, part
    assert str(tmp_path) not in card.split("## How it was made")[1].split("##")[0]
    assert not list((tmp_path / "arm").glob("*.bin"))
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    again = PreferenceARMConfig("out", **{**settings, "bf16": False})
    assert (again.beta, again.learning_rate, again.max_steps) == (0.1, 0.1, 2)
    checkpoint = card_of(tmp_path / "arm" / "checkpoint-1")
    assert "## One prompt" not in checkpoint
    assert len(answers_of(card)) == 4
    run.create_model_card("my arm", "my/data", tags="mine")
    later = card_of(tmp_path / "arm")
    assert (check_metadata(later)["datasets"], answers_of(later)) == (["my/data"], answers_of(card))
    assert "mine" in check_metadata(later)["tags"]
    assert json.loads((tmp_path / "arm/adapter_config.json").read_text())["card"]["title"] == "my arm"
    exec(code_of(later, tmp_path / "arm"), scope := {})
    assert scope["output"].shape[1] > scope["inputs"]["input_ids"].shape[1]


def settings_of(folder) -> dict:
    """The arguments in a card."""
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", card_of(folder), re.DOTALL)[1])


@pytest.mark.parametrize("further", [False, True], ids=["one configuration", "trained further"])
def test_the_card_of_a_second_run_is_of_that_run(tmp_path, tokenizer, further):
    said = {"title": "Mine", "license": "mit", "datasets": ["my/data"]}
    config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"], task_type="CAUSAL_LM", card=said)
    given = dict(vars(config))
    for number, rows in ((1, 6), (2, 5)):
        model = tiny_llama()
        if further and number == 2:
            model = PeftModel.from_pretrained(model, tmp_path / "1", is_trainable=True)
        run = trainer(
            tmp_path / str(number), tokenizer, model, two_sets(rows), seed=number, learning_rate=number / 10,
            peft_config=None if isinstance(model, PeftModel) else config, card_prompt=None, max_steps=1,
        )  # fmt: skip
        run.train()
        run.save_model()
    card = card_of(tmp_path / "2")
    assert (settings_of(tmp_path / "2")["seed"], settings_of(tmp_path / "2")["learning_rate"]) == (2, 0.2)
    for part in ("| seed | 2 |", "| learning rate | 0.2 |", "| helpful | not named | 5 |", "# Mine"):
        assert part in card, part
    data = check_metadata(card)
    # The data of the first run is not that of the second.
    assert (data["license"], data.get("datasets")) == ("mit", None if further else ["my/data"])
    assert vars(config) == given
    run.create_model_card("Yours", tags="mine")
    assert "# Yours" in card_of(tmp_path / "2")
    assert "mine" in check_metadata(card_of(tmp_path / "2"))["tags"]


def test_the_card_of_the_best_model_is_of_its_evaluation(tmp_path, tokenizer):
    """Or of one since; and of none if there was none since it was trained again."""
    run = trainer(
        tmp_path, tokenizer, evaluation=without_ranks(two_sets(12, 12)), load_best_model_at_end=True, max_steps=6,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=3.0,
        card_prompt=None,
    )  # fmt: skip
    run.train()
    run.save_model()
    step = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert step < 6
    entry = next(e for e in run.state.log_history if e["step"] == step and "eval_loss" in e)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["card"]
    assert saved["accuracies"][1][1].startswith(f"{entry['eval_helpful_accuracy@helpful']:.3f} (")
    assert saved["diagnosis"] == diagnose(entry, OBJECTIVES, run.adapter_config)
    later = run.evaluate(two_sets(12, 12))
    run.save_model()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["card"]
    assert saved["accuracies"][1][1].startswith(f"{later['eval_helpful_accuracy@helpful']:.3f} (")
    run.args.eval_strategy, run.args.load_best_model_at_end = "no", False
    run.train()
    run.save_model()
    assert "accuracies" not in json.loads((tmp_path / "adapter_config.json").read_text())["card"]


def test_the_card_of_a_plain_lora_is_genarm_s(tmp_path, base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base)
    run = trainer(tmp_path / "arm", tokenizer, model, data=pairs(4), peft_config=LORA, max_steps=1)
    run.train()
    run.save_model()
    card = card_of(tmp_path / "arm")
    check_metadata(card)
    assert "xu2025genarm" in card
    assert "lin2025parm" not in card
    exec(code_of(card, tmp_path / "arm"), scope := {})
    assert scope["output"].shape[1] > scope["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("filled", "stays"),
    [
        (lambda card: card, False),
        (lambda card: card.replace("- PEFT ", "- PEFT 1."), False),
        (lambda card: card + "\n## Training procedure\n\n" + QUANTIZED + "\n- load_in_4bit: True\n- x: y\n", False),
        (lambda card: card.replace("[More Information Needed]", "Somebody", 1), True),
        (lambda card: card + "\n- load_in_4bit: a note of mine\n", True),
        (lambda card: card.replace("---\n", "---\nlicense: mit\n", 1), True),
        (lambda card: card.replace("# Model Card for Model ID", "# Model Card for Model ID\n\nMy adapter."), True),
    ],
)
def test_a_template_that_a_user_filled_in_stays(arm, tmp_path, filled, stays):
    arm.save_pretrained(tmp_path / "arm")
    given = filled(card_of(tmp_path / "arm"))
    (tmp_path / "arm/README.md").write_text(given)
    for _ in range(2):
        write_card(tmp_path / "arm")
        card = card_of(tmp_path / "arm")
        assert (card.startswith(given.rstrip()), MARK not in card) == (stays, stays)
        assert card.count("import peft_pblora\n") == 1


def test_a_figure_of_a_user_is_never_replaced(arm, tmp_path, capsys):
    arm.save_pretrained(tmp_path / "arm")
    first, second = tmp_path / "one/fronts.png", tmp_path / "two/fronts.png"
    for path in (first, second):
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    beside = tmp_path / "arm/fronts.png"
    for path in (first, second, second, beside):  # what was copied here is ours
        add_results(tmp_path / "arm", figure=path)
    assert beside.read_bytes() == b"two"
    beside.write_bytes(b"mine")
    before = card_of(tmp_path / "arm")
    with pytest.raises(ValueError, match="fronts.png was not written by 'add_results', or was changed"):
        add_results(tmp_path / "arm", [["a"], ["b"]], figure=first)
    assert (beside.read_bytes(), card_of(tmp_path / "arm")) == (b"mine", before)
    results = write_results(tmp_path / "results")
    words = ["plot", "--results", str(results), "--output_dir", str(tmp_path / "figures"), "--resamples", "5"]
    assert main([*words, "--card", str(tmp_path / "arm")]) == 2
    assert "was not written by 'add_results'" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
