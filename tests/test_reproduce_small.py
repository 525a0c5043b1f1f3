# SPDX-License-Identifier: Apache-2.0
"""The small comparison: its command from training to the page, pieces that were stopped, and what the page says."""

import gzip
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reproduce_small as command
import results_page
import torch
import yaml
from comparison import piece as pieces_of
from comparison.field import FIELD, beyond_table, field_pieces, read_field
from comparison.figures import means
from comparison.methods import BASE, METHODS, decode
from comparison.pooled import ABOVE_ZERO, GENARM, PARM, PRODUCT, SHUFFLED, Budget, permuted
from comparison.results import OF_KINDS, facts_path, join_pieces, read_facts, read_piece, rows_path, write_piece
from comparison.settings import BETA, SCALE, Settings, at_edge, best, next_of
from comparison.statements import at_policies_kl, edges, repetition, statements
from comparison.task import KINDS, Task, agreement
from comparison.training import Training, join_loras
from peft import AutoPeftModelForCausalLM
from small_task import FACTS, GRID, OBJECTIVES, write_results, write_settings, write_task
from transformers import AutoTokenizer

from peft_pblora.output import NOTES
from trl_parm.evaluation import arrange, bootstrap
from trl_parm.records import Records


def read(results: Path, planned=(0, 1, 2), **options) -> Budget:
    budget = Budget.read(results, 4, planned, **{"resamples": 50, **options})
    assert budget is not None
    return budget


