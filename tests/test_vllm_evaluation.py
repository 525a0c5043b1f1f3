# SPDX-License-Identifier: Apache-2.0
"""`evaluate` on vLLM itself: tables of greedy and sampled texts, row by row those of transformers. `make test-vllm`
runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_models import GRID, METHODS, PROMPTS, REWARDS, SHAPE, same_rows, write_models


# Errors of the engine reach the test as they are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs a build for CPUs")

from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.models import Models
from trl_parm.evaluation.on_vllm import OnVLLM


ENGINE = {
    "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 256, "block_size": 32,
    "kv_cache_memory_bytes": 2**25, "max_loras": 5,
}  # fmt: skip
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, **SHAPE)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    models = OnVLLM(str(folder / "base"), "float32", **ENGINE)
    yield models
    models.close()


def table(models, folder, methods=METHODS, path=None, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return evaluate(models, methods, GRID, PROMPTS, REWARDS, path, batch_size=8, max_new_tokens=16, **settings)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tables_are_those_of_transformers(models, folder, settings):
    """In float32, of all that vLLM runs: with fewer slots for LoRAs than a batch needs, and with LoRAs that come and
    go."""
    found = table(models, folder, **settings)
    expected = table(Models(str(folder / "base"), "float32"), folder, **settings)
    same = same_rows(found, expected)
    print(f"{sum(same)} of {len(same)} rows are those of transformers")
    assert all(same)
    assert len(set(found["response"])) > len(found) // 4


@pytest.mark.slow
def test_two_processes_with_an_engine_each(folder):
    """By the command, with `accelerate launch`: the table is that of one process."""
    config = {
        "model_name_or_path": "base", "dtype": "float32", "engine": "vllm", "engine_args": ENGINE,
        "methods": METHODS[:2],
        "rewards": {"helpful": "trl_parm.rewards:brevity", "harmless": "trl_parm.rewards:conciseness"},
        "preferences": GRID, "prompts": PROMPTS, "max_new_tokens": 16, "batch_size": 4, "output_dir": "two",
    }  # fmt: skip
    (folder / "two.yaml").write_text(json.dumps(config))
    on_cpus = Path(__file__).parents[1] / "examples" / "accelerate_configs" / "ddp_cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(on_cpus), "-m", "trl_parm"]
    ran = subprocess.run(
        [sys.executable, *launch, "evaluate", "--config", "two.yaml"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "two" / "results.jsonl").read_text().splitlines()]
    assert all(same_rows(rows, table(Models(str(folder / "base"), "float32"), folder, METHODS[:2])))
    record = json.loads((folder / "two" / "results.config.json").read_text())
    assert record["loading"]["engine"] == "vllm"
    assert record["loading"]["engine_version"]
