# SPDX-License-Identifier: Apache-2.0
"""Evaluation with vLLM as its engine, on a double of it that runs real models: the tables are those of transformers.

`test_vllm_evaluation.py` runs on vLLM itself.
"""

import importlib
import json
import os

import fake_vllm
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, tiny_tokenizer
from evaluation_models import GRID, LORAS, METHODS, PROMPTS, REWARDS, same_rows, write_models
from fake_vllm import FakeLLM
from peft import LoraConfig, get_peft_model

from peft_pblora import MoSLoraConfig
from trl_parm.cli.main import main
from trl_parm.evaluation.evaluate import evaluate
from trl_parm.evaluation.models import Models
from trl_parm.processes import Processes
from trl_parm.records import plain


pytestmark = pytest.mark.skipif(fake_vllm.INSTALLED, reason="vLLM itself is here, see test_vllm_evaluation.py")
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02}
FEW = METHODS[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    tiny_llama(9).save_pretrained(folder / "other")
    tiny_gpt2().save_pretrained(folder / "gpt2")
    for name, kind in (
        ("moslora", MoSLoraConfig(objectives=list(REWARDS), r=2, target_modules=["q_proj"], init_weights=False)),
        ("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
        ("pissa", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")),
        ("large", LoraConfig(r=600, target_modules=["q_proj"])),
    ):
        model = get_peft_model(tiny_llama(0), kind)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    for name in ("other", "gpt2", "lora_one"):
        tiny_tokenizer().save_pretrained(folder / name)
    penalised = tiny_llama(0)
    penalised.generation_config.repetition_penalty = 1.1
    penalised.save_pretrained(folder / "penalised")
    tiny_tokenizer().save_pretrained(folder / "penalised")
    return folder


@pytest.fixture
def vllm(monkeypatch, folder):
    """The double in vLLM's place, and the folder of models as the working directory; gives the engine's models."""
    fake_vllm.install(monkeypatch)
    monkeypatch.setattr(FakeLLM, "started", [])
    monkeypatch.chdir(folder)
    from trl_parm.evaluation.on_vllm import OnVLLM

    return lambda base="base", dtype="float32", **engine_args: OnVLLM(
        str(folder / base), dtype, **{"max_loras": 3, **engine_args}
    )


def table(models, methods, path=None, **settings):
    settings = {"max_new_tokens": 3, "batch_size": 8, "path": path, **settings}
    return evaluate(models, methods, settings.pop("grid", GRID), PROMPTS[:2], REWARDS, **settings)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tables_are_those_of_transformers(vllm, folder, settings):
    """Batches have more LoRAs than there are slots, of which one must stay free on this platform."""
    methods = [*FEW, *METHODS[4:7], METHODS[-1]] if not settings else FEW[::2]
    found = table(vllm(), methods, **settings)
    assert all(same_rows(found, table(Models(str(folder / "base"), "float32"), methods, **settings)))
    (llm,) = FakeLLM.started
    assert llm.most_loras == 2
    assert not llm.loaded
    assert len(llm.used) == (3 + 2 + 3 + 2 + 3 if not settings else 2)


def test_where_the_last_slot_does_not_leak_loras_wait_for_slots(vllm, folder, monkeypatch):
    """All of a batch is handed over at once, and families wait for a slot."""
    ops, client = map(importlib.import_module, ("vllm.lora.ops.torch_ops", "trl_parm.serving.client"))
    monkeypatch.setattr(ops, "bgmv_shrink", lambda inputs, weights, output, indices, scaling: None)
    monkeypatch.setattr(FakeLLM, "logits", of_lora)
    handed, run = [], client._run
    monkeypatch.setattr(client, "_run", lambda *given: (handed.append(len(given[2])), run(*given)))
    found = table(vllm(max_loras=2), FEW[1:], batch_size=12)
    assert all(same_rows(found, table(Models(str(folder / "base"), "float32"), FEW[1:], batch_size=12)))
    assert handed == [6, 2, 2, 2]


@torch.no_grad()
def of_lora(llm, text, lora):
    return (llm.loaded[lora] if lora else llm.base)(torch.tensor([text])).logits[0, -1]


def test_the_record_names_the_engine_and_keeps_engines_apart(vllm, folder, tmp_path):
    path = tmp_path / "results.jsonl"
    table(vllm(max_num_seqs=9), ["base"], path)
    record = json.loads((tmp_path / "results.config.json").read_text())
    assert record["loading"] == {"engine": "vllm", "engine_version": "0.0-fake", "dtype": "float32"}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="loading engine was vllm, but is gone"):
        table(Models(str(folder / "base"), "float32"), FEW, path)
    other = vllm()
    other.version = "0.1-fake"
    with pytest.raises(ValueError, match="engine_version was 0.0-fake, but is 0.1-fake"):
        table(other, FEW, path)
    assert path.read_bytes() == before
    more = table(vllm(max_num_seqs=7), FEW, path)  # goes on: less room changes no row
    assert len(more) == 14
    assert path.read_bytes().startswith(before)
    table(vllm(), FEW, path)
    assert len(FakeLLM.started) == 2  # where all is done, no engine starts


GENARM = {"method": "genarm", "arms": LORAS}
REFUSED = {
    "no slots": (dict(max_loras=0), FEW, {}, "`max_loras` is 0, but it must be 1 or larger"),
    "LoRA turned off": (dict(enable_lora=False), FEW, {}, "enable_lora, which is set here"),
    "fewer slots than a text needs": (
        dict(max_loras=2), FEW, {}, "needs 2 LoRAs at once, but the engine has 2 slots.* Set .*max_loras: 3"
    ),
    "unknown argument": (dict(max_lora=4), FEW, {}, "max_lora, which vLLM 0.0-fake does not know"),
    "drafts": (dict(speculative_config={}), FEW, {}, "speculative_config, which is set here"),
    "a short engine": (dict(max_model_len=8), FEW, {}, "are 9, but vLLM's `max_model_len` is 8"),
    "no places": (dict(max_num_seqs=2), FEW, {}, "are 3, but vLLM's `max_num_seqs` is 2"),
    "few tokens": (dict(max_num_batched_tokens=17), FEW, {}, "`max_num_batched_tokens` is 17"),
    "CAGE": ({}, [*FEW, {"method": "cage", "arm": "arm"}], {}, "'CAGE' can't run on vllm.*engine: transformers"),
    "search": ({}, [{"method": "args", "rewards": {"a": "gone"}}], {}, "'ARGS' can't run on vllm"),
    "a text of preferences": ({}, [{"method": "parm_prompt", "arm": "arm"}], {}, "can't run on vllm"),
    "another divergence": (
        {}, [{"method": "mod", "policies": LORAS, "divergence": "forward_kl"}], {}, "PowerMean.*no weighted sum"
    ),
    "another prompt": ({}, [{"method": "parm", "arm": "arm", "template": "w9 {prompt}"}], {}, "read another prompt"),
    "another model": (
        {}, [{"method": "genarm", "arms": {**LORAS, "helpful": "other"}}], {}, "'other' must be an adapter on the base"
    ),
    "whole soups": ({}, [{"method": "rewarded_soups", "policies": dict.fromkeys(LORAS, "other")}], {}, "must be an"),
    "a shift": ({}, [{"method": "parm", "arm": "moslora"}], {}, "'moslora' is or has a shift"),
    "DoRA": ({}, [{"method": "genarm", "arms": {**LORAS, "helpful": "dora"}}], {}, "'dora' is or has DoRA"),
    "PiSSA": ({}, [{"method": "genarm", "arms": {**LORAS, "helpful": "pissa"}}], {}, "init_lora_weights='pissa'"),
    "a rank": ({}, [{"method": "genarm", "arms": {**LORAS, "helpful": "large"}}], {}, "rank 600, but vLLM takes"),
    "no adapter": ({}, [{"method": "parm", "arm": "nowhere"}], {}, "nowhere"),
    "an architecture": (dict(base="gpt2"), ["base"], {}, "can't take the model .*not supported for now"),
    "an adapter as the base": (dict(base="lora_one"), ["base"], {}, "There is no model to read at"),
    "a penalty": (dict(base="penalised"), ["base"], {}, "repetition_penalty=1.1, which acts on tokens"),
    "another setting": ({}, FEW, {"repetition_penalty": 1.2}, "repetition_penalty can't be had on vLLM"),
    "no length": ({}, FEW, {"max_new_tokens": None}, "no `max_new_tokens`"),
    "too cool": ({}, FEW, {"do_sample": True, "temperature": 0.001}, "vLLM has none below"),
    "off the simplex": ({}, FEW, {"grid": [[0.5, 0.6]]}, "sum to 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_had_is_refused_before_anything_is_started_or_written(vllm, tmp_path, case):
    engine, methods, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        table(vllm(**engine), methods, tmp_path / "results.jsonl", **settings)
    assert not FakeLLM.started
    assert not list(tmp_path.iterdir())


def test_preferences_beyond_the_simplex(vllm, folder):
    """Weights of guides may be negative."""
    settings = {"grid": [[1.5, -0.5]], "allow_off_simplex": True}
    methods = [{"method": "parm", "arm": "arm"}, GENARM]
    expected = table(Models(str(folder / "base"), "float32"), methods, **settings)
    assert all(same_rows(table(vllm(), methods, **settings), expected))


def test_weights_keep_the_dtype_that_they_were_saved_in(vllm):
    table(vllm(dtype="auto"), ["base"])
    assert FakeLLM.started[0].args.dtype == "float32"


def test_each_process_starts_its_own_engine(vllm, monkeypatch):
    from trl_parm.evaluation.on_vllm import engine_environment, environment

    assert engine_environment(Processes()) == {}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    changes = engine_environment(Processes(1, 2, 2))
    assert changes["VLLM_WORKER_MULTIPROCESSING_METHOD"] == "spawn"
    before = dict(os.environ)
    with environment(changes):
        assert "RANK" not in os.environ
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert dict(os.environ) == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert engine_environment(Processes(1, 2, 2), 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert engine_environment(Processes(1, 2, 2))["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    with pytest.raises(ValueError, match="need 4, but there are 3"):
        engine_environment(Processes(1, 2, 2), 2)


def test_no_token_of_access_is_recorded(vllm):
    assert plain({"engine_args": {"hf_token": "secret", "max_loras": 2}}) == {"engine_args": {"max_loras": 2}}
    assert "hf_token" not in vllm(hf_token="secret").loading


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vlm"], "must be one of transformers, vllm"),
        (["--engine_args", '{"max_loras": 4}'], "are vLLM's"),
        (["--engine", "vllm", "--model_kwargs", '{"device_map": "auto"}'], "can't be had with `engine: vllm`"),
        (["--engine", "vllm", "--optimize_for_cpu", "false"], "can't be had with `engine: vllm`"),
        (["--engine", "vllm", "--engine_args", '{"dtype": "half"}'], "which is a key of its own"),
        (["--engine", "vllm"], r"needs vllm: pip install 'trl-parm[vllm]'"),
    ],
)
def test_arguments_of_the_command(capsys, tmp_path, words, message):
    given = ["--model_name_or_path", "m", "--prompts", "w1", "--methods", "base", "--rewards"]
    given += ['{"helpful": "trl_parm.rewards:brevity"}', "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *given, *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