def run(folder: Path, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(command, "CONFIGS", folder / "tasks")
    command.main(["--results", str(folder / "results"), "--work", str(folder / "work"), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole command on a tiny model, stopped in the middle of its piece's trainings and of its answers."""
    folder = tmp_path_factory.mktemp("comparison")
    write_task(folder, field=[4, 0], descriptions={"early": "w1 w2 w3", "short": "w4"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results_page, "write_page", lambda *paths: None)
        run(folder, patch, "--only", "tiny/settings")
        stop_at(patch, Training, "_train", 3)
        with pytest.raises(KeyboardInterrupt):
            run(folder, patch)
    trained = modified(folder / "work" / "tiny" / "4-seed0")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, pieces_of, "write_piece", 0)
        with pytest.raises(KeyboardInterrupt):
            run(folder, patch)
    with pytest.MonkeyPatch.context() as patch:
        run(folder, patch)
    return folder, trained


def stop_at(patch, owner, name: str, number: int) -> None:
    """Lets a function be called so often, and then stops as ^C does."""
    kept, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) > number:
            raise KeyboardInterrupt
        return kept(*args, **kwargs)

    patch.setattr(owner, name, stopping)


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")}


def test_the_whole_command_leaves_a_table_and_a_page(finished):
    folder, _ = finished
    rows = read_piece(rows_path(folder / "results" / "tiny", 4, 0))
    assert len(rows) == 4 * (2 + 3 * len({row["method"] for row in rows[8:]}))
    assert {method.title for method in METHODS.values()} <= {row["method"] for row in rows}
    page = (folder / "work" / "page" / "results.md").read_text()
    assert "## Tiny" in page
    assert "One seed of training" in page
    assert (folder / "work" / "page" / "images" / "results_tiny_4.png").exists()


def test_the_rest_of_the_field_is_beside_what_it_is_compared_with(finished):
    folder, _ = finished
    results = folder / "results" / "tiny"
    task = Task.read(folder / "tasks" / "tiny.yaml")
    field, beyond = read_field(results, task, read(results, [0]))
    assert set(field.fronts) == {*(m.title for m in FIELD.values()), BASE, PARM, GENARM, SHUFFLED}
    assert len(beyond) == 2 * 2 * 4
    assert {tuple(row["preference"]) for row in beyond} == {(1.5, -0.5), (-0.5, 1.5)}
    worst = [row for row in field.rows if row["method"] == "Worst case of PARM"]
    assert [row["preference"] for row in worst] == [None] * 4
    text = " ".join((folder / "work" / "page" / "results.md").read_text().split())
    assert "Tiny: the rest of the field, 4 steps, training seed 0" in text
    assert "spread beyond / between vertices" in text


@pytest.mark.parametrize("change", ["pairs", "scale", "betas"])
def test_a_field_of_another_comparison_is_refused(finished, tmp_path, change):
    folder, _ = finished
    results = Path(shutil.copytree(folder / "results" / "tiny", tmp_path / "tiny"))
    task = Task.read(folder / "tasks" / "tiny.yaml")
    path = facts_path(rows_path(results, 4, 0, "field"))
    facts = read_facts(rows_path(results, 4, 0, "field"))
    if change == "pairs":
        facts["pairs"] = "f" * 16
    elif change == "scale":
        facts["trained"]["genarm"]["scale"] = 64.0
    else:
        facts["betas"]["worst_parm"] = 0.25
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="other pairs, prompts or settings than the seed 0"):
        read_field(results, task, read(results, [0]))


def test_how_much_answers_repeat_themselves_is_told_with_the_worst_preference(tmp_path):
    write_results(tmp_path, [0])
    budget = read(tmp_path, [0])
    for row in budget.rows:
        name, at = budget.names[row["method"]], row["label"]
        row["repetition"] = {"short": 0.5, "early": 0.1}.get(at) if name == PARM else 0.0 if name == GENARM else None
    said = repetition(budget)
    assert said.startswith(
        "**Repeated 4-grams**, their mean share in an answer: PARM 30.0%, at short 50.0%; GenARM 0.0%, at "
    )
    assert said in statements(budget)
    cells = {row["method"]: row["repeated 4-grams"] for row in results_page.answers_table(budget)}
    assert (cells[PARM], cells[GENARM], cells[BASE]) == ("30.0%", "0.0%", None)


def test_how_much_further_apart_rewards_are_beyond_the_simplex():
    values = {(1.0, 0.0): (3, 1), (0.5, 0.5): (9, 9), (0.0, 1.0): (1, 1), (1.5, -0.5): (4, 1), (-0.5, 1.5): (-1, 0)}
    rows = [
        {"method": name, "preference": list(α), "early": early + extra, "short": short + extra}
        for name in (PARM, GENARM)
        for α, (early, short) in values.items()
        for extra in (-1, 1)
    ]
    inside, beyond = ([row for row in rows if (min(row["preference"]) >= 0) is wanted] for wanted in (True, False))
    field = SimpleNamespace(rows=inside, names={PARM: PARM, GENARM: GENARM}, objectives=OBJECTIVES)
    assert beyond_table(field, beyond)[:5] == [
        {"method": PARM, "α": "1.5 -0.5", "early": "4.00", "short": "1.00"},
        {"method": PARM, "α": "1 0", "early": "3.00", "short": "1.00"},
        {"method": PARM, "α": "0 1", "early": "1.00", "short": "1.00"},
        {"method": PARM, "α": "-0.5 1.5", "early": "-1.00", "short": "0.00"},
        {"method": PARM, "α": "spread beyond / between vertices", "early": "2.50", "short": "—"},
    ]


def test_what_was_trained_before_a_stop_is_kept(finished):
    folder, trained = finished
    assert len(trained) == 3
    now = modified(folder / "work" / "tiny" / "4-seed0")
    assert trained.items() <= now.items()
    assert len(now) == 3 + 2 * 2 + 1 + 1 + 2  # the disjoint start, GenARM's LoRAs as one, those of the field


def test_a_stopped_comparison_gives_what_one_run_gives(finished, tmp_path, monkeypatch):
    folder, _ = finished
    task = Task.read(folder / "tasks" / "tiny.yaml")
    settings = Settings(task, 2, folder / "results" / "tiny", folder / "work" / "tiny")
    for number, kind in enumerate(reversed(KINDS)):  # the order of the kinds is nothing to the table
        assert len(list(tmp_path.glob("4-seed0-*.json"))) == number
        pieces_of.compare(task, 4, 0, kind, settings, tmp_path, tmp_path / "work")
    assert {path.name for path in tmp_path.glob("4-*")} == {"4-seed0.csv.gz", "4-seed0.json"}
    own, other = (read_facts(rows_path(one, 4, 0)) for one in (tmp_path, folder / "results" / "tiny"))
    assert own.keys() == other.keys()
    assert [list(own[key]) for key in OF_KINDS] == [list(other[key]) for key in OF_KINDS]
    once, stopped = (read_piece(rows_path(one, 4, 0)) for one in (tmp_path, folder / "results" / "tiny"))
    assert [without_time(row) for row in once] == [without_time(row) for row in stopped]


def test_a_kind_that_comes_later_joins_the_table(finished, tmp_path, monkeypatch):
    folder, _ = finished
    task, work = Task.read(folder / "tasks" / "tiny.yaml"), folder / "work" / "tiny"
    settings, path = Settings(task, 2, folder / "results" / "tiny", work), rows_path(tmp_path, 4, 0)
    for kind in KINDS[:-1]:
        pieces_of.compare(replace(task, kinds=KINDS[:-1]), 4, 0, kind, settings, tmp_path, work)
    assert Budget.read(tmp_path, 4, [0]).kinds == list(KINDS[:-1])
    before, part = facts_path(path).read_bytes(), rows_path(tmp_path, 4, 0, KINDS[-1])
    with monkeypatch.context() as patch:
        patch.setattr(pieces_of, "join_pieces", lambda *paths: None)
        pieces_of.compare(task, 4, 0, KINDS[-1], settings, tmp_path, work)
    kept = {file: file.read_bytes() for file in (part, facts_path(part))}
    pieces_of.compare(task, 4, 0, KINDS[-1], settings, tmp_path, work)
    whole = [without_time(row) for row in read_piece(path)]
    expected = rows_path(folder / "results" / "tiny", 4, 0)
    assert whole == [without_time(row) for row in read_piece(expected)]
    for file, content in {**kept, facts_path(path): before}.items():  # as a stop between the two files leaves them
        file.write_bytes(content)
    pieces_of.compare(task, 4, 0, KINDS[-1], settings, tmp_path, work)
    assert [without_time(row) for row in read_piece(path)] == whole
    assert read_facts(path) == read_facts(expected)
    assert {file.name for file in tmp_path.glob("4-*")} == {"4-seed0.csv.gz", "4-seed0.json"}


def test_tables_of_different_runs_are_not_put_together(tmp_path):
    parts = [rows_path(tmp_path, 4, 0, kind) for kind in ("parm", "dpo")]
    for part, pairs in zip(parts, "pq"):
        facts = {"objectives": OBJECTIVES, "pairs": pairs, "versions": {"torch": pairs}}
        write_piece(part, [], {**facts, "trained": {}, "betas": {}, "matched": {}})
    with pytest.raises(ValueError, match="4-seed0-parm.csv.gz and 4-seed0-dpo.csv.gz have different pairs"):
        join_pieces(rows_path(tmp_path, 4, 0), parts)
    assert len(list(tmp_path.glob("4-seed0-*.csv.gz"))) == 2


def without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_finished_piece_is_not_done_again(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(Training, "run", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(results_page, "write_page", lambda *paths: None)
    run(folder, monkeypatch)


def test_tables_of_another_model_or_of_other_pairs_are_refused(finished, monkeypatch):
    """A run that finds another's tables must not take them for its own."""
    folder, _ = finished
    results, work = folder / "results", folder / "work"
    monkeypatch.setattr(Training, "run", lambda self: pytest.fail("trained"))
    other = Task.read(folder / "tasks" / "tiny.yaml", model=str(folder / "another"))
    every = [*pieces_of.pieces(other, results, work), *field_pieces(other, results, work)]
    for piece in every:
        if "/settings/" not in piece.name and "/field/scale" not in piece.name:
            with pytest.raises(ValueError, match="model .*another"):
                piece.run()
    with pytest.raises(ValueError, match="model was model, but is another.*Here `--results` names the output"):
        every[0].run()
    pairs = folder / "other.jsonl"
    pairs.write_text(Path(other.pairs).read_text().replace("w7", "w8"))
    task = Task.read(folder / "tasks" / "tiny.yaml", pairs=str(pairs))
    with pytest.raises(ValueError, match="4-seed0.csv.gz has the pairs .* Name another folder with `--results`"):
        next(piece for piece in pieces_of.pieces(task, results, work) if piece.name == "tiny/4/0/parm").run()


def test_a_run_keeps_its_tables_apart_from_the_published_ones():
    assert command.parse([]).results == command.parse(["--list"]).results == Path("runs/small/results")
    assert command.parse(["--page"]).results == command.PUBLISHED
    assert command.parse(["--page", "--results", "mine"]).results == Path("mine")
    assert (command.PUBLISHED / "stories").is_dir()


def test_a_permuted_preference_is_that_of_the_reversed_front(finished, tmp_path):
    """The twin: every answer decoded with the permuted α."""
    folder, _ = finished
    task = Task.read(folder / "tasks" / "tiny.yaml")
    arm = str(folder / "work" / "tiny" / "4-seed0" / "parm")
    entries = ["base", *({"method": method, "arm": arm, "beta": 0.1} for method in ("parm", "parm_shuffled"))]
    rows = decode(task, task.prompts("test", 4), GRID, entries, tmp_path / "answers.jsonl")
    _, own, twin = arrange(rows, OBJECTIVES)
    found = permuted(own)
    assert not np.array_equal(own.runs, twin.runs)
    assert np.array_equal(found.runs, twin.runs)


def test_every_method_trains_on_as_many_pairs(tmp_path, monkeypatch):
    task = Task.read(write_task(tmp_path))
    seen: dict[str, list] = {}

    def part(self, objective, steps, pairs):
        seen.setdefault(self.kind, []).append((objective, steps, [row["prompt"] for row in pairs]))
        return {"losses": {}, "metrics": {}, "seconds": 0}

    monkeypatch.setattr(Training, "_part", part)
    for kind in KINDS:
        Training(task, kind, 5, 3, 1, 0.01, tmp_path, 3).run()
    assert [part[:2] for part in seen["parm"]] == [("", 5)]
    assert [part[:2] for part in seen["genarm"]] == [("early", 2), ("short", 2)]
    assert seen["genarm"] == seen["dpo"]
    assert seen["parm"][0][2] == seen["svd_lora"][0][2] == seen["uniarm"][0][2]
    assert seen["genarm"][0][2] + seen["genarm"][1][2] == seen["parm"][0][2][:8]


def test_policies_are_trained_by_dpo(tmp_path):
    """Their losses are those of DPO's equation, of whole texts one by one in float64."""
    task = Task.read(write_task(tmp_path))
    trained = Training(task, "dpo", 4, 3, 1, 0.05, tmp_path / "dpo", 3)
    found = trained.run()["losses"]
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    for name in task.objectives:
        policy = AutoPeftModelForCausalLM.from_pretrained(trained.adapter(name)).double().eval()

        def log_prob(prompt, response, policy=policy):
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([start + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                each = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            return each[len(start) - 1 :].sum()

        losses = []
        for row in task.held_out(3):
            texts = [row["prompt"], row[f"response_{row[name]}"]], [row["prompt"], row[f"response_{1 - row[name]}"]]
            best, other = (log_prob(*text) for text in texts)
            with policy.disable_adapter():
                best, other = best - log_prob(*texts[0]), other - log_prob(*texts[1])
            losses.append(-torch.nn.functional.logsigmoid(task.policy_beta * (best - other)))
        assert found[name] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)
        assert abs(found[name] - math.log(2)) > 1e-3


def test_scale_then_rate_are_searched_for_with_the_mean_over_seeds(tmp_path, monkeypatch):
    given = {"scales": [1.0, 4.0], "rates": [0.01, 0.02, 0.04], "settings_seeds": {2: [7, 8]}}
    task = Task.read(write_task(tmp_path, **given))
    losses = {(1, 0.02): 3.0, (4, 0.02): 2.0, (16, 0.02): 2.5, (4, 0.01): 1.0, (4, 0.04): 3.0, (4, 0.005): 1.5}
    ran = []

    def part(self, objective, steps, pairs):
        ran.append((self.scale, self.rate, self.seed))
        lucky = {(16, 0.02, 7): -0.9, (4, 0.02, 8): 0.7, (16, 0.02, 8): 0.7}  # one of the two seeds alone takes 16
        loss = losses[self.scale, self.rate] + lucky.get(ran[-1], 0.0)
        return {"losses": {"early": loss}, "metrics": {}, "seconds": 0}

    monkeypatch.setattr(Training, "_part", part)
    settings = Settings(task, 2, tmp_path / "results", tmp_path / "work")
    with pytest.raises(ValueError, match="The scale of parm is not chosen yet. Run the piece tiny/settings/2 first"):
        settings.choose_rate("parm")
    with monkeypatch.context() as patch:
        stop_at(patch, Records, "append", 3)
        with pytest.raises(KeyboardInterrupt):
            settings.choose_scale("parm")
    assert [row["at"] for row in settings.tried(SCALE, "parm")] == [1]
    ran.clear()
    settings.choose_scale("parm")
    assert ran == [(4, 0.02, 8), (16, 0.02, 7), (16, 0.02, 8)]
    values = [(row["at"], row["value"]) for row in settings.tried(SCALE, "parm")]
    assert values == [(1, 3.0), (4, pytest.approx(2.35)), (16, pytest.approx(2.4))]
    ran.clear()
    settings.choose_rate("parm")  # what the first search has trained is not trained again
    assert ran == [(4, rate, seed) for rate in (0.01, 0.04, 0.005) for seed in (7, 8)]
    chosen = settings.chosen(["parm"], 9, 0, tmp_path)["parm"]
    assert (chosen.scale, chosen.rate, chosen.steps) == (4, 0.01, 9)


def test_what_is_said_of_several_seeds_has_both_sources_of_variance(tmp_path):
    settings = Settings(Task.read(write_task(tmp_path, settings_seeds={2: [7, 8]})), 2, tmp_path, tmp_path)
    rows = [
        {"what": BETA, "of": "parm", "at": at, "seed": seed, "value": value, "error": 0.3, "kl": kl}
        for at, seed, value, kl in ((0.5, 7, -1.0, 2.0), (0.5, 8, -1.8, 4.0), (1.0, 7, -1.0, 1.0), (0.5, 9, -9.0, 9.0))
    ]
    with Records(settings.path, {}) as kept:
        kept.append(rows)
    assert settings.tried(BETA, "parm") == [
        {"at": 0.5, "value": pytest.approx(-1.4), "error": pytest.approx(0.5), "kl": 3.0}
    ]


def test_scale_multiplies_what_an_adapter_does(tmp_path):
    task = Task.read(write_task(tmp_path))
    for kind in (*KINDS, "parm_prompt"):
        configs = [Training(task, kind, 1, 0, scale, 0.01, tmp_path, 3)._config(OBJECTIVES) for scale in (1, 4)]
        usual = 8 if kind == "parm" else 16
        assert [config.lora_alpha for config in configs] == [usual, 4 * usual]


def test_pairs_are_drawn_once_as_long_as_there_are_enough(tmp_path):
    task = Task.read(write_task(tmp_path))
    prompts = [row["prompt"] for row in task.drawn(6, 0)]
    assert len(set(prompts)) == len(prompts) == 12
    assert prompts != [row["prompt"] for row in task.drawn(6, 1)]
    assert len(task.drawn(7, 0)) == 14


def test_labels_agree_unless_they_contradict():
    assert agreement([{"a": label, "b": 0} for label in (0, 1, -1)], ["a", "b"]) == 2 / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:1], "no pairs of the split validation"),
        (lambda lines: [*lines, lines[-1].replace('"test"', '"train"')], "is in test and in train"),
        (lambda lines: [lines[0].replace('"early"', '"late"'), *lines[1:]], "Line 1 of .* lacks early"),
        (lambda lines: [lines[0].replace('"train"', '"other"'), *lines[1:]], "split 'other'"),
    ],
)
def test_unfit_pairs_are_refused(tmp_path, change, message):
    task = Task.read(write_task(tmp_path))
    lines = Path(task.pairs).read_text().splitlines()
    Path(task.pairs).write_text("".join(f"{line}\n" for line in change(lines)))
    with pytest.raises(ValueError, match=message):
        task.rows  # noqa: B018


