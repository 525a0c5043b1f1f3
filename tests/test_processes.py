# SPDX-License-Identifier: Apache-2.0
"""Several processes with one table: the rows of one process, whatever is killed, and by how many it is finished."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from children import communicate
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from datasets import Dataset
from judge_server import JudgeServer
from together import results, together
from transformers import AutoModelForCausalLM

from trl_parm.cli.main import main
from trl_parm.decoding import PARM
from trl_parm.endpoint import Endpoint
from trl_parm.evaluation import Run, rescore, sweep
from trl_parm.evaluation.decoding import ANY
from trl_parm.judges import Judge
from trl_parm.parts import find_parts, part_path
from trl_parm.processes import Processes, Stopped
from trl_parm.records import Records, read_rows
from trl_parm.relabel import relabel
from trl_parm.rewards import brevity, conciseness


PROMPTS = [f"w{i} w{j}" for i in range(4) for j in range(i + 1)]
REWARDS = {"helpful": brevity, "harmless": conciseness}
BUILDING = threading.Lock()
ON_CPUS = Path(__file__).parents[1] / "examples" / "accelerate_configs" / "ddp_cpu.yaml"


def without_time(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def run_sweep(path, processes=None, **options):
    """One method without a preference, one whose preferences share batches, and one whose don't."""
    with BUILDING:  # from one stream of random numbers
        base, arm, tokenizer = tiny_llama(), tiny_arm(), tiny_tokenizer()
    guided = lambda batch: PARM(base, arm, batch.weights, 0.5)  # noqa: E731
    grid = ([0.0, 1.0], [0.4, 0.6], [1.0, 0.0])
    runs = [
        Run("base"),
        *(Run("PARM", α, guided, together=ANY) for α in grid),
        *(Run("apart", α, guided) for α in grid[:2]),
    ]
    given = {"prompts": PROMPTS, "batch_size": 4, "do_sample": True, "max_new_tokens": 5, "runs": runs}
    options = {**given, "rewards": REWARDS, **options}
    options |= {} if processes is None else {"processes": processes}
    return sweep(base, tokenizer, path=path, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes that nobody stops: the table, and its file."""
    path = tmp_path_factory.mktemp("whole") / "results.jsonl"
    return without_time(run_sweep(path)), without_time(map(json.loads, path.read_text().splitlines()))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_several_write_the_table_of_one(tmp_path, whole, count):
    """Also more of them than there are batches; in every process, and in the file, whose parts are gone."""
    path, batches = tmp_path / "results.jsonl", []
    tables = together(count, lambda processes: run_sweep(path, processes, on_batch=batches.append))
    for table in results(tables):
        assert without_time(table) == whole[0]
    assert without_time(map(json.loads, path.read_text().splitlines())) == whole[1]
    assert find_parts(path) == []
    assert len(batches) == count * 6 * 3  # every bar ends full


class Killed(BaseException):
    pass


def killed_after(batches):
    """Ends a process when so many batches are done."""
    left = [batches]

    def on_batch(run):
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return on_batch


@pytest.mark.parametrize("seed", range(4))
def test_kills_cost_whole_batches_and_any_number_goes_on(tmp_path, whole, seed):
    """A process dies, perhaps while it writes, and the next start has other processes. Nothing is there twice."""
    chance, path, most = random.Random(seed), tmp_path / "results.jsonl", 0
    for _ in range(4):
        count = chance.choice([1, 2, 3])
        victim, batches = chance.randrange(count), chance.randrange(1, 10)

        def work(processes, victim=victim, batches=batches):
            dies = processes.number == victim
            return run_sweep(path, processes, **({"on_batch": killed_after(batches)} if dies else {}))

        ends = together(count, work)
        assert isinstance(ends[victim], Killed), ends
        part = part_path(path, victim)
        if chance.random() < 0.5 and part.exists() and part.read_bytes().count(b"\n") > 1:
            part.write_bytes(part.read_bytes()[:-9])
        files = [*find_parts(path), path]
        rows = read_rows(path) if any(file.read_bytes().count(b"\n") > (file != path) for file in files) else []
        assert len({(row["method"], str(row["preference"]), row["prompt"]) for row in rows}) == len(rows)
        most = max(most, len(rows))
    assert most > 0
    table = results(together(2, lambda processes: run_sweep(path, processes)))[1]
    assert without_time(table) == whole[0]
    rows = without_time(map(json.loads, path.read_text().splitlines()))
    assert sorted(rows, key=str) == sorted(whole[1], key=str)
    assert rows == whole[1]


def test_one_process_finishes_what_several_began(tmp_path, whole):
    path = tmp_path / "results.jsonl"
    together(3, lambda p: run_sweep(path, p, **({"on_batch": killed_after(8)} if p.number == 1 else {})))
    assert len(find_parts(path)) == 3
    begun = without_time(read_rows(path))
    rescored = rescore(path, {"length": brevity}, tmp_path / "rescored.jsonl")  # what reads results reads parts
    assert len(rescored) == len(begun) > 0
    assert without_time(run_sweep(path)) == whole[0]
    assert without_time(map(json.loads, path.read_text().splitlines())) == whole[1]
    assert find_parts(path) == []


def test_a_kill_while_parts_are_put_together_loses_and_doubles_nothing(tmp_path, whole, monkeypatch):
    path = tmp_path / "results.jsonl"

    unlink = Path.unlink

    def killed(self, **options):
        if self in find_parts(path):
            raise Killed
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert isinstance(together(2, lambda processes: run_sweep(path, processes))[0], Killed)
    assert len(path.read_text().splitlines()) == len(whole[1])
    assert len(find_parts(path)) == 2
    assert without_time(read_rows(path)) == whole[1]
    assert without_time(run_sweep(path)) == whole[0]
    assert find_parts(path) == []
    assert without_time(read_rows(path)) == whole[1]


def test_rows_may_be_added_by_several(tmp_path):
    path, twin = tmp_path / "results.jsonl", tmp_path / "twin.jsonl"
    for begun in (path, twin):
        run_sweep(begun, prompts=PROMPTS[:5], runs=[Run("base")])
    runs = [Run("base"), Run("other")]
    table = results(together(2, lambda processes: run_sweep(path, processes, runs=runs)))[0]
    assert len(table) == 2 * len(PROMPTS)
    assert without_time(table) == without_time(run_sweep(twin, runs=runs))
    assert without_time(read_rows(path)) == without_time(read_rows(twin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "The processes 0 and 1 differ in seed."),
        ({"prompts": PROMPTS[:4]}, "The processes 0 and 1 differ in prompts."),
        ({"batch_size": 3}, "The processes 0 and 1 differ in batch_size."),
        ({"runs": [Run("base")]}, "The processes 0 and 1 differ in methods or preferences."),
        ({"max_new_tokens": 4}, "The processes 0 and 1 differ in generation."),
    ],
)
def test_processes_with_different_work_are_refused(tmp_path, change, message):
    path = tmp_path / "results.jsonl"
    one, two = together(2, lambda processes: run_sweep(path, processes, **(change if processes.number else {})))
    assert type(one) is ValueError
    assert message in str(one)
    assert isinstance(two, Stopped)
    assert not path.exists()


def test_the_second_job_on_a_folder_says_so(tmp_path, whole):
    path, started, go = tmp_path / "results.jsonl", threading.Event(), threading.Event()

    def wait(run):
        started.set()
        go.wait(timeout=60)

    first = []
    job = threading.Thread(
        target=lambda: first.extend(together(2, lambda processes: run_sweep(path, processes, on_batch=wait)))
    )
    job.start()
    started.wait(timeout=60)
    for count in (1, 2):
        found = together(count, lambda processes: run_sweep(path, processes))
        assert "Another process is writing" in str(found[0])
        assert all(isinstance(other, Stopped) for other in found[1:])
    go.set()
    job.join()
    assert [without_time(table) for table in results(first)] == [whole[0]] * 2


def test_parts_of_another_configuration_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    together(2, lambda p: run_sweep(path, p, **({"on_batch": killed_after(8)} if p.number == 1 else {})))
    for change, message in (({"seed": 1}, "seed was 0, but is 1"), ({"max_new_tokens": 3}, "max_new_tokens was 5")):
        found = together(2, lambda processes, change=change: run_sweep(path, processes, **change))
        assert message in str(found[0])
        assert len(find_parts(path)) == 2
    other = tmp_path / "other" / "results.jsonl"
    run_sweep(other, seed=1, runs=[Run("base")])
    os.replace(find_parts(path)[0], part_path(other, 0))
    before = other.read_bytes()
    with pytest.raises(ValueError, match="has rows of another configuration"):
        run_sweep(other, seed=1)
    assert other.read_bytes() == before
    restarted = results(together(2, lambda processes: run_sweep(path, processes, seed=1, restart=True)))
    assert without_time(restarted[0]) == without_time(run_sweep(tmp_path / "twin.jsonl", seed=1))


@pytest.mark.parametrize("text", ['{"mine": 1}\n', "mine\n", '{"rows_of": "a"}\n{"mine": 1}\n'])
def test_what_somebody_has_put_in_the_place_of_a_part_stays(tmp_path, text):
    path = tmp_path / "results.jsonl"
    part_path(path, 0).write_text(text)
    with pytest.raises(ValueError, match="Move that file away|is not a row in JSON"):
        Records(path, {"seed": 0})
    assert part_path(path, 0).read_text() == text


def test_processes_need_one_folder_and_a_path(tmp_path):
    (tmp_path / "0").mkdir()
    found = together(2, lambda processes: run_sweep(tmp_path / str(processes.number) / "results.jsonl", processes))
    assert "All processes need one folder" in str(found[1]) or "No such file" in str(found[1])
    assert "Name one as `path`" in str(together(2, lambda processes: run_sweep(None, processes))[0])


def test_several_label_pairs_as_one(tmp_path):
    pairs = Dataset.from_list(
        [
            {"prompt": f"w{i % 8}", "response_0": "w1 " * (i % 4 + 1), "response_1": "w2 . " * (i % 3)}
            for i in range(23)
        ]
    )
    relabel(pairs, REWARDS, tmp_path / "one", batch_size=3, ranked=True)
    together(
        3,
        lambda processes: relabel(pairs, REWARDS, tmp_path / "three", batch_size=3, ranked=True, processes=processes),
    )
    names = ("scores.jsonl", "train.jsonl", "test.jsonl", "ranked/helpful.jsonl", "ranked/harmless.jsonl")
    for name in names:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_several_ask_again_where_a_judge_failed(tmp_path):
    pairs = Dataset.from_list([{"prompt": f"w{i}", "response_0": "w1", "response_1": "w2 w3"} for i in range(9)])
    path = tmp_path / "results.jsonl"
    with JudgeServer(lambda question: (503, "out of order")) as server:
        judge = Judge(Endpoint(server.url, "stub", retries=0, cache=""), "Rate: {response}")
        rewards = {"helpful": judge, "harmless": conciseness}

        def work(processes):
            table = run_sweep(path, processes, rewards=rewards)
            return table, relabel(pairs, rewards, tmp_path, batch_size=2, test_size=0, processes=processes)["train"]

        before = results(together(2, work))
        server.answer = lambda question: str(len(question))
        after = results(together(3, work))
    assert all(set(table["helpful"]) == {None} and set(rows["helpful"]) == {-1} for table, rows in before)
    for table, rows in after:
        assert table["helpful"] == [len(f"Rate: {text}") for text in table["response"]]
        assert table["seconds"] == before[0][0]["seconds"]  # nothing is decoded again
        assert rows["helpful"] == [1] * 9


def test_only_some_verbs_share_work(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plot", "--results", "none.jsonl", "--output_dir", "none"]) == 2
    assert (
        "it was launched in 2 processes, which train, evaluate, relabel, lm_eval can share" in capfd.readouterr().err
    )


def test_a_model_over_all_gpus_needs_a_process_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="each of the 2 processes on this machine would take all of its GPUs"):
        Processes(0, 2, 2).check_devices({"device_map": "auto"})
    Processes(0, 2, 1).check_devices({"device_map": "auto"})
    Processes(0, 2, 2).check_devices({})


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Models, and a configuration of an evaluation that takes some seconds."""
    folder = tmp_path_factory.mktemp("job")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "arm")
    configuration = {
        "model_name_or_path": "base", "dtype": "float32", "grid_steps": 4, "max_new_tokens": 24, "batch_size": 4,
        "rewards": {"helpful": "trl_parm.rewards:brevity", "harmless": "trl_parm.rewards:conciseness"},
        "methods": ["base", {"method": "parm", "arm": "arm", "beta": 0.5}],
        "prompts": [f"w{i} w{j}" for i in range(12) for j in range(5)], "do_sample": True,
    }  # fmt: skip
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(configuration))
    return folder


