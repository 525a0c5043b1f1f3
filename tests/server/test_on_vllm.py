# SPDX-License-Identifier: Apache-2.0
"""What serving on vLLM does without vLLM: exports as they are asked for, and requests as its server reads them."""

import asyncio
import importlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from conftest import tiny_arm, tiny_llama
from demo_folder import spaced_tokenizer
from safetensors.torch import load_file

from peft_pblora import save_as_lora
from trl_parm.cli.main import main
from trl_parm.server.errors import RequestError
from trl_parm.server.on_vllm.command import guided_model
from trl_parm.server.on_vllm.exports import Export, Exports
from trl_parm.server.on_vllm.middleware import BETA, PREFERENCE, PreferenceMiddleware, guided_body


OBJECTIVES = ["helpful", "brief"]
KNOWN = {"model", "prompt", "temperature", "vllm_xargs", "use_beam_search", "cache_salt", "priority"}
CLIENT = "trl_parm.server.on_vllm.client"


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


def test_an_export_that_fails_takes_no_place(folder, monkeypatch):
    own = exports(folder, most=1)
    first, _ = own.take([1.0, 0.0])
    own.give_back(first)

    def full(preference):
        raise OSError("No space left on device")

    with monkeypatch.context() as context, pytest.raises(OSError, match="No space"):
        context.setattr(own, "_export", full)
        own.take([0.0, 1.0])
    again, gone = own.take([1.0, 0.0])
    assert again is first
    assert not gone
    own.give_back(again)
    assert own.take([0.0, 1.0])[1] == [first]


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
    for fields in ({}, {"use_beam_search": True, "cache_salt": "a", "priority": 1}):
        body = {"model": "base", "prompt": "w3", **fields}
        assert guided_body(body, guided, KNOWN, headers) == body
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
        ({"use_beam_search": True}, "use_beam_search"),
        ({"model": "parm", "use_beam_search": "true", "preference": [1, 0]}, "use_beam_search"),
        ({"cache_salt": "a"}, "cache_salt"),
        ({"priority": -1}, "priority"),
    ],
)
def test_what_is_refused(guided, body, param):
    headers = []
    with pytest.raises(RequestError) as caught:
        guided_body(body, guided, KNOWN, headers)
    assert caught.value.param == param
    assert not headers


def test_what_guided_requests_can_not_have_may_be_left_as_it_is(guided):
    body = {"use_beam_search": False, "cache_salt": None, "priority": 0}
    assert guided_body(body, guided, KNOWN, []).items() >= body.items()


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/load_lora_adapter", "/pause", "/v1//models", "/"]
)
def test_what_would_answer_unguided_is_not_reachable(path):
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


# The engine's client


@pytest.fixture
def on_doubles(monkeypatch):
    """Its module, on the doubles of vLLM."""
    fake_vllm.install(monkeypatch)
    monkeypatch.delitem(sys.modules, CLIENT, raising=False)
    yield importlib.import_module(CLIENT)
    sys.modules.pop(CLIENT, None)


class Engine:
    """An engine that removes LoRAs when it may, or fails to."""

    errored = False

    def __init__(self) -> None:
        self.vllm_config, self.get_tokenizer = fake_vllm.config_of_engine(), spaced_tokenizer
        self.removed, self.broken, self.may_remove = [], False, asyncio.Event()
        self.may_remove.set()

    async def remove_lora(self, number: int) -> None:
        if self.broken:
            raise OSError("The engine can't be reached")
        await self.may_remove.wait()
        self.removed.append(number)


async def use(client, preference) -> Path:
    """The folder of the LoRA at a preference, of a request that is done with it."""
    async with client._lora(preference) as lora:
        return Path(lora.lora_path)


async def goes_away(request: asyncio.Task) -> None:
    request.cancel()
    await asyncio.wait({request})


def users(own: Exports) -> list[int]:
    return [export.users for export in own._kept.values()]


def test_a_client_that_goes_away_while_its_lora_is_exported(on_doubles, folder, monkeypatch):
    """The next one waits for that export, and both places are free again."""
    own, begun, goes_on = exports(folder), threading.Event(), threading.Event()
    export = own._export

    def slow(preference):
        begun.set()
        assert goes_on.wait(30)
        return export(preference)

    monkeypatch.setattr(own, "_export", slow)

    async def main():
        client = on_doubles.GuidedClient(Engine(), own, None, 1000)
        first = asyncio.create_task(use(client, [0.1, 0.9]))
        assert await asyncio.to_thread(begun.wait, 30)
        await goes_away(first)
        begun.clear()
        others = [asyncio.create_task(use(client, preference)) for preference in ([0.2, 0.8], [0.3, 0.7])]
        await asyncio.sleep(0.1)
        assert not begun.is_set()
        await goes_away(others[0])
        goes_on.set()
        await others[1]
        assert users(own) == [0, 0]
        assert list(own._kept) == [pytest.approx([0.1, 0.9]), pytest.approx([0.3, 0.7])]
        assert (await use(client, [0.4, 0.6])).exists()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_client_that_goes_away_while_another_lora_leaves_the_engine(on_doubles, folder):
    own = exports(folder, most=1)

    async def main():
        engine = Engine()
        client = on_doubles.GuidedClient(engine, own, None, 1000)
        first = await use(client, [1.0, 0.0])
        engine.may_remove.clear()
        second = asyncio.create_task(use(client, [0.0, 1.0]))
        while not client._leaving:
            await asyncio.sleep(0.01)
        await goes_away(second)
        assert first.exists()
        engine.may_remove.set()
        third = await use(client, [0.0, 1.0])
        assert (engine.removed, users(own)) == ([1], [0])
        assert (first.exists(), third.exists()) == (False, True)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_lora_that_can_not_leave_the_engine_keeps_its_files_and_is_tried_again(on_doubles, folder):
    own = exports(folder, most=1)

    async def main():
        engine = Engine()
        client = on_doubles.GuidedClient(engine, own, None, 1000)
        first = await use(client, [1.0, 0.0])
        engine.broken = True
        for preference in ([0.0, 1.0], [0.0, 1.0], [1.0, 0.0]):
            with pytest.raises(OSError, match="can't be reached"):
                await use(client, preference)
            assert first.exists()
            assert users(own) == [0]
        engine.broken = False
        last = await use(client, [1.0, 0.0])
        assert (engine.removed, users(own)) == ([1, 2], [0])
        assert list(last.parent.iterdir()) == [last]

    asyncio.run(asyncio.wait_for(main(), 60))