def test_unknown_tasks_pieces_and_entries_are_refused(tmp_path, monkeypatch):
    path = write_task(tmp_path)
    with pytest.raises(ValueError, match="no task 'other'. The tasks are tiny"):
        run(tmp_path, monkeypatch, "--task", "other")
    with pytest.raises(ValueError, match="No piece begins with"):
        run(tmp_path, monkeypatch, "--only", "tiny/40")
    path.write_text(path.read_text() + "colour: red\n")
    with pytest.raises(ValueError, match="tiny.yaml has colour"):
        run(tmp_path, monkeypatch)


def test_a_piece_without_settings_says_what_comes_first(tmp_path, monkeypatch):
    write_task(tmp_path)
    with pytest.raises(ValueError, match="Run the piece tiny/settings/2 first"):
        run(tmp_path, monkeypatch, "--only", "tiny/4/0")


def test_pieces_are_asked_for_by_whole_parts_of_their_names(tmp_path, monkeypatch, capsys):
    write_task(tmp_path, budgets={4: [0, 1], 40: [0]})
    run(tmp_path, monkeypatch, "--list", "--only", "tiny/4", "tiny/settings/2/rate/dpo/")
    seeds = [f"tiny/4/{seed}/{kind}" for seed in (0, 1) for kind in KINDS]
    assert capsys.readouterr().out.split() == ["tiny/settings/2/rate/dpo", *seeds]