def start(folder, output, count, **options) -> subprocess.Popen:
    environment = {
        **os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    # With `--cpu` accelerate starts one process, however many were asked for.
    launch = (
        "accelerate.commands.launch", "--config_file", str(ON_CPUS), "--num_processes", str(count),
        "--main_process_port", "0", "-m", "trl_parm",
    )  # fmt: skip
    words = launch if count > 1 else ("trl_parm",)
    command = [sys.executable, "-m", *words, "evaluate", "--config", "evaluate.yaml", "--output_dir", output]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process) -> str:
    out, err = communicate(process)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def undisturbed(job):
    with contextlib.chdir(job):
        assert main(["evaluate", "--config", "evaluate.yaml", "--output_dir", "one"]) == 0
    return without_time(read_rows(job / "one/results.jsonl"))


def kill_one(job, output, count, wanted, chance) -> int:
    """Lets a job write some more rows, and kills one of its processes, or the launcher. Returns the rows that it left,
    of which none is there twice."""
    launcher, path = start(job, output, count, start_new_session=True), job / output / "results.jsonl"
    while launcher.poll() is None and _written(path) < wanted:
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    assert len(workers) == (count if workers and count > 1 else 0)
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if workers:
            chance.choice(workers).kill()
        else:
            launcher.kill()
    communicate(launcher, 120)
    rows = read_rows(path) if _written(path) else []
    assert len({(row["method"], str(row["preference"]), row["prompt"]) for row in rows}) == len(rows)
    return len(rows)