PROMPT, WORDS = "w3 w9", "w4 w5 w6 w5 w7"
EACH = (1, 2, 3, 4, 5)


def written(tokenizer, cuts, words):
    """What the base model's request tells of some words, after so many tokens each time."""
    prompt, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, words))
    for count in cuts:
        text = tokenizer.decode(prompt + tokens[:count])[len(PROMPT) :]
        one = dict(text=text, token_ids=tokens[:count], logprobs=None, finish_reason=None, stop_reason=None)
        yield SimpleNamespace(outputs=[SimpleNamespace(**one)], finished=count == len(tokens))


def answered(on_doubles, cuts, delta, words=WORDS, **settings) -> tuple[str, object, bool]:
    """A guided text, its stop string and whether its last output says that it is finished."""
    tokenizer = spaced_tokenizer()

    class Written:
        async def generate(self, ids, params, own):
            assert not params.stop
            for output in written(tokenizer, cuts, words):
                yield output

    kept = SimpleNamespace(take=lambda preference: (Export(1, Path("lora")), []), give_back=lambda export: None)
    params = fake_vllm.SamplingParams(extra_args={PREFERENCE: [1.0, 0.0], BETA: 1.0})
    params.output_kind = getattr(fake_vllm.RequestOutputKind, "DELTA" if delta else "FINAL_ONLY")
    for name, value in settings.items():
        setattr(params, name, value)

    async def main():
        client = on_doubles.GuidedClient(Engine(), kept, None, 1000)
        client._guidance = Written()
        prompt = {"type": "token", "prompt_token_ids": tokenizer(PROMPT, add_special_tokens=False)["input_ids"]}
        return [output async for output in client.generate(prompt, params, "a")]

    outputs = asyncio.run(main())
    texts = [output.outputs[0].text for output in outputs]
    assert delta or len(texts) == 1
    return "".join(texts), outputs[-1].outputs[0].stop_reason, outputs[-1].finished


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("cuts", [EACH, (1, 3, 5), (5,)], ids=str)
@pytest.mark.parametrize(
    ("settings", "text", "stop"),
    [
        ({"stop": ["w5"]}, " w4 ", "w5"),
        ({"stop": ["w5"], "include_stop_str_in_output": True}, " w4 w5", "w5"),
        ({"stop": ["w5"], "min_tokens": 1}, " w4 ", "w5"),
        ({"stop": ["w5"], "min_tokens": 2}, " w4 w5 w6 ", "w5"),
        ({"stop": ["w5"], "min_tokens": 2, "include_stop_str_in_output": True}, " w4 w5 w6 w5", "w5"),
        ({"stop": ["w5"], "min_tokens": 4}, " w4 w5 w6 w5 w7", None),
        ({"stop": ["w5 w6"], "min_tokens": 2}, " w4 ", "w5 w6"),
        ({"stop": ["w4 w5", "5"]}, " ", "w4 w5"),
        ({"stop": ["w4 w5 w6", "w6", "5"]}, " w4 w", "5"),
        ({"stop": ["w8"], "min_tokens": 3}, " w4 w5 w6 w5 w7", None),
        ({"min_tokens": 3}, " w4 w5 w6 w5 w7", None),
    ],
)
def test_where_a_text_stops(on_doubles, settings, text, stop, cuts, delta):
    """As with vLLM's own stop strings, in outputs of any size: it looks for them after each token."""
    assert answered(on_doubles, cuts, delta, **settings) == (text, stop, True)


def test_special_tokens_that_have_a_text_are_of_the_first_tokens(on_doubles):
    given = {"words": "<eos> w5 w6 w5", "stop": ["w5"], "min_tokens": 2, "skip_special_tokens": False}
    assert answered(on_doubles, (1, 3, 4), False, **given) == (" <eos> w5 w6 ", "w5", True)


@pytest.mark.parametrize("kind", ["multimodal", "embeds"])
def test_prompts_that_are_more_than_text_are_refused(on_doubles, kind):
    with pytest.raises(ValueError, match="must be text"):
        on_doubles._ids({"type": kind, "prompt_token_ids": [5, 6]})