def test_each_budget_has_settings_of_its_own_unless_the_task_names_one(tmp_path, monkeypatch, capsys):
    own, named = {4: [0], 40: [0]}, {"settings_steps": 2}
    for further, expected in (({"settings_steps": None}, {"4", "40"}), (named, {"2"})):
        write_task(tmp_path, budgets=own, **further)
        run(tmp_path, monkeypatch, "--list", "--only", "tiny/settings")
        assert {line.split("/")[2] for line in capsys.readouterr().out.split()} == expected


def test_scales_can_be_chosen_with_shorter_trainings(tmp_path, monkeypatch):
    changes = {"settings_steps": None, "scale_steps": 2, "scales": [1.0, 4.0, 16.0], "rates": [0.01, 0.1, 1.0]}
    task = Task.read(write_task(tmp_path, **changes))

    def trained(self):
        value = {4.0: 1.0}.get(self.scale, 2.0) if self.steps == 2 else {0.1: 1.0}.get(self.rate, 2.0)
        return {"losses": {"early": value}, "seconds": 0.0}

    monkeypatch.setattr(Training, "run", trained)
    settings = Settings(task, 4, tmp_path / "results", tmp_path)
    settings.choose_scale("parm")
    settings.choose_rate("parm")
    assert (settings.scale("parm"), settings.rate("parm")) == (4.0, 0.1)
    kept = {path.name: [json.loads(row) for row in path.open()] for path in (tmp_path / "results").glob("*.jsonl")}
    assert {name: {row["what"] for row in rows} for name, rows in kept.items()} == {
        "settings-2.jsonl": {"scale"}, "settings-4.jsonl": {"rate"},
    }  # fmt: skip
    assert {(row["scale"], row["rate"]) for row in kept["settings-4.jsonl"]} == {(4.0, 0.01), (4.0, 0.1), (4.0, 1.0)}


