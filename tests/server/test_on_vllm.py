# SPDX-License-Identifier: Apache-2.0
"""What serving on vLLM does without vLLM: exports as they are asked for, and requests as its server reads them."""

import json

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from safetensors.torch import load_file

from peft_pblora import save_as_lora
from trl_parm.cli.main import main
from trl_parm.server.errors import RequestError
from trl_parm.server.on_vllm.command import guided_model
from trl_parm.server.on_vllm.exports import Exports
from trl_parm.server.on_vllm.middleware import BETA, PREFERENCE, PreferenceMiddleware, guided_body


OBJECTIVES = ["helpful", "brief"]
KNOWN = {"model", "prompt", "temperature", "vllm_xargs"}


@pytest.fixture
def folder(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "base")
    tiny_llama(3).save_pretrained(tmp_path / "other")
    arm = tiny_arm(tiny_llama(0), OBJECTIVES)
    arm.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    arm.save_pretrained(tmp_path / "arm")
    (tmp_path / "loras").mkdir()
    return tmp_path


def exports(folder, most: int = 2) -> Exports:
    return Exports(str(folder / "base"), str(folder / "arm"), folder / "loras", most)


def test_an_export_is_that_of_the_whole_model(folder):
    """Though no weight of the base model was loaded."""
    own = exports(folder)
    assert (own.objectives, own.rank) == (OBJECTIVES, 8)
    export, gone = own.take([0.3, 0.7])
    assert not gone
    whole = tiny_arm(tiny_llama(0), OBJECTIVES)
    (expected,) = save_as_lora(whole, folder / "expected", [0.3, 0.7], rank=8)
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (export.path, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_least_recent_export_goes_and_no_name_comes_back(folder):
    own = exports(folder)
    first, _ = own.take([0.3, 0.7])
    again, _ = own.take([0.3, 0.7])
    assert again is first
    assert first.users == 2
    second, gone = own.take([1.0, 0.0])
    assert not gone
    with pytest.raises(RuntimeError, match="All 2 LoRAs are in use"):
        own.take([0.5, 0.5])
    for export in (first, first, second):
        own.give_back(export)
    own.give_back(own.take([0.3, 0.7])[0])  # it is the more recent one now
    third, gone = own.take([0.5, 0.5])
    assert gone == [second]
    own.remove(second)
    assert not second.path.exists()
    assert first.path.exists()
    own.give_back(third)
    back, gone = own.take([1.0, 0.0])
    assert gone == [first]
    assert len({export.name for export in (first, second, third, back)}) == 4
    assert len({export.number for export in (first, second, third, back)}) == 4


def test_an_arm_on_another_model_is_refused(folder):
    with pytest.raises(ValueError, match="must be an adapter on the base model"):
        Exports(str(folder / "other"), str(folder / "arm"), folder / "loras", 2)


@pytest.fixture
def guided(folder):
    return guided_model(exports(folder), {"helpful": 0.9, "brief": 0.1}, 0.5)


def test_a_preference_becomes_free_form_arguments(guided):
    headers = []
    found = guided_body({"model": "parm", "preference": [0.2, 0.8], "temperature": 0}, guided, KNOWN, headers)
    assert found == {"model": "parm", "temperature": 0, "vllm_xargs": {PREFERENCE: [0.2, 0.8], BETA: 0.5}}
    assert dict(headers) == {b"x-preference": b'{"helpful": 0.2, "brief": 0.8}', b"x-beta": b"0.5"}
    defaults = guided_body({"prompt": "w3", "vllm_xargs": {"a": 1}}, guided, KNOWN, [])
    assert defaults["model"] == "parm"
    assert defaults["vllm_xargs"] == {"a": 1, PREFERENCE: [0.9, 0.1], BETA: 0.5}


def test_other_models_have_none(guided):
    headers = []
    assert guided_body({"model": "base", "prompt": "w3"}, guided, KNOWN, headers) == {"model": "base", "prompt": "w3"}
    assert not headers


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"preference": {"helpfull": 1, "brief": 0}}, "preference"),
        ({"preference": [0.5, 0.6]}, "preference"),
        ({"beta": -1}, "beta"),
        ({"model": "base", "preference": [1, 0]}, "preference"),
        ({"model": "base", "beta": 1}, "beta"),
        ({"temprature": 1}, "temprature"),
        ({"vllm_xargs": {PREFERENCE: [1, 0]}}, "vllm_xargs"),
        ({"model": "base", "vllm_xargs": {"guidance_role": 0}}, "vllm_xargs"),
        ({"vllm_xargs": 5}, "vllm_xargs"),
    ],
)
def test_what_is_refused(guided, body, param):
    with pytest.raises(RequestError) as caught:
        guided_body(body, guided, KNOWN, [])
    assert caught.value.param == param


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/load_lora_adapter", "/pause", "/v1//models", "/"]
)
def test_what_would_answer_unguided_is_not_reachable(path):
    import asyncio

    async def app(scope, receive, send):
        raise AssertionError("reached")

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(PreferenceMiddleware(app)({"type": "http", "path": path, "method": "POST"}, None, send))
    assert sent[0]["status"] == 404
    assert json.loads(sent[1]["body"])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "vlm"], "must be one of transformers, vllm"),
        (["--engine_args", "{}", "--engine", "transformers", "--max_rows", "0"], "1 or larger"),
        (["--engine_args", '{"max_loras": 4}'], "are vLLM's"),
        (["--engine", "vllm", "--max_rows", "4", "--escape_control_tokens", "false"], "max_rows can't be had"),
        (["--engine", "vllm"], "control tokens in a message act"),
    ],
)
def test_arguments_that_the_engine_does_not_have(capsys, words, message):
    assert main(["serve", "--model_name_or_path", "m", "--arm", "a", *words]) == 2
    assert message in capsys.readouterr().err
