# SPDX-License-Identifier: Apache-2.0
"""The training script as a user starts it: from YAML, in one process and with `accelerate launch` in two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from children import communicate
from conftest import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file
from training_runs import write_run

from trl_parm.training.checkpoints import last_complete_checkpoint


EXAMPLES = Path(__file__).parents[1] / "examples"
SHARDED = ("fsdp2_cpu", "zero3_cpu")
ZERO = [pytest.param(f"zero{stage}_cpu", marks=pytest.mark.deepspeed) for stage in (2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_run(folder)
    return folder


def environment() -> dict[str, str]:
    return {
        **os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip


def run(folder: Path, *command: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    process = subprocess.Popen(
        command, cwd=folder, env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = communicate(process, timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch(folder: Path, engine: str, *flags: str, error: str | None = None) -> None:
    finished = run(
        folder, str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file",
        str(EXAMPLES / "accelerate_configs" / f"{engine}.yaml"), "--main_process_port", "0",
        str(EXAMPLES / "train_arm.py"), "--config", "config.yaml", "--per_device_train_batch_size", "2", *flags,
    )  # fmt: skip
    assert (finished.returncode == 0) == (error is None), finished.stderr
    assert finished.stderr.count(error or "") >= 2 * bool(error), finished.stderr  # both processes say so


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def alone(folder: Path, *flags: str) -> None:
    finished = run(folder, sys.executable, str(EXAMPLES / "train_arm.py"), "--config", "config.yaml", *flags)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def one(folder):
    alone(folder)
    return folder / "one"


@pytest.fixture(scope="module")
def one_unpacked(folder):
    """As sharded models are, whose products are not in bfloat16 on a CPU with units for it."""
    alone(folder, "--optimize_for_cpu", "False", "--output_dir", "one_unpacked")
    return folder / "one_unpacked"


def test_what_does_not_end_says_where_it_stands(tmp_path):
    """As a launcher whose second process waits for ever, in a session of its own; none of them is left."""
    waiting = "import time\ndef waits_for_ever():\n    time.sleep(1000)\nwaits_for_ever()"
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {waiting!r}], start_new_session=True)"
    with pytest.raises(AssertionError, match="did not end within 3 s") as error:
        run(tmp_path, sys.executable, "-c", launcher, timeout=3)
    assert "in waits_for_ever" in str(error.value)
    pids = [int(line.split()[0]) for line in str(error.value).splitlines() if re.match(r"\d+ \(", line)]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_the_script_trains_from_yaml(one):
    losses = [entry["loss"] for entry in history(one) if "loss" in entry]
    assert len(losses) == 4
    assert len(set(losses)) == 4
    config = json.loads((one / "adapter_config.json").read_text())
    assert config["objectives"] == ["helpful", "harmless"]
    assert "import peft_pblora" in (one / "README.md").read_text()
    assert "eval_harmless_accuracy@uniform" in json.loads((one / "eval_results.json").read_text())


@pytest.mark.parametrize("engine", ["ddp_cpu", pytest.param("fsdp2_cpu", marks=pytest.mark.slow), *ZERO])
def test_two_processes_train_like_one(folder, request, engine):
    """The same loss curve, gradient norms, metrics and weights: with labels that miss in one process, a preference for
    each pair, and gradient accumulation."""
    one = request.getfixturevalue("one_unpacked" if engine in SHARDED else "one")
    launch(folder, engine, "--output_dir", engine)
    for ours, theirs in zip(history(folder / engine), history(one), strict=True):
        measured = {"loss", "grad_norm"} | {k for k in theirs if "/" in k or "@" in k or k == "eval_loss"}
        for name in measured & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    weights = [load_file(path / "adapter_model.safetensors") for path in (folder / engine, one)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert (weights[0][name] - weights[1][name]).abs().max() < 1e-5, name


ENDS = """
import gc, sys
import torch.distributed
from torch.nn.parallel import DistributedDataParallel
from trl_parm.cli.main import main

destroy, made = torch.distributed.destroy_process_group, DistributedDataParallel.__init__
told = []
def construct(self, *args, **kwargs):
    told.append("made")
    made(self, *args, **kwargs)
def end(*args):
    told.append(sum(type(found) is DistributedDataParallel for found in gc.get_objects()))
    destroy(*args)
DistributedDataParallel.__init__, torch.distributed.destroy_process_group = construct, end
main(["train", *sys.argv[1:]])
print("told:", told)
"""


def test_the_process_group_outlives_what_holds_it(folder):
    """The last to hold it waits for its threads, one of which may need the interpreter's lock, which DDP has then."""
    alone_in_a_group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    finished = run(
        folder, sys.executable, "-c", ENDS, "--config", "config.yaml", "--output_dir", "ends",
        MASTER_PORT="0", ACCELERATE_USE_CPU="1", **alone_in_a_group,
    )  # fmt: skip
    assert "told: ['made', 0]" in finished.stdout, finished.stderr