def tried(values: dict[float, float], error: float | None = None) -> list[dict]:
    return [{"at": at, "value": value, **({} if error is None else {"error": error})} for at, value in values.items()]


def test_a_grid_grows_while_its_best_lies_at_an_edge():
    grid, limits = [1, 2, 4], [0.3, 100]
    assert next_of([], grid, limits) == 1
    assert next_of(tried({1: 3.0, 2: 2.0}), grid, limits) == 4
    assert next_of(tried({1: 3.0, 2: 2.0, 4: 3.0}), grid, limits) is None
    assert next_of(tried({1: 3.0, 2: 2.0, 4: 1.0}), grid, limits) == 8
    assert next_of(tried({1: 1.0, 2: 2.0, 4: 3.0}), grid, limits) == 0.5
    assert next_of(tried({0.5: 0.5, 1: 1.0, 2: 2.0, 4: 3.0}), grid, limits) is None
    assert at_edge(tried({0.5: 0.5, 1: 1.0, 2: 2.0, 4: 3.0}))
    assert next_of(tried({1: 3.0}), [1], limits) is None


def test_the_weakest_guidance_that_is_about_as_good_is_chosen():
    rows = tried({0.25: -1.02, 0.5: -1.0, 1: -0.95, 2: -0.5}, error=0.05)
    assert best(rows)["at"] == 0.5
    assert best(tried({0.25: -1.02, 0.5: -1.0}))["at"] == 0.25


def test_a_best_setting_at_an_edge_is_said():
    inside, outside = tried({1: 2.0, 2: 1.0, 3: 2.0}), tried({1: 2.0, 2: 1.0})
    assert "lies inside" in edges({"parm": inside}, BETA)
    assert "The β of dpo lies at an edge" in edges({"parm": inside, "dpo": outside}, BETA)


def test_a_grid_of_strengths_that_ends_at_its_largest_value_is_said():
    """Though the β that was chosen, the weakest that is about as good, lies inside."""
    rows = tried({0.25: -1.02, 0.5: -1.0, 1: -0.5}, error=0.05)
    said = edges({"parm": rows, "genarm": tried({0.25: -0.9, 0.5: -1.0, 1: -0.5}, error=0.05)}, BETA)
    assert said.startswith("Each β lies inside the values that were tried.")
    assert said.endswith("The largest MIP itself is at the strongest guidance that was tried of parm.")
    assert "strongest" not in edges({"parm": tried({1: 1.0, 2: 2.0, 3: 0.5, 4: 3.0})}, SCALE)


def test_the_page_says_which_grid_ends_at_its_best(tmp_path):
    path = write_task(tmp_path)
    write_results(tmp_path / "results" / "tiny", [0])
    write_settings(tmp_path / "results" / "tiny", losses=(1.0, 2.0, 3.0))
    page = results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20)
    text = " ".join(page.read_text().split())
    assert f"The learning rate of {', '.join(KINDS)} lies at an edge" in text


def test_matched_kl_lies_between_what_was_tried(tmp_path):
    settings = Settings(Task.read(write_task(tmp_path)), 2, tmp_path, tmp_path)
    settings.tried = lambda what, of: [  # KL is 1/β of PARM and 2/β of the others
        {"at": at, "value": -at if of == "parm" else at, "error": 0.0, "kl": (1 if of == "parm" else 2) / at}
        for at in (0.5, 1.0, 2.0, 4.0)
    ]
    settings.task.limits.update(beta=[0.5, 4.0])
    assert settings.beta("parm") == 4.0
    assert settings.matched("genarm") == pytest.approx(4.0)  # the end of what was tried
    assert settings.matched("parm") is settings.matched("mod") is None
    settings.tried = lambda what, of: [
        {"at": at, "value": at, "error": 0.0, "kl": -0.01} for at in (0.5, 1.0, 2.0, 4.0)
    ]
    assert settings.matched("genarm") is None  # an estimate so close to the base


def test_joined_loras_are_made_of_the_training(finished):
    folder, _ = finished
    task = Task.read(folder / "tasks" / "tiny.yaml")
    training = Training(task, "genarm", 4, 0, 1, 0.01, folder / "work" / "tiny" / "4-seed0", 3)
    assert Path(join_loras(training), "adapter_config.json").exists()
    assert set(training.adapters()) == set(OBJECTIVES)


def test_what_is_kept_is_what_was_there(tmp_path):
    write_results(tmp_path, [3])
    rows = read_piece(rows_path(tmp_path, 4, 3))
    facts = {**FACTS, "seed": 4}
    write_piece(rows_path(tmp_path, 4, 4), [{**row, "response": "a b c d e"} for row in rows], facts)
    again = read_piece(rows_path(tmp_path, 4, 4))
    assert [{**row, "prompt": ""} for row in again] == [{**row, "prompt": ""} for row in rows]
    assert "a b c" not in gzip.decompress(rows_path(tmp_path, 4, 4).read_bytes()).decode()


