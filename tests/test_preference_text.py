# SPDX-License-Identifier: Apache-2.0
"""Preferences that stand in the prompt's text: how they are written, trained with, kept and decoded with."""

import re

import pytest
import torch
from conftest import OBJECTIVES, character_tokenizer, tiny_llama
from datasets import Dataset
from pair_data import naive_log_probs, pairs
from peft import LoraConfig, PeftModel, get_peft_model
from training_runs import LORA, PBLORA, trainer
from transformers import AutoModelForCausalLM

from trl_parm import BASE, LM, PARM, Guided, PARMLogitsProcessor, PreferenceText, Prompt
from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.models import Models
from trl_parm.rewards import brevity, conciseness
from trl_parm.training.data import PADDING, PROMPT, PreferenceCollator, with_texts


TEXT = PreferenceText(OBJECTIVES)
TEMPLATE = "[{preference}] "


@pytest.fixture
def characters():
    return character_tokenizer()


def test_weights_are_rounded_each_by_itself():
    assert TEXT.of([0.3, 0.7]) == "helpful: 0.30, harmless: 0.70\n"
    assert TEXT.of({"harmless": 1, "helpful": 0}) == "helpful: 0.00, harmless: 1.00\n"
    three = PreferenceText(["a", "b", "c"], "Weights {preference}. ")
    assert three.of([1 / 3, 1 / 3, 1 / 3]) == "Weights a: 0.33, b: 0.33, c: 0.33. "
    assert TEXT.of([0.296, 0.704]) == TEXT.of([0.304, 0.696])
    assert TEXT.of([1.5, -0.5], allow_off_simplex=True) == "helpful: 1.50, harmless: -0.50\n"
    assert "-0.00" not in TEXT.of([1.001, -0.001], allow_off_simplex=True)


def test_a_preference_stands_after_the_beginning_of_a_text_and_before_all_else(characters):
    own = characters(TEXT.of([0.5, 0.5]), add_special_tokens=False)["input_ids"]
    assert TEXT.insert(characters, [[3, 8, 9], [8, 9], []], [0.5, 0.5]) == [[3, *own, 8, 9], [*own, 8, 9], own]
    rows = TEXT.insert(characters, [[8], [9]], [[1.0, 0.0], [0.0, 1.0]])
    assert [characters.decode(row) for row in rows] == [
        TEXT.of([1.0, 0.0]) + characters.decode(8),
        TEXT.of([0.0, 1.0]) + characters.decode(9),
    ]


def test_no_preference_is_longer_than_the_longest(characters):
    grid = torch.stack([torch.linspace(0, 1, 101), 1 - torch.linspace(0, 1, 101)], -1)
    assert max(map(len, TEXT.ids(characters, grid, 101))) == TEXT.most_tokens(characters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceText(["helpful"]), "There is one objective, 'helpful'"),
        (lambda: PreferenceText(["helpful", "helpful"]), "has a name twice"),
        (lambda: PreferenceText(OBJECTIVES, "no place"), "must be a text with {preference} in it"),
        (lambda: TEXT.of([0.5, 0.6]), "must sum to 1"),
        (lambda: TEXT.of([1.5, -0.5]), "negative weight"),
        (lambda: TEXT.insert(character_tokenizer(), [[4]], [[1.0, 0.0], [0.0, 1.0]]), "has 2 rows, but there are 1"),
        (lambda: PreferenceText.load("/nowhere"), "There is no preference_text.json at '/nowhere'"),
        (lambda: PreferenceText.load("no/such-model"), "There is no preference_text.json"),
        (
            lambda: Prompt.with_preference(
                {"inputs_embeds": torch.zeros(1, 2, 3)}, [1, 0], TEXT, character_tokenizer()
            ),
            "There are no `input_ids`",
        ),
    ],
)
def test_bad_texts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_is_kept_in_a_file_that_may_be_damaged(tmp_path):
    made = PreferenceText(["a b", "ü"], "x {preference} {other}\n")
    made.save(tmp_path)
    assert PreferenceText.load(tmp_path) == made
    for content in ("[]", "{", '{"objectives": ["a", "b"]}', '{"objectives": ["a"], "template": "{preference}"}'):
        (tmp_path / "preference_text.json").write_text(content)
        with pytest.raises(ValueError, match="does not say how preferences are written"):
            PreferenceText.load(tmp_path)


# In training


def batch_of(n_pairs: int, share: bool):
    """Pairs of different lengths, of which some begin with the beginning-of-text token."""
    torch.manual_seed(0)
    rows = []
    for i in range(n_pairs):
        prompt = ([3] if i % 2 else []) + torch.randint(4, 60, (i % 3 + 1,)).tolist()
        pair = {"prompt_ids": prompt, "labels": [1, -1], "pair_id": i}
        pair |= {name: torch.randint(4, 60, (2 + i % 4,)).tolist() for name in ("first_ids", "second_ids")}
        rows.append({"pairs": [pair]})
    return PreferenceCollator(0, share_prompt=share)(rows)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bos", [3, None])