def _written(path) -> int:
    """The rows in a file and its parts, as far as they are whole."""
    try:
        return len(read_rows(path))
    except (ValueError, OSError):
        return 0


@pytest.mark.slow
def test_a_killed_process_costs_its_batch(job, undisturbed):
    """SIGKILL to one of two; two others go on."""
    left = kill_one(job, "two", 2, 20, random.Random(0))
    assert 20 <= left < len(undisturbed)
    out = finish(start(job, "two", 2))
    assert without_time(read_rows(job / "two/results.jsonl")) == undisturbed
    assert out.count("Measures and figures:") == 1  # one of them speaks
    assert find_parts(job / "two/results.jsonl") == []


@pytest.mark.slow
def test_ten_random_kills(job, undisturbed):
    chance, left = random.Random(0), 0
    for _ in range(10):
        wanted = left + chance.randrange(1, len(undisturbed) // 12)
        now = kill_one(job, "ten", chance.choice([1, 2, 2, 3]), wanted, chance)
        assert now >= left
        left = now
    assert left < len(undisturbed)
    finish(start(job, "ten", 2))
    assert without_time(read_rows(job / "ten/results.jsonl")) == undisturbed


@pytest.mark.slow
def test_the_second_job_of_a_launcher_says_so(job, undisturbed):
    first, path = start(job, "shared", 2), job / "shared" / "results.jsonl"
    while first.poll() is None and not _written(path):
        time.sleep(0.02)
    workers = psutil.Process(first.pid).children()
    for worker in workers:
        worker.suspend()  # a job this small would be done before the second one has begun
    second = start(job, "shared", 2)
    _, err = communicate(second, 120)
    for worker in workers:
        worker.resume()
    assert second.returncode
    assert err.count("Another process is writing") == 1
    finish(first)
    assert without_time(read_rows(path)) == undisturbed