def test_a_damaged_file_is_named(tmp_path):
    write_results(tmp_path, [0])
    path = rows_path(tmp_path, 4, 0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="4-seed0.csv.gz is no whole file of results"):
        read(tmp_path)


def test_missing_seeds_are_said(tmp_path):
    write_results(tmp_path, [0, 2])
    budget = read(tmp_path)
    assert (budget.seeds, budget.missing) == ([0, 2], [1])
    assert "of 3 that were planned, 1 were not run" in statements(budget)[-1]
    facts_path(rows_path(tmp_path, 4, 2)).unlink()  # as a piece whose writing was stopped
    assert statements(read(tmp_path))[-1].startswith("**One seed of training**")
    assert Budget.read(tmp_path, 4, [7]) is None


def test_a_kind_that_some_seeds_lack_does_not_take_the_others_from_the_page(tmp_path):
    """As while a comparison goes on: what all seeds have is compared, and what is left out is said."""
    path, results = write_task(tmp_path, budgets={4: [0, 1, 2]}), tmp_path / "results" / "tiny"
    write_results(results, [0], kinds=["parm", "svd_lora", "genarm"], scale=1)
    write_results(results, [1, 2], kinds=["parm", "genarm"], scale=1)
    write_settings(results)
    budget = read(results)
    assert (budget.seeds, budget.missing, budget.kinds) == ([0, 1, 2], [], ["parm", "genarm"])
    assert budget.partial == {"svd_lora": [0]}
    assert "SVD-LoRA" not in budget.fronts
    assert all("svd_lora" not in one["trained"] for one in budget.facts)
    assert statements(budget)[-1] == "**Seeds**: SVD-LoRA with 0 alone so far, and left out."
    text = results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20).read_text()
    assert "**Still to come** on this task: SVD-LoRA; UniARM; Rewarded Soups; MOD; PARM, disjoint start." in text
    assert "One seed of training" not in text
    write_results(results, [7], kinds=["parm"])
    assert Budget.read(results, 4, [7]) is None


def test_seeds_that_were_run_with_other_arithmetic_are_said(tmp_path):
    """The base's answers, and losses of untrained ARMs, are the same whatever the seed of training."""
    write_results(tmp_path, [0, 1, 2])
    assert read(tmp_path).alike == [[0, 1, 2]]
    assert not any("**Arithmetic**" in line for line in statements(read(tmp_path)))
    path = rows_path(tmp_path, 4, 1)
    rows, facts = [{**row, "response": ""} for row in read_piece(path)], read_facts(path)
    changed = [{**row, "early": row["early"] + 0.1 * (i == 0)} for i, row in enumerate(rows)]
    assert changed[0]["method"] == BASE
    write_piece(path, changed, facts)
    said = next(line for line in statements(read(tmp_path)) if line.startswith("**Arithmetic**"))
    assert "is not the same with the seeds 0, 2 and 1: something rounds otherwise" in said
    write_piece(path, rows, facts)
    assert read(tmp_path).alike == [[0, 1, 2]]
    facts["trained"]["genarm"]["metrics"]["early_untrained_loss"] = 0.7
    write_piece(path, rows, facts)
    assert read(tmp_path).alike == [[0, 2], [1]]


def test_settings_that_were_tried_with_other_arithmetic_are_said(tmp_path):
    path = write_task(tmp_path, settings_steps=None, settings_seeds={4: [7]})
    results = tmp_path / "results" / "tiny"
    write_results(results, [0, 1], products="bfloat16")
    write_settings(results, steps=4)
    with Records(results / "settings-4.jsonl", {}) as kept:
        row = {"what": SCALE, "of": "genarm", "seed": 7, "value": 9.0}
        kept.append([{**row, "at": 16, "products": "float32"}, {**row, "at": 64, "products": "bfloat16"}])
    text = results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20).read_text()
    assert text.count("On another CPU") == 1
    assert "On another CPU, whose products are not in bfloat16, were tried: genarm at 16.\n- **Learning" in text


def test_joined_tables_keep_the_versions_of_each(tmp_path):
    parts = [rows_path(tmp_path, 4, 0, kind) for kind in ("parm", "dpo", "genarm")]
    for part, version in zip(parts, ("2.13", "2.14", "2.13")):
        facts = {"objectives": OBJECTIVES, "versions": {"python": "3", "torch": version}}
        write_piece(part, [], {**facts, "trained": {}, "betas": {}, "matched": {}})
    path = rows_path(tmp_path, 4, 0)
    join_pieces(path, parts)
    assert read_facts(path)["versions"] == {"python": "3", "torch": "2.13 and 2.14"}
    later = rows_path(tmp_path, 4, 0, "uniarm")
    facts = {"objectives": OBJECTIVES, "versions": {"python": "3", "torch": "2.13"}}
    write_piece(later, [], {**facts, "trained": {}, "betas": {}, "matched": {}})
    (tmp_path / NOTES).unlink()  # as in a clone of the repository
    join_pieces(path, [path, later])
    assert not facts_path(later).exists()
    assert read_facts(path)["versions"] == {"python": "3", "torch": "2.13 and 2.14"}


def test_crosses_of_the_figure_are_over_prompts_and_seeds(tmp_path):
    write_results(tmp_path, [0, 1, 2])
    budget = read(tmp_path)
    front = budget.fronts[PARM]
    cell = next(row for row in means(budget, [BASE, PARM]) if row["preference"] == GRID[2])
    alone = bootstrap(lambda mean: mean[0], front.rewards[:, 2, [0]], budget.resamples)
    of_seeds = front.runs[:, :, 2, 0].mean(1)
    assert cell["early"] == pytest.approx(front.points[2, 0]) == pytest.approx(alone.estimate)
    reach = math.hypot(alone.high - alone.estimate, 4.303 * of_seeds.std(ddof=1) / math.sqrt(3))
    assert cell["early_high"] - cell["early"] == pytest.approx(reach, rel=1e-3)