@pytest.mark.parametrize("each", [False, True])
def test_texts_go_into_a_batch_as_into_lists(share, bos, each):
    batch = batch_of(5, share)
    texts = [[40 + i] * (i % 3 + 1) for i in range(5)] if each else [[50, 51, 52]]
    found = with_texts(batch, texts, bos, 0)
    for row, (ids, segments) in enumerate(zip(batch["input_ids"].tolist(), batch["segments"].tolist(), strict=True)):
        text = texts[row % 5] if each else texts[0]
        start = int(bos is not None and ids[0] == bos)
        length = found["input_ids"].shape[1]
        twin = [*ids[:start], *text, *ids[start:]]
        kinds = [*segments[:start], *[PROMPT] * len(text), *segments[start:]]
        kept = [(i, kind) for i, kind in zip(twin, kinds, strict=True) if kind != PADDING]
        kept += [(0, PADDING)] * (length - len(kept))
        assert list(zip(found["input_ids"][row].tolist(), found["segments"][row].tolist(), strict=True)) == kept
    assert {name for name in batch if found[name] is not batch[name]} == {"input_ids", "segments"}


def text_pairs(n: int) -> Dataset:
    """Pairs that the tokenizer of characters reads, with a label for each objective."""
    rows = [
        {"prompt": f"q{i % 5}", "response_0": f"a{i}" + "b" * (i % 3), "response_1": f"{i}c", "helpful": i % 2,
         "harmless": (i + 1) % 2}
        for i in range(n)
    ]  # fmt: skip
    return Dataset.from_list(rows)


def prompted(folder, characters, data=None, **changes):
    settings = {"preference_template": TEMPLATE, "label_columns": {name: name for name in OBJECTIVES}, **changes}
    data = text_pairs(6) if data is None else data
    return trainer(folder, characters, data=data, peft_config=settings.pop("peft_config", LORA), **settings)


@pytest.mark.parametrize("per", ["step", "pair"])
@pytest.mark.parametrize("share", [False, True])
def test_the_loss_is_that_of_prompts_with_the_drawn_preference(tmp_path, characters, per, share):
    """Against log π token by token, in float64, of prompts written by hand."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    run = prompted(tmp_path, characters, preference_per=per, share_prompt=share, peft_config=lora)
    rows = [run.train_dataset[i] for i in range(4)]
    batch = run.data_collator(rows)
    loss = run.compute_loss(run.model.train(), batch)
    sampler, text = run.preference_sampler, PreferenceText(OBJECTIVES, TEMPLATE)
    αs = sampler.for_step(0).expand(4, 2) if per == "step" else sampler.for_pairs(0, batch["pair_ids"])
    model, total = run.model.eval(), 0.0
    for row, α in zip(rows, αs.tolist(), strict=True):
        pair = row["pairs"][0]
        written = characters(text.of(α), add_special_tokens=False)["input_ids"]
        prompt = [*written, *pair["prompt_ids"]]
        first, second = (naive_log_probs(model, prompt, pair[name]) for name in ("first_ids", "second_ids"))
        for weight, label in zip(α, pair["labels"], strict=True):
            margin = torch.tensor(label * 0.1 * (first - second), dtype=torch.float64)
            total -= weight * torch.nn.functional.logsigmoid(margin).item() / 4
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_run_evaluates_at_preferences_saves_its_text_and_goes_on(tmp_path, characters):
    settings = {"save_strategy": "steps", "save_steps": 2, "evaluation": text_pairs(5)}
    run = prompted(tmp_path / "run", characters, **settings)
    assert run.objectives == OBJECTIVES
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_vertex_distance"] > 0  # what it reads matters
    run.save_model()
    text = PreferenceText.load(tmp_path / "run")
    assert text == PreferenceText(OBJECTIVES, TEMPLATE)
    assert PreferenceText.load(tmp_path / "run/checkpoint-2") == text
    card = (tmp_path / "run/README.md").read_text()
    assert "It reads the preference α over its objectives, **helpful**, **harmless**" in card
    assert "Prompt.with_preference(inputs, " in card
    assert "2503.00295" in card
    whole = [p.clone() for p in run.model.parameters() if p.requires_grad]
    again = prompted(tmp_path / "run", characters, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert all(map(torch.equal, whole, [p for p in again.model.parameters() if p.requires_grad]))
    other = prompted(tmp_path / "run", characters, **settings, preference_template="{preference}: ")
    with pytest.raises(ValueError, match=r"another training: preference_template was \[{preference}\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_the_code_of_its_card_guides(tmp_path, characters, capsys):
    models_in(tmp_path)
    run = prompted(tmp_path / "run", characters, model=str(tmp_path / "base"))
    run.train()
    run.save_model()
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "run/README.md").read_text(), re.DOTALL)
    assert 'Prompt.with_preference(inputs, {"helpful": 0.5, "harmless": 0.5}, text, tokenizer)' in code
    exec(code.replace("path/to/this/folder", str(tmp_path / "run")), {})
    assert capsys.readouterr().out.strip()


def test_ranked_data_sets_and_whole_models_too(tmp_path, characters):
    data = {name: pairs(4).map(lambda row: {key: text.replace(" ", "") for key, text in row.items()}) for name in "ab"}
    run = prompted(tmp_path, characters, data, model=tiny_llama(), peft_config=None, label_columns=None)
    assert run.objectives == ["a", "b"]
    run.train()


def test_room_is_left_for_the_text(tmp_path, characters, caplog):
    longest = 4 + len(PreferenceText(OBJECTIVES, TEMPLATE).of([0.5, 0.5]))
    run = prompted(tmp_path, characters, text_pairs(8), max_length=longest + 2)
    kept = [row for rows in run.train_dataset.datasets for row in rows]
    assert 0 < len(kept) < 8
    assert all(len(r["prompt_ids"]) + max(len(r["first_ids"]), len(r["second_ids"])) <= 6 for r in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_config": PBLORA}, "the model has a preference-conditioned adapter. Leave the template out"),
        ({"label_columns": {"helpful": "helpful"}}, "There is one objective, 'helpful'"),
        ({"label_columns": None}, "does not say which column belongs to the objective"),
        ({"preference_template": "{weights}"}, "must be a text with {preference} in it"),
        ({"preference_template": None}, "there are 2 objectives"),
    ],
)
def test_bad_training(tmp_path, characters, changes, message):
    with pytest.raises(ValueError, match=message):
        prompted(tmp_path, characters, **changes)


# Decoding


def test_a_prompt_with_a_preference_is_that_text_alone(tmp_path, characters):
    """By both doors, rows of several lengths, against each row's text read by the guide by itself."""
    base, arm = tiny_llama(0), tiny_llama(1)
    inputs = characters(["ab c", "d"], return_tensors="pt", padding=True, padding_side="left")
    αs = [[0.25, 0.75], [1.0, 0.0]]
    prompt = Prompt.with_preference(inputs, αs, TEXT, characters)
    own = prompt.arguments
    for row, α in enumerate(αs):
        ids = own["guide_input_ids"][row][own["guide_attention_mask"][row].bool()]
        assert characters.decode(ids) == TEXT.of(α) + ("ab c", "d")[row]
    by_model = PARM(base, arm).generate(**inputs, **own, max_new_tokens=6)
    guide = PARMLogitsProcessor(arm, prompt=prompt)
    by_processor = base.generate(**inputs, logits_processor=[guide], max_new_tokens=6)
    assert torch.equal(by_model, by_processor)
    for row, α in enumerate(αs):
        one = characters(["ab c", "d"][row : row + 1], return_tensors="pt")
        alone = Prompt.with_preference(one, α, TEXT, characters)
        text = PARM(base, arm).generate(**one, **alone.arguments, max_new_tokens=6)[0, one["input_ids"].shape[1] :]
        assert torch.equal(text, by_model[row, inputs["input_ids"].shape[1] :][: len(text)])
    assert not torch.equal(by_model, Guided(base, BASE + LM(arm)).generate(**inputs, max_new_tokens=6))


