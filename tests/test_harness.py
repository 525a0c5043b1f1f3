# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with a guided model: its own model class on the same guided model says the same."""

import json
import math

import pytest
import torch
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_pblora import set_preference
from trl_parm.cli.main import main
from trl_parm.decoding import PARM


lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from trl_parm.evaluation.harness import GuidedLM  # noqa: E402


CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITING = """\
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PREFERENCE = {"helpful": 0.7, "harmless": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tiny_llama(max_position_embeddings=128).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "arm")
    rows = [
        {"question": f"w{i} w{i + 1} w{2 * i}", "choices": [f"w{i + 3} w4", "w5", f"w{i} w9 w1"], "answer": i % 3}
        for i in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICES), ("writing", WRITING)):
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


def evaluated(folder, model, **options):
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["tiny_choices", "tiny_writing"], task_manager=manager, log_samples=True, **options
    )
    answers = {task: [sample["filtered_resps"] for sample in rows] for task, rows in found["samples"].items()}
    return found["results"], answers


def guided(folder, preference=PREFERENCE, beta=0.5):
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    arm = tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "base"))
    return PARM(base, arm, preference, beta)


def test_tasks_say_what_the_harness_says_of_the_same_guided_model(folder):
    arguments = f"base={folder / 'base'},arm={folder / 'arm'},beta=0.5,preference=helpful:0.7+harmless:0.3"
    results, answers = evaluated(folder, "trl_parm", model_args=arguments, batch_size=4)
    own = HFLM(pretrained=guided(folder), tokenizer=tiny_tokenizer(), batch_size=4)
    expected, texts = evaluated(folder, own)
    assert answers["tiny_writing"] == texts["tiny_writing"]
    flat = [value for row in answers["tiny_choices"] for value, _ in row]
    assert flat == pytest.approx([value for row in texts["tiny_choices"] for value, _ in row], abs=1e-5)
    for task in results:
        for name, value in expected[task].items():
            assert results[task][name] == value, name
    alone, _ = evaluated(folder, "trl_parm", model_args={"base": str(folder / "base")})
    assert alone["tiny_choices"] != results["tiny_choices"]  # the guide matters
    assert len({json.dumps(text) for text in answers["tiny_writing"]}) > 6


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_the_formula(folder, batch_size):
    """Against two forwards in float64, text by text."""
    model = GuidedLM(
        base=str(folder / "base"), arm=str(folder / "arm"), beta=0.5, preference=json.dumps(PREFERENCE),
        batch_size=batch_size, device="cpu",
    )  # fmt: skip
    pairs = [("w1 w2", " w3 w4 w5"), ("w6", " w7"), ("w8 w9 w1 w2", " w3 w3"), ("w1 w2", " w4")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
    arm = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).eval()
    arm = PeftModel.from_pretrained(arm, folder / "arm").double()
    set_preference(arm, PREFERENCE)
    tokenizer = tiny_tokenizer()
    for (context, text), (value, _) in zip(pairs, found, strict=True):
        start, ids = len(context.split()), torch.tensor([tokenizer(context + text)["input_ids"]])
        with torch.no_grad():
            scores = base(ids).logits.log_softmax(-1) + arm(ids).logits.log_softmax(-1) / 0.5
        own = scores.log_softmax(-1)[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()
        assert value == pytest.approx(own, abs=1e-4)
        assert math.isfinite(value)


def test_what_has_no_finite_log_likelihood_says_so(folder):
    """CAGE chooses among k tokens; among all of them it has one, and it writes texts with any."""
    given = {"base": str(folder / "base"), "method": "cage", "arm": str(folder / "arm"), "preference": PREFERENCE}
    requests = [Instance("loglikelihood", {}, ("w1 w2", " w3 w4"), 0)]
    model = GuidedLM(**given, k=4)
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(ValueError, match="CAGE with `k` 4 chooses among.*Give `k=64`"):
            ask(requests)
    writing = Instance("generate_until", {}, ("w1 w2", {"until": ["."], "max_gen_toks": 3}), 0)
    assert len(model.generate_until([writing])) == 1
    ((value, _),) = GuidedLM(**given, k=64).loglikelihood(requests)
    assert math.isfinite(value)


def test_its_command_knows_the_model(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = [
        "lm_eval", "--model", "trl_parm", "--model_args", "base=base,arm=arm,preference=helpful:1+harmless:0",
        "--include_path", "tasks", "--tasks", "tiny_choices", "--output_path", "out", "--device", "cpu",
    ]  # fmt: skip
    assert main(words) == 0
    assert "tiny_choices" in capsys.readouterr().out
    written = json.loads(next((folder / "out").rglob("results_*.json")).read_text())
    assert written["config"]["trl_parm"]["preference"] == {"helpful": 1.0, "harmless": 0.0}
    assert written["config"]["trl_parm"]["arm"]["fingerprint"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arm": "arm"}, "The method 'PARM' needs a `preference`"),
        ({"preference": PREFERENCE}, "The method 'Base' has no preference"),
        ({"arm": "arm", "preference": "helpful=1"}, "`preference` is 'helpful=1', but it must be like"),
        ({"arm": "arm", "preference": "helpful:0.7+harmless:0.7"}, "must sum to 1"),
        ({"arm": "arm", "preference": PREFERENCE, "betta": 1}, "has betta"),
        ({"arm": "arm", "preference": PREFERENCE, "template": "{prompt}"}, "`template` has no place here"),
        (
            {"method": "args", "rewards": {"a": "trl_parm.rewards:brevity"}, "preference": {"a": 1}},
            "needs prompts and responses apart",
        ),
    ],
)
def test_bad_arguments(folder, monkeypatch, given, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        GuidedLM(base="base", **given)