def test_a_method_whose_own_beta_is_about_at_parms_kl_stands_there_with_it(tmp_path):
    write_results(tmp_path, [0, 1])
    for seed in (0, 1):
        path = rows_path(tmp_path, 4, seed)
        rows, facts = read_piece(path), read_facts(path)
        extra = [{**row, "method": "UniARM at PARM's KL", "log_ratio": 1.0 + seed} for row in rows
                 if row["method"] == "UniARM"]  # fmt: skip
        write_piece(path, [{**row, "response": ""} for row in rows + extra], facts)
    budget = read(tmp_path)
    assert budget.near_kl()["UniARM"] == "UniARM at PARM's KL"
    assert budget.near_kl()["SVD-LoRA"] == "SVD-LoRA"
    assert not {PARM, "MOD", "ARM alone", BASE} & {*budget.near_kl()}
    said = next(line for line in statements(budget) if line.startswith("**Near PARM's KL"))
    assert said.startswith("**Near PARM's KL to the base**, 0.40 (0.40 to 0.40) a token over seeds")
    assert "(not told apart; KL 0.30 (0.20 to 0.40), KL 0.40 at its own β)" in said
    assert "KL 0.40 (0.40 to 0.40), its own β)" in said


@pytest.mark.parametrize("key", ["pairs", "top_k", "max_new_tokens", "matched", "products", "scale", "rate"])
def test_pieces_of_two_comparisons_are_refused(tmp_path, key):
    write_results(tmp_path, [0])
    metrics = {"vertex_correlation": 0.5, "early_gain": 0.1, "short_gain": 0.2}
    trained = {kind: {"metrics": metrics, "seconds": 60.0, key: 9} for kind in KINDS}
    other = {key: {"parm": 9.0} if key == "matched" else "other"}
    write_results(tmp_path, [1], **({"trained": trained} if key in ("scale", "rate") else other))
    with pytest.raises(ValueError, match=f"seeds 0 and 1 .* have different {key}"):
        read(tmp_path)


@pytest.mark.parametrize(("what", "found"), [("scale", 16.0), ("rate", 3.0), ("beta", 0.5)])
def test_a_page_is_of_the_settings_that_were_chosen(tmp_path, what, found):
    path = write_task(tmp_path)
    write_results(tmp_path / "results" / "tiny", [0])
    write_settings(tmp_path / "results" / "tiny")
    facts = facts_path(rows_path(tmp_path / "results" / "tiny", 4, 0))
    text = json.loads(facts.read_text())
    if what == "beta":
        text["betas"]["parm"] = found
    else:
        text["trained"]["parm"][what] = found
    facts.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=f"have the {what} {found} of parm, but"):
        results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20)


@pytest.mark.parametrize("change", [{"scale": 4.0}, {"rate": 0.1}, {"seed": 1}, {"steps": 6}, {"pairs": True}])
def test_an_adapter_of_another_training_is_not_taken_for_it(tmp_path, monkeypatch, change):
    task = Task.read(write_task(tmp_path))
    calls = []
    monkeypatch.setattr(Training, "_train", lambda *given: calls.append(given) or ({"early": 1.0}, {}))
    given = {"steps": 4, "seed": 0, "scale": 1.0, "rate": 0.01, "folder": tmp_path, "held_out": 3}
    (tmp_path / "parm").mkdir()
    assert Training(task, "parm", **given).run()["losses"] == {"early": 1.0}
    assert Training(task, "parm", **given).run()["losses"] == {"early": 1.0}
    assert len(calls) == 1
    if change.pop("pairs", False):
        path = Path(task.pairs)
        path.write_text(path.read_text().replace('"early": 1', '"early": 0'))
        task = Task.read(tmp_path / "tasks" / "tiny.yaml")
    with pytest.raises(ValueError, match="parm is of another training"):
        Training(task, "parm", **given | change).run()


@pytest.mark.parametrize("seeds", [[0, 1], [0, 1, 2]])
def test_a_method_that_one_seed_lacks_is_refused(tmp_path, seeds):
    write_results(tmp_path, seeds)
    path = rows_path(tmp_path, 4, 1)
    rows, facts = [{**row, "response": ""} for row in read_piece(path) if row["method"] != "MOD"], read_facts(path)
    write_piece(path, rows, facts)
    with pytest.raises(ValueError, match="The seed 1 of .* lacks methods that others have"):
        read(tmp_path)
    write_piece(path, rows, {**facts, "trained": {}})
    assert 1 in read(tmp_path).missing


@pytest.mark.parametrize(("lead", "said"), [(0.3, "lower"), (-0.3, "higher"), (0.0, "not told apart")])
def test_statements_follow_the_intervals(tmp_path, lead, said):
    write_results(tmp_path, [0, 1, 2], lead)
    budget = read(tmp_path)
    lines = statements(budget)
    control, genarm, steering, spreads, shuffled, *_ = lines
    assert control.count("(higher)") == 3
    assert genarm.startswith("**PARM − GenARM**")
    assert genarm.count(f"({said})") == 3
    assert "PARM has 0.50 of GenARM's parameters, and one guide row for 2" in genarm
    assert "early 1.00 (single seeds 1.00 to 1.00)" in steering
    assert "spread of early" in spreads
    assert "MIP +" in shuffled
    assert "(higher)" in shuffled
    behind = next(line for line in lines if line.startswith("**On held-out pairs**"))
    assert ("PARM is behind GenARM in MIP" in behind) == (lead > 0)
    assert ("held-out pairs do not show why" in behind) == (lead > 0)


