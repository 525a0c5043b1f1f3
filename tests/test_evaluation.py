# SPDX-License-Identifier: Apache-2.0
"""The engine of evaluation: its table, noise that belongs to the prompt, and runs that were killed."""

import json
import shutil
import traceback

import numpy as np
import pytest
import torch
from conftest import before_5_24, tiny_arm, tiny_llama, tiny_tokenizer
from scipy.stats import chisquare

from trl_parm.decoding import PARM
from trl_parm.evaluation import Run, arrange, mean_and_error, rescore, summarize, sweep
from trl_parm.evaluation.decoding import RowSampling, encode_prompts
from trl_parm.noise import row_seed
from trl_parm.records import Records, read_rows
from trl_parm.reward_models import RewardSource
from trl_parm.rewards import brevity, conciseness, positivity, score
from trl_parm.texts import as_text, fill


PROMPTS = ("w1 w2", "w3", "w4 w5 w6 w7", "w8 w9", "w10")
REWARDS = {"helpful": brevity, "harmless": conciseness}


def test_rewards():
    texts = ["This is wonderful! I love it.", "Terrible. Awful.", "no end"]
    assert brevity(texts, texts) == [-6, -2, -2]
    assert conciseness(texts, texts) == [-3, -1, -2]
    positive = positivity(texts, texts)
    assert positive[0] > 0.5 > 0 > positive[1]
    assert positive[2] <= 0


@pytest.mark.parametrize("kind", [torch.tensor, lambda v: torch.tensor(v)[:, None], np.float32, iter, tuple, np.array])
def test_rewards_may_return_tensors_arrays_and_generators(kind):
    assert score("a", lambda p, r: kind([0.5, 2.0]), ["w1", "w2"], ["w3", "w4"]) == [0.5, 2.0]
    assert score("a", lambda p, r: [torch.tensor(1.0, requires_grad=True), np.int64(2)], [""] * 2, [""] * 2) == [1, 2]


def test_rewards_get_copies():
    def greedy(prompts, responses):
        prompts[0][0]["content"] = "gone"
        prompts.clear()
        responses.clear()
        return [1.0]

    greedy.reads_messages = True
    prompts, responses = [[{"role": "user", "content": "w1"}]], ["w2"]
    assert score("a", greedy, prompts, responses) == [1.0]
    assert (prompts, responses) == ([[{"role": "user", "content": "w1"}]], ["w2"])


