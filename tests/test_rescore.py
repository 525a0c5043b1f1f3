# SPDX-License-Identifier: Apache-2.0
"""Other rewards for stored responses: the rows of an evaluation with these rewards from the start."""

import csv
import json

import pytest
from conftest import tiny_arm, tiny_llama

from trl_parm.cli.main import main
from trl_parm.decoding import PARM
from trl_parm.evaluation import Run, rescore, sweep
from trl_parm.records import read_rows
from trl_parm.rewards import brevity, conciseness


PROMPTS = ["w1 w2", "w3", "w4 w5 w6"]


def letters(prompts, responses):
    return [float(len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]


FIRST = {"helpful": brevity, "harmless": conciseness}
SECOND = {"helpful": letters, "harmless": conciseness}


def evaluated(tokenizer, path, rewards=FIRST):
    base, arm = tiny_llama(), tiny_arm()
    runs = [Run("Base"), *(Run("PARM", [w, 1 - w], lambda b: PARM(base, arm, b.preference, 0.5)) for w in (0.0, 1.0))]
    sweep(base, tokenizer, PROMPTS, runs, rewards, path=path, do_sample=True, max_new_tokens=6)
    return path


def timeless(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(path)]


def configuration(path):
    return json.loads(path.with_suffix(".config.json").read_text())


@pytest.mark.parametrize("given", [SECOND, {"helpful": letters}])
def test_it_equals_an_evaluation_with_these_rewards(tmp_path, tokenizer, given):
    """In rows, their columns and order, and in its configuration but for what says that it was rescored."""
    old = evaluated(tokenizer, tmp_path / "old.jsonl")
    before = old.read_bytes()
    table = rescore(old, given, tmp_path / "new.jsonl", batch_size=2)
    expected = evaluated(tokenizer, tmp_path / "expected.jsonl", SECOND)
    assert timeless(tmp_path / "new.jsonl") == timeless(expected)
    assert [list(row) for row in read_rows(tmp_path / "new.jsonl")] == [list(row) for row in read_rows(expected)]
    assert table.to_list() == read_rows(tmp_path / "new.jsonl")
    found = configuration(tmp_path / "new.jsonl")
    assert found.pop("rescored")["rewards"] == list(given)
    assert found == configuration(expected)
    assert old.read_bytes() == before


def test_a_killed_one_goes_on_and_another_is_refused(tmp_path, tokenizer):
    old, new, asked = evaluated(tokenizer, tmp_path / "old.jsonl"), tmp_path / "new.jsonl", []

    def counted(prompts, responses):
        asked.extend(responses)
        return letters(prompts, responses)

    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescore(old, {"helpful": counted}, new, batch_size=4, on_batch=stop)
    rescore(old, {"helpful": counted}, new, batch_size=4)
    assert len(asked) == 9
    with pytest.raises(ValueError, match="belongs to another configuration: rescored rewards was"):
        rescore(old, {"harmless": counted}, new)
    with pytest.raises(ValueError, match="rewards helpful function was"):
        rescore(old, {"helpful": brevity}, new)
    old.write_text("\n".join(old.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match="rescored rows was"):
        rescore(old, {"helpful": counted}, new)
    assert len(rescore(old, {"helpful": counted}, new, restart=True)) == 8


def test_plot_reads_it_with_further_rewards_too(tmp_path, tokenizer, capsys):
    old = evaluated(tokenizer, tmp_path / "old.jsonl")
    new, rewards = str(tmp_path / "new.jsonl"), '{"length": "test_rescore:letters"}'
    assert main(["rescore", "--results", str(old), "--rewards", rewards, "--output", new]) == 0
    assert "9 responses with the rewards length" in capsys.readouterr().out
    assert list(read_rows(new)[0]) == [*list(read_rows(old)[0])[:7], "length", *list(read_rows(old)[0])[7:]]
    values = {}
    for name, objectives in (("two", []), ("three", ["--objectives", "helpful", "harmless", "length"])):
        folder = str(tmp_path / name)
        assert main(["plot", "--results", new, "--output_dir", folder, "--resamples", "10", *objectives]) == 0
        with open(tmp_path / name / "measures.csv") as file:
            values[name] = [row["value"] for row in csv.DictReader(file) if row["measure"] == "mean inner product"]
        assert (tmp_path / name / "fronts.csv").is_file() or (tmp_path / name / "fronts_pairs.csv").is_file()
    assert values["two"] == values["three"] != []  # of a further reward the weight is 0
    assert (tmp_path / "new.run.yaml").is_file()


def test_responses_that_nobody_has_scored(tmp_path, tokenizer):
    """As `trl-parm generate --output` writes them."""
    none = evaluated(tokenizer, tmp_path / "none.jsonl", dict.fromkeys(FIRST))
    rescore(none, FIRST, tmp_path / "new.jsonl")
    assert timeless(tmp_path / "new.jsonl") == timeless(evaluated(tokenizer, tmp_path / "expected.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "old.jsonl"}, "is what is read. Name another file"),
        ({"rewards": {}}, "There are no rewards"),
        ({"rewards": {"tokens": brevity}}, "called 'tokens', which is a column"),
        ({"rewards": {"helpful_low": brevity}}, "called 'helpful_low', which is a column of the objective 'helpful'"),
        ({"rewards": {"helpful": lambda p, r: [None] * len(r)}}, "returned None"),
        ({"results": "nowhere.jsonl"}, "There are no results at"),
        ({"results": "alone.jsonl"}, "alone.config.json, which says what .* is, is missing"),
    ],
)
def test_what_is_refused(tmp_path, tokenizer, change, message):
    old = evaluated(tokenizer, tmp_path / "old.jsonl")
    (tmp_path / "alone.jsonl").write_bytes(old.read_bytes())
    call = {"results": "old.jsonl", "rewards": SECOND, "output": "new.jsonl", **change}
    before = old.read_bytes()
    with pytest.raises(ValueError, match=message):
        rescore(tmp_path / call["results"], call["rewards"], tmp_path / call["output"])
    assert old.read_bytes() == before


def test_the_command_shows_where_a_reward_failed(tmp_path, tokenizer, monkeypatch):
    """A mistake in a user's function is no bad input, which would end in one line."""
    old = evaluated(tokenizer, tmp_path / "old.jsonl")
    (tmp_path / "parsing.py").write_text("def broken(prompts, responses):\n    return [int('x')]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="invalid literal") as error:
        main(
            ["rescore", "--results", str(old), "--rewards", '{"helpful": "parsing:broken"}', "--output", f"{old}.new"]
        )
    assert error.value.__notes__ == ["This is from the reward 'helpful'."]
    assert error.traceback[-1].name == "broken"


@pytest.mark.parametrize("text", ["garbage", "[1]", '{"seed": 1}', '{"objectives": "helpful"}'])
def test_a_damaged_configuration_is_refused_by_all_that_read_it(tmp_path, tokenizer, capsys, text):
    old = evaluated(tokenizer, tmp_path / "old.jsonl")
    (tmp_path / "old.config.json").write_text(text)
    with pytest.raises(ValueError, match="is missing or no configuration of results"):
        rescore(old, FIRST, tmp_path / "new.jsonl")
    assert main(["plot", "--results", str(old), "--output_dir", str(tmp_path / "figures")]) == 2
    assert "no configuration of results" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not the configuration of any rows|belongs to another configuration"):
        evaluated(tokenizer, old)


def test_prompts_may_have_messages_of_several_shapes(tmp_path):
    """Of one the content is a text, of the other a list of parts."""
    contents = ["w1", [{"type": "text", "text": "w2"}]]
    old = tmp_path / "old.jsonl"
    rows = [{**row, "prompt": [{"role": "user", "content": content}]} for row, content in zip(answered(), contents)]
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    old.with_suffix(".config.json").write_text('{"objectives": [], "rewards": {}}')
    table = rescore(old, {"short": brevity}, tmp_path / "new.jsonl")
    assert [row["prompt"][0]["content"] for row in table] == contents
    assert [row["short"] for row in table] == brevity(["", ""], [row["response"] for row in rows])


def answered():
    """Two rows of an evaluation."""
    common = {"method": "Base", "preference": None, "label": "-", "tokens": 1, "seconds": 0.1, "seed": 0}
    costs = {"extra_parameters": 0, "extra_bytes": 0, "capped": False, "log_prob_base": -1.0, "log_ratio": 0.0}
    return [{**common, "prompt": "", "response": response, **costs} for response in (" w3", " w4 w5")]