def test_the_reason_for_a_lead_has_an_interval_over_seeds(tmp_path):
    """Losses that fell less in the mean alone are no reason."""
    for gap, shown in ((0.2, True), (0.02, False)):
        for seed in range(3):
            gains = {"parm": 0.3 + 0.1 * seed, "genarm": 0.3 + gap + (0.1, 0.13, 0.07)[seed] * seed}
            trained = {
                kind: {"metrics": {"vertex_correlation": 0.5, "early_gain": gain, "short_gain": 0.1}, "seconds": 60.0}
                for kind, gain in {**dict.fromkeys(KINDS, 0.3), **gains}.items()
            }
            write_results(tmp_path, [seed], 0.3, trained=trained)
        behind = next(line for line in statements(read(tmp_path)) if line.startswith("**On held-out pairs**"))
        assert ("; its losses fell by" in behind and "less than GenARM's, over seeds" in behind) == shown
        assert ("held-out pairs do not show why" in behind) != shown


def test_parm_beside_methods_without_beta_is_not_read_off_beyond_what_was_tried(tmp_path):
    settings = Settings(Task.read(write_task(tmp_path)), 2, tmp_path, tmp_path)
    kl = {"rewarded_soups": 1.5, "mod": 9.0, "arm_alone": 0.1}
    settings.tried = lambda what, of: (
        [{"at": at, "value": -at, "kl": 1 / at} for at in (0.5, 1.0)]
        if of == "parm"
        else [{"at": 1.0, "value": -0.3, "kl": kl[of]}]
    )
    text = at_policies_kl(settings, KINDS)
    assert "Rewarded Soups 0.30 at KL 1.50, PARM 0.75;" in text
    assert "MOD 0.30 at KL 9.00, PARM 0.50 at KL 2.00, the nearest that was tried" in text
    assert "ARM alone 0.30 at KL 0.10, PARM 1.00 at KL 1.00, the nearest that was tried" in text


def test_differences_are_those_of_the_slow_way(tmp_path):
    write_results(tmp_path, [0, 1], 0.3)
    budget = read(tmp_path)
    base = budget.fronts["Base"].runs.reshape(-1, 2)
    own, other = ((budget.fronts[name].runs - base.mean(0)) / base.std(0, ddof=1) for name in (PARM, "GenARM"))
    α = budget.fronts[PARM].preferences
    products = [(runs.mean((0, 1)) * α).sum(1).mean() for runs in (own, other)]
    assert budget.difference(PARM, "GenARM")[PRODUCT]["value"] == pytest.approx(products[0] - products[1])
    assert budget.difference(PARM, SHUFFLED)[ABOVE_ZERO]["value"] == pytest.approx(0.0)  # a front is a set of points


def test_the_page_of_several_seeds(tmp_path):
    path = write_task(tmp_path, budgets={4: [0, 1], 8: [0]}, settings_steps=None)
    results = tmp_path / "results" / "tiny"
    write_results(results, [0, 1], 0.3)
    write_results(results, [0], 0.0, steps=8)
    write_settings(results, steps=4)
    write_settings(results, rates=(2, 3, 4), steps=8)
    page = results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20)
    text = page.read_text()
    assert text.index("### Tiny: 4 steps") < text.index("### Tiny: 8 steps")
    chosen = " ".join(text.split())
    assert chosen.count("Each learning rate lies inside") == 2
    assert chosen.index("with the seeds 7: parm **2**") < chosen.index("with the seeds 7: parm **3**")
    assert chosen.count(f"The `lora_alpha` of {', '.join(KINDS)} lies at an edge") == 2
    said = "after 8 steps with the learning rate 0.01, in the mean over training seeds of their own, 7: parm **1** "
    assert said + "(1: 1.000 4: 4.000)" in chosen
    assert {file.name for file in (page.parent / "images").iterdir() if not file.name.startswith(".")} == {
        f"results_tiny_{steps}{kind}.png" for steps in (4, 8) for kind in ("", "_kl")
    }
    assert results_page.write_page(tmp_path / "nothing", tmp_path / "none", path.parent) is None


def test_a_task_of_fewer_kinds_says_which_methods_it_lacks(tmp_path, monkeypatch, capsys):
    kinds = ["parm", "genarm"]
    path, results = write_task(tmp_path, kinds=kinds, scale_steps=8), tmp_path / "results" / "tiny"
    write_results(results, [0], kinds=kinds)
    write_settings(results, kinds=kinds)
    write_settings(results, kinds=kinds, steps=8)
    text = results_page.write_page(tmp_path / "results", tmp_path / "page", path.parent, resamples=20).read_text()
    lacking = next(line for line in text.splitlines() if line.startswith("- **Not compared** on this task"))
    assert lacking.endswith(": SVD-LoRA; UniARM; Rewarded Soups; MOD; PARM, disjoint start.")
    assert "Still to come" not in text
    assert "held-out pairs after 8 steps" in text
    assert "after 2 steps with the seeds 7" in text
    assert "| SVD-LoRA |" not in text
    assert "| GenARM's LoRAs as one |" in text
    capsys.readouterr()
    run(tmp_path, monkeypatch, "--list")
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny/")]
    assert {piece.split("/")[-1] for piece in listed} == {*kinds, "from_loras", "arm_alone"}
    with pytest.raises(
        ValueError, match="`kinds` of .*tiny.yaml are parm, other, but they are some of parm, svd_lora"
    ):
        Task.read(path, kinds=["parm", "other"])
    with pytest.raises(ValueError, match="with parm and genarm among them"):
        Task.read(path, kinds=["parm", "dpo"])


def test_tasks_have_what_they_need():
    for path in command.CONFIGS.glob("*.yaml"):
        task = Task.read(path)
        assert task.name == path.stem
        assert len(task.objectives) == 2
        assert yaml.safe_load(path.read_text())["budgets"]