def test_an_error_of_a_reward_names_it_and_keeps_its_traceback(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "dividing.py").write_text("def broken(prompts, responses):\n    return [1 / 0 for _ in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for reward in (RewardSource("dividing:broken"), RewardSource("dividing:broken", negate=True).load()):
        with pytest.raises(ZeroDivisionError) as error:
            run_sweep(tokenizer, [Run("base")], rewards={"helpful": reward})
        text = "".join(traceback.format_exception(error.value))
        assert "in broken" in text
        assert "This is from the reward 'helpful'." in text


def parm_runs(arm, weights=(0.0, 0.5, 1.0)):
    guided = lambda batch: PARM(tiny_llama(), arm, batch.preference, 0.5)  # noqa: E731
    return [Run("base"), *(Run("PARM", [w, 1 - w], guided) for w in weights)]


def run_sweep(tokenizer, runs, rewards=REWARDS, prompts=PROMPTS[:3], batch_size=2, **options):
    options = {"max_new_tokens": 6, **options}
    return sweep(tiny_llama(), tokenizer, list(prompts), runs, rewards, batch_size=batch_size, **options)


def texts(table) -> dict[tuple, str]:
    return {(row["method"], row["label"], row["prompt"]): row["response"] for row in table}


def test_sweep_and_summary(tokenizer):
    seen = []
    table = run_sweep(tokenizer, parm_runs(tiny_arm()), on_batch=seen.append, do_sample=True)
    assert len(table) == 4 * 3
    assert len(seen) == 4 * 2
    assert table["label"][3:12:3] == ["harmless", "uniform", "helpful"]
    assert table["preference"][0] is None
    assert table["preference"][3] == [0, 1]
    for row in table:
        assert row["helpful"] == -len(row["response"].split())
        assert 1 <= row["tokens"] <= 6
        assert row["seconds"] > 0
    summary = summarize(table, ["helpful", "harmless"])
    assert [cell["label"] for cell in summary] == ["-", "harmless", "uniform", "helpful"]
    first = table.select(range(3))["helpful"]
    assert (summary[0]["helpful"], summary[0]["helpful_error"]) == mean_and_error(first)
    assert summary[0]["helpful_low"] <= summary[0]["helpful"] <= summary[0]["helpful_high"]


def test_a_row_can_be_decoded_again_alone_from_its_seed(tokenizer):
    model = tiny_llama()
    row = run_sweep(tokenizer, [Run("base")], do_sample=True, temperature=0.7, top_k=9, top_p=0.9)[2]
    inputs = encode_prompts(tokenizer, [row["prompt"]])
    sampling = RowSampling([row["seed"]], inputs["input_ids"].shape[1], temperature=0.7, top_k=9, top_p=0.9)
    output = model.generate(**inputs, logits_processor=[sampling], do_sample=False, max_new_tokens=6)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == row["response"]
    assert len(new) == row["tokens"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_do_not_depend_on_batches(tokenizer, batch_size):
    runs = parm_runs(tiny_arm(), [0.3])
    one = run_sweep(tokenizer, runs, prompts=PROMPTS, batch_size=3, do_sample=True)
    other = run_sweep(tokenizer, runs, prompts=PROMPTS, batch_size=batch_size, do_sample=True)
    assert texts(one) == texts(other)
    assert len(set(one["response"])) > 5


@pytest.mark.skipif(before_5_24, reason="transformers' own penalty of repetition counts padding")
@pytest.mark.parametrize("seed", [0, 3])
def test_texts_do_not_depend_on_batches_where_a_penalty_reads_padding(tokenizer, seed):
    tokenizer.chat_template, tokenizer.pad_token = None, "<eos>"
    start = " ".join(f"w{i}" for i in range(1, 13))
    prompts = [start + end for end in (" w20", " w21 w22 w23", " w30 w31 w32 w33 w34 w35 w36")]
    settings = {"max_new_tokens": 20, "repetition_penalty": 1.3}
    found = [
        sweep(tiny_llama(seed), tokenizer, prompts, [Run("base")], REWARDS, batch_size=batch_size, **settings)
        for batch_size in (1, 3)
    ]
    assert found[0]["response"] == found[1]["response"]


def test_a_sweep_leaves_its_tokenizer_as_it_was(tokenizer):
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    table = run_sweep(tokenizer, [Run("base")], max_prompt_length=2)
    assert table["response"] == run_sweep(tiny_tokenizer(), [Run("base")], max_prompt_length=2)["response"]
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


def test_texts_do_not_depend_on_order_methods_or_other_prompts(tokenizer):
    arm = tiny_arm()
    whole = texts(run_sweep(tokenizer, parm_runs(arm), prompts=PROMPTS, do_sample=True))
    turned = run_sweep(tokenizer, parm_runs(arm)[::-1], prompts=PROMPTS[::-1], do_sample=True)
    assert texts(turned) == whole
    part = texts(run_sweep(tokenizer, parm_runs(arm)[1:2], prompts=PROMPTS[2:4], do_sample=True))
    assert part == {key: whole[key] for key in part}
    assert texts(run_sweep(tokenizer, parm_runs(arm), prompts=PROMPTS, do_sample=True, seed=1)) != whole


def test_one_noise_for_all_methods_and_another_for_each_prompt(tokenizer):
    """The same model under two names answers alike; one prompt's noise is not another's."""
    table = run_sweep(tokenizer, [Run("one"), Run("two")], prompts=PROMPTS, do_sample=True)
    assert table["response"][:5] == table["response"][5:]
    assert table["seed"][:5] == table["seed"][5:]
    assert len(set(table["seed"])) == 5
    scores = torch.zeros(2, 64)
    ids = torch.zeros(2, 3, dtype=torch.long)
    noise = RowSampling([1, 2], 3)(ids, scores)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(RowSampling([2, 1], 3)(ids, scores), noise.flip(0))
    assert not torch.equal(RowSampling([1, 2], 2)(ids, scores), noise)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_row_sampling_draws_from_the_distribution(settings):
    """3,000 prompts' first tokens against the softmax, cut as the setting says."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
    rows = 3000
    sampling = RowSampling([row_seed(0, f"prompt {i}") for i in range(rows)], 1, **settings)
    drawn = sampling(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1)).argmax(-1)
    p = torch.softmax(logits.double() / settings.get("temperature", 1.0), -1)
    if "top_k" in settings:
        p[3:] = 0
    if "top_p" in settings:  # the largest that reach 0.6 together: 0.54 + 0.20
        p[2:] = 0
    if "min_p" in settings:
        p[p < 0.2 * p.max()] = 0
    p = p / p.sum()
    counts = torch.bincount(drawn, minlength=6)
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], rows * p[p > 0]).pvalue > 0.01


def test_without_sampling_decoding_is_greedy_whatever_the_model_brings(tokenizer):
    model = tiny_llama()
    expected = run_sweep(tokenizer, [Run("base")])["response"]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    table = sweep(model, tokenizer, list(PROMPTS[:3]), [Run("base")], REWARDS, batch_size=2, max_new_tokens=6)
    assert table["response"] == expected


def test_conversations_and_templates_are_prompts_too(tokenizer):
    chat = [{"role": "user", "content": "w1 w2"}]
    longer = [*chat, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]
    table = run_sweep(tokenizer, [Run("base")], prompts=[chat, longer])
    assert table["prompt"] == [chat, longer]
    assert table["response"][0] == run_sweep(tokenizer, [Run("base")], prompts=["w1 w2"])["response"][0]
    ids = encode_prompts(tokenizer, ["w1"], template="w9 {prompt} w8")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["w9", "w1", "w8"]
    cut = encode_prompts(tokenizer, ["w1 w2 w3"], template="{prompt}", max_length=2)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(cut[0]) == ["w2", "w3"]
    with pytest.raises(ValueError, match="has 3 messages, which a text template can't tell apart"):
        encode_prompts(tokenizer, [longer], template="{prompt}")
    with pytest.raises(ValueError, match="has no {prompt}"):
        encode_prompts(tokenizer, ["w1"], template="w1")


def test_texts_are_filled_in_once():
    assert fill("USER: {prompt} ASSISTANT:{response}", prompt="a {response}", response="b") == (
        "USER: a {response} ASSISTANT:b"
    )
    assert as_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == (
        "Human: a\n\nAssistant: b"
    )


class Stop(Exception):
    pass


def stop_after(batches):
    """A callback that breaks a sweep off, as a kill does, after so many batches."""
    left = [batches]

    def on_batch(run):
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return on_batch


@pytest.mark.parametrize(("batches", "torn"), [(1, True), (2, False), (5, True)])
def test_a_killed_sweep_goes_on(tmp_path, tokenizer, batches, torn):
    """The same rows, byte for byte but for their times; finished work is not done again."""
    decoded = []

    def counting(prompts, responses):
        decoded.extend(responses)
        return brevity(prompts, responses)

    rewards = {"helpful": counting, "harmless": conciseness}
    runs = parm_runs(tiny_arm())
    whole = run_sweep(tokenizer, runs, path=tmp_path / "whole.jsonl", do_sample=True)
    path = tmp_path / "broken.jsonl"
    with pytest.raises(Stop):
        run_sweep(tokenizer, runs, path=path, do_sample=True, on_batch=stop_after(batches), rewards=rewards)
    if torn:
        path.write_bytes(path.read_bytes()[:-25])
    kept = path.read_bytes()
    decoded.clear()
    resumed = run_sweep(tokenizer, runs, path=path, do_sample=True, rewards=rewards)
    assert texts(resumed) == texts(whole)
    complete = kept[: kept.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(complete)
    assert len(decoded) == 12 - complete.count(b"\n")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len({(row["method"], row["label"], row["prompt"]) for row in rows}) == 12


def test_a_kill_within_a_restart_loses_no_row_that_stays(tmp_path, monkeypatch):
    path, growing = tmp_path / "link.jsonl", {"methods": "method"}
    path.symlink_to(tmp_path / "rows.jsonl")
    with Records(path, {"methods": {"a": 1, "b": 1}}, growing) as records:
        records.append([{"method": name, "n": n} for n in range(3) for name in "ab"])

    def killed(*_):
        raise KeyboardInterrupt

    changed = {"methods": {"a": 1, "b": 2}}
    with monkeypatch.context() as patch:
        patch.setattr(Records, "append", killed)
        patch.setattr(Records, "_write_configuration", killed)
        with pytest.raises(KeyboardInterrupt):
            Records(path, changed, growing, restart=True)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"method": "a", "n": n} for n in range(3)]
    with Records(path, changed, growing, restart=True) as records:
        records.append([{"method": "b", "n": 0}])
        with pytest.raises(ValueError, match="Another process is writing"):
            Records(path, changed, growing)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_rows_may_be_added_to_a_table(tmp_path, tokenizer):
    path, arm = tmp_path / "results.jsonl", tiny_arm()
    methods = {"PARM": {"beta": 0.5}}
    run_sweep(tokenizer, parm_runs(arm)[:2], path=path, configuration={"methods": methods})
    before = path.read_bytes()
    more = {"methods": {**methods, "other": {"beta": 1.0}}}
    table = run_sweep(tokenizer, parm_runs(arm), prompts=PROMPTS, path=path, configuration=more)
    assert path.read_bytes().startswith(before)
    assert len(table) == 4 * 5
    assert list(table["prompt"][:5]) == list(PROMPTS)
    back = run_sweep(tokenizer, [Run("base")], path=path, configuration={"methods": {}})
    assert len(back) == 3
    assert set(json.loads((tmp_path / "results.config.json").read_text())["methods"]) == {"PARM", "other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, but is 1"),
        ({"max_new_tokens": 7}, "generation max_new_tokens was 6, but is 7"),
        ({"do_sample": True}, "sampling was None, but is {}"),
        ({"configuration": {"methods": {"PARM": {"beta": 2.0}}}}, "methods PARM beta was 0.5, but is 2.0"),
    ],
)
def test_a_file_of_another_configuration_is_refused(tmp_path, tokenizer, change, message):
    options = {"path": tmp_path / "results.jsonl", "configuration": {"methods": {"PARM": {"beta": 0.5}}}}
    run_sweep(tokenizer, [Run("base")], **options)
    before = options["path"].read_bytes()
    with pytest.raises(ValueError, match=message):
        run_sweep(tokenizer, [Run("base")], **{**options, **change})
    assert options["path"].read_bytes() == before


NEEDED = ("method", "preference", "prompt", "helpful", "response", "tokens", "seconds", "seed")


def without(name):
    return lambda row: {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row: "garbage", "Line 1 of .* is not a row in JSON"),
        (lambda row: '{"method": "base", "pref', "Line 1 of .* is not a row in JSON"),
        (lambda row: json.dumps(row).replace("-", "NaN #"), "Line 1 of .* is not a row in JSON"),
        (lambda row: json.dumps({**row, "helpful": float("nan")}), "Line 1 of .* is not a row in JSON"),
        (lambda row: json.dumps(row) + "\n" + json.dumps(row), "Lines 1 and 2 of .* are of the same run and prompt"),
        *(
            (without(name), f"Line 1 of .* it has no '{name}'")
            for name in ("method", "preference", "prompt", "helpful")
        ),
        *((without(name), f"Line 1 of .* it has no '{name}'") for name in ("response", "tokens", "seconds", "seed")),
        (lambda row: {**row, "helpful": None}, "its 'helpful' is None, no finite number"),
        (lambda row: {**row, "helpful": "good"}, "its 'helpful' is 'good', no finite number"),
        (lambda row: {**row, "preference": "uniform"}, "its preference is 'uniform'"),
        (lambda row: {**row, "method": 3}, "its method is 3"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, tokenizer, edit, message):
    """By what goes on with them, by what scores them again, and, where it needs them, by what measures them."""
    path = tmp_path / "results.jsonl"
    run_sweep(tokenizer, [Run("base")], path=path)
    first, rest = path.read_text().split("\n", 1)
    edited = edit(json.loads(first))
    path.write_text((edited if isinstance(edited, str) else json.dumps(edited)) + "\n" + rest)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run_sweep(tokenizer, [Run("base")], path=path)
    assert path.read_bytes() == before
    if "seed" not in message and "response" not in message:
        with pytest.raises(ValueError, match="twice for|lacks the columns|is none: its|not a row in JSON"):
            arrange(read_rows(path), list(REWARDS))
    if not any(name in message for name in ("helpful", "tokens", "seconds", "seed")):
        with pytest.raises(ValueError, match=message):
            rescore(path, REWARDS, tmp_path / "other.jsonl")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Records(path, {"seed": 0}) as records:
        records.append([{"a": 1}, {"a": 2}])
        with pytest.raises(ValueError, match="Another process is writing"):
            Records(path, {"seed": 0})
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    shutil.copy(path, tmp_path / "alone.jsonl")
    with pytest.raises(ValueError, match="alone.config.json, which says of what configuration"):
        Records(tmp_path / "alone.jsonl", {"seed": 0})
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    for read in (lambda: Records(path, {"seed": 0}), lambda: read_rows(path)):
        with pytest.raises(ValueError, match=r"Line 2 of .*rows.jsonl is not a row in JSON"):
            read()
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    with pytest.raises(ValueError, match="There are no results at"):
        read_rows(tmp_path / "nowhere.jsonl")
    path.write_text('{"a": 1')
    with pytest.raises(ValueError, match="has no complete row"):
        read_rows(path)


NO_ROWS = {
    "a note": ("notes", "mine"),
    "a note of two lines": ("notes", "mine\nmine"),
    "rows of somebody": ("notes.jsonl", '{"prompt": "mine"}\n'),
    "a row without its end": ("notes.jsonl", '{"prompt": "mine"}'),
    "a configuration of somebody": ("notes.config.json", '{"mine": 1}'),
    "a list": ("notes.config.json", "[1]"),
    "no JSON": ("notes.config.json", "mine"),
}


@pytest.mark.parametrize(("name", "text"), NO_ROWS.values(), ids=NO_ROWS.keys())
def test_files_of_somebody_stay_as_they_are(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="move that file away|is not a row in JSON"):
        Records(tmp_path / (name if "config" not in name else "notes.jsonl"), {"seed": 0})
    assert (tmp_path / name).read_text() == text


def test_what_somebody_has_added_to_rows_stays(tmp_path):
    with Records(tmp_path / "rows.jsonl", {"seed": 0}) as records:
        records.append([{"a": 1}])
    for added in ("mine", "mine\n"):
        whole = (tmp_path / "rows.jsonl").read_text()
        (tmp_path / "rows.jsonl").write_text(whole + added)
        with pytest.raises(ValueError, match="Line 2 of .* is not a row in JSON"):
            Records(tmp_path / "rows.jsonl", {"seed": 0})
        assert (tmp_path / "rows.jsonl").read_text() == whole + added
        (tmp_path / "rows.jsonl").write_text(whole)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("torn", ['{"a": "', '{"a"\0\0\0', "\0\0"])
def test_rows_that_a_kill_has_torn_are_dropped(tmp_path, rows, torn):
    with Records(tmp_path / "rows.jsonl", {"seed": 0}) as records:
        records.append([{"a": 1}] * rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(torn)
    with Records(tmp_path / "rows.jsonl", {"seed": 0}) as records:
        records.append([{"a": 2}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}] * rows + [{"a": 2}]


def test_two_files_of_rows_never_share_a_configuration(tmp_path):
    for i, name in enumerate(("rows.jsonl", "rows.v1", "rows.v2", "rows")):
        with Records(tmp_path / name, {"seed": i}) as records:
            records.append([{"a": i}])
    assert len(list(tmp_path.glob("*.config.json"))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, "`prompts` is empty"),
        ({"prompts": ("w1", "w2", "w1")}, "The prompt 'w1' is given twice"),
        ({"runs": [Run("base"), Run("base")]}, "'base' is given twice at the preference None"),
        ({"runs": [Run("PARM", [0.5, 0.6])]}, "the weights must sum to 1"),
        ({"rewards": {"bad": lambda p, r: [float("nan")] * len(r)}}, "The reward 'bad' returned nan for the response"),
        ({"rewards": {"bad": lambda p, r: [1.0]}}, "'bad' returned 1 numbers for 2 responses"),
        ({"rewards": {"bad": lambda p, r: [None] * len(r)}}, "'bad' returned None for the response"),
        ({"rewards": {"bad": lambda p, r: ["1.0"] * len(r)}}, "'bad' returned '1.0' for the response"),
        ({"rewards": {"bad": lambda p, r: torch.zeros(len(r), 2)}}, r"'bad' returned \[0.0, 0.0\] for the response"),
        ({"rewards": {"bad": lambda p, r: None}}, "'bad' returned None. It must return one number"),
        ({"rewards": {"bad": lambda p, r: dict(zip(r, r))}}, "'bad' returned {"),
        ({"rewards": {"bad": lambda p, r: 1.0}}, "'bad' returned 1.0. It must return one number"),
        ({"rewards": {"tokens": brevity}}, "called 'tokens', which is a column"),
        ({"rewards": {"a": brevity, "a_low": brevity}}, "called 'a_low', which is a column of the objective 'a'"),
        ({"rewards": {1: brevity}}, "must be a list of one or more non-empty names"),
        (
            {"rewards": {"α a": brevity, "a": brevity}},
            "called 'α a', which is a column of the objective 'α a' already",
        ),
        ({"runs": [Run(2)]}, "The name of a method is 2, but it must be a text"),
        ({"runs": [Run("a\nb")]}, "The name of a method is 'a.nb'"),
        ({"runs": [Run(" ")]}, "The name of a method is ' '"),
        ({"temperature": 0.7}, "temperature act on sampling only"),
        ({"num_beams": 2}, "num_beams can't be used here"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_bad_sweeps(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(tokenizer, **{"runs": [Run("base")], **options})