def models_in(folder):
    """A base model and a LoRA on it that reads preferences, in folders."""
    tiny_llama(0).save_pretrained(folder / "base")
    character_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    arm = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    for name, parameter in arm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    arm.save_pretrained(folder / "arm")
    PreferenceText(OBJECTIVES, TEMPLATE).save(folder / "arm")


@pytest.mark.parametrize("template", [None, "so {prompt}"])
def test_evaluation_decodes_prompts_that_are_written_by_hand(tmp_path, template):
    models_in(tmp_path)
    prompts, grid = ["ab c", "d"], [[0.3, 0.7], [1.0, 0.0]]
    method = {"method": "parm_prompt", "arm": str(tmp_path / "arm"), "beta": 0.5, "template": template}
    rewards = {"harmless": brevity, "helpful": conciseness}  # in another order than the text's
    table = evaluate(
        Models(str(tmp_path / "base")), [method], grid, prompts, rewards, None, max_new_tokens=5, batch_size=4
    )
    tokenizer, found = character_tokenizer(), []
    arm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "arm").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for harmless, helpful in grid:
        for prompt in prompts:
            own_prompt = (template or "{prompt}").format(prompt=prompt)
            text = f"[helpful: {helpful:.2f}, harmless: {harmless:.2f}] {own_prompt}"
            ids, own = (tokenizer(one, return_tensors="pt")["input_ids"] for one in (prompt, text))
            start = ids.shape[1]
            for _ in range(5):
                guide = arm(input_ids=own).logits[:, -1].double().log_softmax(-1)
                token = (base(ids).logits[:, -1].double().log_softmax(-1) + 2 * guide).argmax(-1, keepdim=True)
                ids, own = (torch.cat([one, token], 1) for one in (ids, own))
                if token.item() == 1:
                    break
            found.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert table["response"] == found
    assert len(set(found)) > 2


def test_an_evaluation_over_other_objectives_is_refused(tmp_path):
    models_in(tmp_path)
    method = {"method": "parm_prompt", "arm": str(tmp_path / "arm")}
    rewards = {"helpful": brevity, "funny": conciseness}
    with pytest.raises(ValueError, match="but the objectives are helpful, funny"):
        evaluate(Models(str(tmp_path / "base")), [method], [[0.3, 0.7]], ["ab"], rewards, None, max_new_tokens=2)
