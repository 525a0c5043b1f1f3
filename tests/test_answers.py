# SPDX-License-Identifier: Apache-2.0
"""What answers are like: likelihoods against float64 without cache or padding, the cap, repetition, old rows."""

import json

import pytest
import torch
from byte_tokenizers import CHATML, chatml, sentences
from conftest import OBJECTIVES, response_ids, tiny_arm, tiny_gpt2, tiny_llama, tiny_tokenizer

from peft_pblora import set_preference
from trl_parm import BASE, LM, PARM, Guided
from trl_parm.evaluation import Run, describe_answers, repetition, sweep
from trl_parm.evaluation.answers import with_all_columns
from trl_parm.evaluation.decoding import RowSampling, encode_prompts
from trl_parm.evaluation.engines import Answer as Tokens
from trl_parm.evaluation.engines import Decoding
from trl_parm.evaluation.likelihood import ChosenLogProbs, base_log_probs


PROMPTS = ["w1 w2 w3", "w4", "w5 w6"]
REWARDS = {name: (lambda prompts, responses: [float(len(r)) for r in responses]) for name in OBJECTIVES}
BETA = 0.5


def naive(model, ids: list[int]) -> torch.Tensor:
    """log π of the next token, in float64."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("on_the_base", [False, True])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 0.7}])
def test_likelihoods_are_those_of_the_formula_token_by_token(options, on_the_base):
    base, tokenizer = tiny_llama(), tiny_tokenizer()
    arm = tiny_arm(base if on_the_base else tiny_llama())
    alone, other = tiny_llama().double(), tiny_arm(tiny_llama()).double()
    runs = [
        Run("base"),
        Run("PARM", [0.3, 0.7], lambda batch: PARM(base, arm, batch.preference, beta=BETA)),
        Run("ARM", [0.3, 0.7], lambda batch: Guided(base, LM(arm, batch.preference))),
    ]
    runs = runs[on_the_base:]  # where an adapter acts on the base, that is the base
    table = sweep(base, tokenizer, PROMPTS, runs, REWARDS, 2, max_new_tokens=5, **options)
    set_preference(other, [0.3, 0.7])
    formulas = {
        "base": lambda ids: naive(alone, ids),
        "PARM": lambda ids: (naive(alone, ids) + naive(other, ids) / BETA).log_softmax(-1),
        "ARM": lambda ids: naive(other, ids),
    }
    for row in table:
        ids = encode_prompts(tokenizer, [row["prompt"]])["input_ids"][0].tolist()
        response = response_ids(row)
        likely = guided = 0.0
        for token in response:
            likely += naive(alone, ids)[token].item()
            guided += formulas[row["method"]](ids)[token].item()
            ids = [*ids, token]
        assert row["log_prob_base"] == pytest.approx(likely, abs=1e-3), row
        assert row["log_ratio"] == pytest.approx(guided - likely, abs=1e-3), row
        assert row["capped"] == (row["tokens"] == 5 and response[-1] != 1)
    shown = {row["method"]: row for row in describe_answers(table)}
    own = [row for row in table if row["method"] == "PARM"]
    count = sum(row["tokens"] for row in own)
    assert shown["PARM"]["kl"] == pytest.approx(sum(row["log_ratio"] for row in own) / count)
    assert shown["PARM"]["log_prob_base"] == pytest.approx(sum(row["log_prob_base"] for row in own) / count)
    assert shown["PARM"]["at_the_cap"] == sum(row["capped"] for row in own) / len(own)
    assert on_the_base or shown["base"]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_row_that_ends_is_not_at_the_cap():
    base = tiny_llama()
    base.lm_head.weight.data[1] = 3 * base.lm_head.weight.data[1:].mean(0)  # whose end token is likely
    table = sweep(base, tiny_tokenizer(), PROMPTS, [Run("base")], REWARDS, max_new_tokens=12, do_sample=True)
    longer = sweep(base, tiny_tokenizer(), PROMPTS, [Run("base")], REWARDS, max_new_tokens=2, do_sample=True)
    for long, short in zip(table, longer, strict=True):
        assert short["capped"] == (long["tokens"] > 2)


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_likelihoods_do_not_depend_on_batches(model, monkeypatch):
    model = model()
    prompts = [torch.arange(2, n) for n in (4, 9, 3)]
    responses = [torch.tensor(ids) for ids in ([5, 1], [7], [9, 9, 8, 1])]
    together = base_log_probs(model, prompts, responses)
    monkeypatch.setattr("trl_parm.evaluation.likelihood.LOGITS_AT_ONCE", 1)
    assert base_log_probs(model, prompts, responses) == pytest.approx(together, abs=1e-4)
    for prompt, response, total in zip(prompts, responses, together, strict=True):
        scores = model(input_ids=torch.cat([prompt, response])[None]).logits[0].double().log_softmax(-1)
        rows = scores[len(prompt) - 1 : -1]
        assert total == pytest.approx(rows.gather(-1, response[:, None]).sum().item(), abs=1e-4)


def test_adapters_on_the_base_rest_while_it_is_read():
    arm = tiny_arm()
    base = arm.get_base_model()
    prompt, response = [torch.tensor([3, 4])], [torch.tensor([5, 6])]
    assert base_log_probs(base, prompt, response) == pytest.approx(base_log_probs(tiny_llama(1), prompt, response))
    acting = base_log_probs(base, prompt, response, ["default"])
    assert abs(acting[0] - base_log_probs(base, prompt, response)[0]) > 1e-3
    assert Guided(base, BASE + LM(arm)).own_term().adapter_names == ()


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d", 0.0),
        ("a b c d a b c d", 0.2),  # five 4-grams, of which one was there
        ("no no no no no no", 2 / 3),
        ("too short here", None),
        ("", None),
    ],
)
def test_repetition_counts_what_was_there_before(text, share):
    assert repetition(text) == (share if share is None else pytest.approx(share))


def row(**changes) -> dict:
    return {"method": "base", "preference": None, "label": "-", "prompt": "x", "response": "a", "tokens": 2, **changes}


def test_rows_of_before_have_no_likelihoods_and_are_shown_nevertheless():
    new = row(prompt="y", capped=True, log_prob_base=-4.0, log_ratio=1.0, response="no no no no no")
    assert describe_answers([row(), row(prompt="z")])[0] == {
        "method": "base", "preference": "-", "tokens": 2.0, "at_the_cap": None, "repetition": None,
        "log_prob_base": None, "kl": None,
    }  # fmt: skip
    mixed = describe_answers([row(), new])[0]
    assert (mixed["at_the_cap"], mixed["kl"], mixed["repetition"]) == (None, None, 0.5)
    alone = describe_answers([new])[0]
    assert (alone["at_the_cap"], alone["kl"], alone["log_prob_base"]) == (1.0, 0.5, -2.0)
    assert [r.get("log_ratio", "missing") for r in with_all_columns([row(), new])] == [None, 1.0]
    assert with_all_columns([row()]) == [row()]


def test_a_file_of_before_goes_on(tmp_path):
    base, path = tiny_llama(), tmp_path / "results.jsonl"
    sweep(base, tiny_tokenizer(), PROMPTS[:2], [Run("base")], REWARDS, path=path, max_new_tokens=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps({k: v for k, v in r.items() if k not in ("capped", "log_prob_base", "log_ratio")}) + "\n"
            for r in rows
        )
    )
    table = sweep(base, tiny_tokenizer(), PROMPTS, [Run("base")], REWARDS, path=path, max_new_tokens=3)
    assert [r["log_ratio"] is None for r in table] == [True, True, False]


def test_the_log_ratio_of_sampled_tokens_is_an_unbiased_sample_of_the_divergence():
    torch.manual_seed(0)
    rows = 4000
    guided, base = (2 * torch.randn(2, 50, dtype=torch.float64)).log_softmax(-1)
    ids, chosen = torch.zeros(rows, 1, dtype=torch.long), ChosenLogProbs()
    scores = chosen(ids, guided.expand(rows, -1))
    tokens = RowSampling(range(rows), prompt_length=1)(ids, scores.clone()).argmax(-1, keepdim=True)
    ratios = chosen.of(tokens)[:, 0].double() - base[tokens[:, 0]]
    exact = (guided.exp() * (guided - base)).sum()
    assert abs(ratios.mean() - exact) < 4 * ratios.std() / rows**0.5
    assert ratios.std() > 0.1


@pytest.mark.parametrize("make", [chatml, sentences])
@pytest.mark.parametrize("template", [None, "Q: {prompt} A:"])
def test_an_answer_to_a_text_keeps_the_space_before_it(make, template):
    """Prompt and response are joined again where a model is trained on them."""
    tokenizer = make()
    tokenizer.chat_template = None
    how = Decoding(tokenizer, [], template, None, False, None, {}, {}, None)
    (prompt,) = how.ids(["How is it?"])
    text = (template or "{prompt}").format(prompt="How is it?")
    for response in (" Fine, I say.", "Fine", "  two", "\nnew", ""):
        whole = tokenizer(text + response)["input_ids"]
        assert whole[: len(prompt)] == prompt
        answer = Tokens([*whole[len(prompt) :], tokenizer.eos_token_id], 0.0, 0.0)
        assert how.responses(["How is it?"], [answer]) == [response]
    if template is None:  # a chat template writes the space itself, or none
        tokenizer.chat_template = CHATML
        assert how.responses(["How is it?"], [answer]) == [""]
        fine = Tokens(tokenizer("Fine, I say.")["input_ids"], 0.0, 0.0)
        assert how.responses(["How is it?"], [fine]) == ["Fine, I say."]
