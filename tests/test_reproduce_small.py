# SPDX-License-Identifier: Apache-2.0
"""The small comparison: that every configuration gets what was chosen, and that its page says what its tables say."""

import itertools
import json

import pytest
import reproduce_small as comparison
import results_page
import yaml


SETTINGS = {
    "parm": {"rate": 0.01, "beta": 2.0},
    "svd_lora": {"rate": 0.002, "beta": 0.5},
    "uniarm": {"rate": 0.002, "beta": 1.0},
    "genarm": {"rate": 0.002, "beta": 0.5},
    "rewarded_soups": {"rate": 0.01},
    "mod": {"rate": 0.002},
}


def texts_in(value):
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_in(one)
    elif isinstance(value, str):
        yield value


def test_every_method_trains_on_as_many_pairs():
    pairs = {}
    for name in comparison.REWARD_MODELS + comparison.POLICIES:
        config = yaml.safe_load((comparison.CONFIGS / f"{name}.yaml").read_text())
        method = name.removesuffix("_positive").removesuffix("_concise")
        pairs[method] = pairs.get(method, 0) + config["max_steps"] * config["per_device_train_batch_size"]
    assert pairs == dict.fromkeys(["parm", "svd_lora", "uniarm", "genarm", "dpo"], 400)


@pytest.mark.parametrize("name", ["evaluate", "evaluate_transfer_q"])
def test_every_method_is_evaluated_with_its_own_settings(tmp_path, monkeypatch, name):
    monkeypatch.setattr(comparison, "written", lambda config, name: config)
    config = comparison.with_settings(comparison.CONFIGS / f"{name}.yaml", SETTINGS)
    trained = {
        str(comparison.FOLDER / f"{one}-{rate:g}"): rate
        for one in comparison.REWARD_MODELS + comparison.POLICIES
        for rate in comparison.LEARNING_RATES
    }
    seen = set()
    for entry in config["methods"][1:]:
        setting = SETTINGS.get(comparison.SETTINGS_OF.get(entry["method"], entry["method"]), {})
        folders = [text for text in texts_in(entry) if text.startswith(str(comparison.FOLDER))]
        assert [trained[folder] for folder in folders] == [setting.get("rate")] * len(folders)
        assert entry.get("beta") == setting.get("beta") or entry["method"] == "transfer_q"
        seen.add(entry["method"])
    assert {"parm", "genarm", "args"} <= seen
    assert config["output_dir"] == yaml.safe_load((comparison.CONFIGS / f"{name}.yaml").read_text())["output_dir"]


def test_settings_are_those_of_the_largest_validation_hypervolume(tmp_path, monkeypatch):
    """Rewards at which one setting of each method is above all others."""
    best = {"parm rate 0.01 beta 2", "svd_lora rate 0.002 beta 0.5", "uniarm rate 0.002 beta 1"}
    best |= {"genarm rate 0.002 beta 0.5", "rewarded_soups rate 0.01", "mod rate 0.002"}
    asked = []

    def evaluated(*words):
        asked.extend(entry["name"] for entry in yaml.safe_load(words[-1].read_text())["methods"])

    def rows(path):
        for name in asked:
            reward = 0.9 if name in best else 0.1
            yield {
                "method": name,
                "preference": [0.5, 0.5],
                "label": "uniform",
                "prompt": "p",
                "positive": reward,
                "concise": -20.0,
            }

    monkeypatch.setattr(comparison, "FOLDER", tmp_path)
    monkeypatch.setattr(comparison, "run", evaluated)
    monkeypatch.setattr(comparison, "read_rows", lambda path: list(rows(path)))
    assert comparison.choose_settings() == SETTINGS
    assert len(asked) == len(set(asked)) == 4 * 3 * 3 + 2 * 3


def test_findings_follow_the_intervals():
    def row(method, value, low, high):
        return {
            "method": method, "minus": "PARM", "measure": "hypervolume", "reference": "a 0, b 0", "value": str(value),
            "low": str(low), "high": str(high), "differs": str(not low <= 0 <= high),
        }  # fmt: skip

    rows = [row("Base", -2.0, -3.0, -1.0), row("MOD", 0.5, -1.0, 2.0), row("GenARM", 3.0, 1.0, 5.0)]
    (line,) = results_page.findings(rows)
    assert "lower: Base (-2.00 [-3.00, -1.00])" in line
    assert "not told apart: MOD (+0.50 [-1.00, 2.00])" in line
    assert "higher: GenARM (+3.00 [1.00, 5.00])" in line


def test_what_is_steered_follows_the_correlations():
    rows = [
        {"method": "MOD", "a": "0.8999999999999999", "b": "1.0"}, {"method": "ARGS", "a": "0.3", "b": "1.0"},
        {"method": "PARM", "a": "1.0", "b": "1.0"}, {"method": "UniARM", "a": "-1.0", "b": "0.8"},
    ]  # fmt: skip
    assert results_page.steering(rows).endswith("5 of 120 orders: a and b: MOD, PARM; b: ARGS; none: UniARM.")


def test_what_counts_as_steered_is_rare_by_chance():
    orders = list(itertools.permutations(range(5)))
    reached = [
        1 - 6 * sum((i - j) ** 2 for i, j in enumerate(order)) / 120 > results_page.STEERED - 1e-6 for order in orders
    ]
    assert (sum(reached), len(orders)) == (5, 120)


def test_validation_prompts_are_neither_trained_on_nor_evaluated(tmp_path, monkeypatch):
    pairs = comparison.read_rows(comparison.DATA / "pairs.jsonl")
    trained = [row["prompt"] for row in pairs if row["split"] == "train"]
    (tmp_path / "pairs").mkdir()
    held_out = [json.dumps({"prompt": trained[0]}) + "\n", json.dumps({"prompt": trained[-1]}) + "\n"]
    (tmp_path / "pairs" / "test.jsonl").write_text("".join(held_out))
    monkeypatch.setattr(comparison, "FOLDER", tmp_path)
    comparison.write_validation_prompts(tmp_path / "prompts.jsonl")
    prompts = [row["prompt"] for row in comparison.read_rows(tmp_path / "prompts.jsonl")]
    assert prompts[:2] == [trained[0], trained[-1]]
    assert len(prompts) == 2 + 21
    assert not any(row["prompt"] in prompts[2:] for row in pairs)
    topics = {topic for topic in (comparison.DATA / "topics.txt").read_text().splitlines()
              if any(topic in row["prompt"][0]["content"] for row in pairs if row["split"] == "test")}  # fmt: skip
    assert not any(topic in prompt[0]["content"] for topic in topics for prompt in prompts[2:])