@pytest.mark.slow
def test_two_processes_agree_on_the_maximum_of_their_losses(folder):
    """Where they share a preference, and one has the objective with the largest loss more often."""
    flags = (
        "--aggregation", "tchebycheff", "--preference_per", "step", "--beta", "1.0", "--train_preferences",
        "[0.5, 0.5]", "--gradient_accumulation_steps",
    )  # fmt: skip
    alone(folder, *flags, "2", "--output_dir", "largest")
    curves = [[(e["loss"], e["grad_norm"]) for e in history(folder / "largest") if "loss" in e]]
    for accumulation, batch in (("2", "2"), ("1", "4")):
        launch(
            folder, "ddp_cpu", *flags, accumulation, "--output_dir", "largest2", "--per_device_train_batch_size", batch
        )
        curves.append([(e["loss"], e["grad_norm"]) for e in history(folder / "largest2") if "loss" in e])
    for curve in curves[1:]:
        assert sum(curve, ()) == pytest.approx(sum(curves[0], ()), rel=1e-4)


@pytest.mark.parametrize(
    ("engine", "order"),
    [
        pytest.param("ddp_cpu", "group_by_length", marks=pytest.mark.slow),
        pytest.param("ddp_cpu", "random", marks=pytest.mark.slow),
        pytest.param("fsdp2_cpu", "random", marks=pytest.mark.slow),
        *(pytest.param(*engine.values, "random", marks=engine.marks) for engine in ZERO),
    ],
)
def test_two_processes_resume_bit_by_bit(folder, engine, order):
    """In the middle of an epoch, whose last batch is filled up: 21 rows, 2 in each of 2 processes, twice a step; and
    between two logs, at steps 3 and 6."""
    flags = (
        "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", "broken",
        "--train_sampling_strategy", order, "--logging_steps", "3" if order == "group_by_length" else "1",
    )  # fmt: skip
    shutil.rmtree(folder / "broken", ignore_errors=True)
    launch(folder, engine, *flags)
    whole = [(e["loss"], e["grad_norm"]) for e in history(folder / "broken") if "loss" in e]
    weights = load_file(folder / "broken" / "adapter_model.safetensors")
    shutil.rmtree(folder / "broken" / "checkpoint-6")
    (folder / "broken" / "checkpoint-5" / "trainer_state.json").unlink()  # as if it was being written
    launch(folder, engine, *flags, "--resume", "True")
    assert [(e["loss"], e["grad_norm"]) for e in history(folder / "broken") if "loss" in e] == whole
    resumed = load_file(folder / "broken" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    launch(folder, engine, *flags, "--resume", "True", "--seed", "1", error="another training: seed was 42, but is 1")


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(folder):
    """SIGKILL leaves no time to save anything: what a run goes on from must lie there already."""
    script = (
        sys.executable,
        str(EXAMPLES / "train_arm.py"),
        "--config",
        "config.yaml",
        "--lr_scheduler_type",
        "constant",
    )
    flags = (
        "--max_steps",
        "200",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--save_total_limit",
        "2",
        "--output_dir",
        "killed",
    )
    process = subprocess.Popen(
        [*script, *flags], cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(1200):
        if (folder / "killed" / "checkpoint-4" / "trainer_state.json").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = int(last_complete_checkpoint(folder / "killed").split("-")[-1])
    steps = ("--max_steps", str(done + 3))
    finished = run(folder, *script, *steps, "--resume", "True", "--output_dir", "killed")
    assert finished.returncode == 0, finished.stderr
    finished = run(folder, *script, *steps, "--output_dir", "unkilled")
    assert finished.returncode == 0, finished.stderr
    curves = [
        [(e["loss"], e["grad_norm"]) for e in history(folder / name) if "loss" in e] for name in ("killed", "unkilled")
    ]
    assert len(curves[0]) == done + 3
    assert curves[0] == curves[1]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bf16", ["True", "False"])
def test_a_backbone_in_4_bits(folder, bf16):
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(folder / "base128")
    tiny_tokenizer().save_pretrained(folder / "base128")
    finished = run(
        folder, sys.executable, str(EXAMPLES / "train_arm.py"), "--config", "config.yaml", "--load_in_4bit", "True",
        "--model_name_or_path", "base128", "--output_dir", "four", "--bf16", bf16, "--max_steps", "2",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    weights = load_file(folder / "four" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert all(w.abs().max() > 0 for name, w in weights.items() if ".B." in name)
