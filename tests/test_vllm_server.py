# SPDX-License-Identifier: Apache-2.0
"""`trl-parm serve --engine vllm` over HTTP, against transformers' guided `generate`. `make test-vllm` runs it."""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from demo_folder import spaced_tokenizer


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs a build for CPUs")
openai = pytest.importorskip("openai", reason="needs the extra `dev`")

from trl_parm.decoding import PARM  # noqa: E402
from trl_parm.server.texts import choice_seed  # noqa: E402


OBJECTIVES = ["helpful", "brief"]
SHAPE = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 256}
"""The CPU back end of vLLM has kernels for it."""
ENGINE = {
    "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 40, "max_num_batched_tokens": 2048, "block_size": 32,
    "max_loras": 18, "kv_cache_memory_bytes": 2**26, "disable_log_stats": True,
}  # fmt: skip
TOKENS = 16


def models():
    base = tiny_llama(0, **SHAPE)
    return base, tiny_arm(tiny_llama(0, **SHAPE), OBJECTIVES)


class Server:
    """The command in a process of its own, whose output is read as it comes."""

    def __init__(self, folder: Path, **more: str) -> None:
        words = ["--model_name_or_path", str(folder / "base"), "--arm", str(folder / "arm"), "--engine", "vllm"]
        words += ["--dtype", "float32", "--escape_control_tokens", "false", "--port", "0"]
        words += ["--engine_args", json.dumps(ENGINE), *(w for n, v in more.items() for w in (f"--{n}", v))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_parm", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        self.lines: list[str] = []
        self.url, self._ready = "", threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self._ready.wait(300)
        if not self.url:
            self.process.terminate()
            raise AssertionError("".join(self.lines[-60:]))

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"Serving parm, base at (http://\S+)/v1", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm_server")
    base, arm = models()
    base.save_pretrained(folder / "base")
    spaced_tokenizer().save_pretrained(folder / "base")
    arm.peft_config["default"].base_model_name_or_path = str(folder / "base")
    arm.save_pretrained(folder / "arm")
    server = Server(folder)
    yield server
    server.process.terminate()
    server.process.wait(60)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 64, (3 + i % 5,), generator=generator).tolist() for i in range(count)]


def expected(prompt: list[int], weight: float, beta: float) -> str:
    base, arm = models()
    output = PARM(base, arm, [weight, 1 - weight], beta).generate(torch.tensor([prompt]), max_new_tokens=TOKENS)
    return after(prompt, output[0, len(prompt) :].tolist())


def after(prompt: list[int], tokens: list[int]) -> str:
    """The text with which tokens go on after others."""
    whole, start = (spaced_tokenizer().decode(ids, skip_special_tokens=True) for ids in (prompt + tokens, prompt))
    return whole[len(start) :]


def ask(server, prompt, weight=None, beta=None, **settings):
    extra = {} if weight is None else {"preference": {"helpful": weight, "brief": 1 - weight}, "beta": beta}
    return server.client.completions.create(
        prompt=prompt, extra_body=extra, **{"model": "parm", "max_tokens": TOKENS, "temperature": 0, **settings}
    )


def test_sixteen_families_with_sixteen_preferences(server):
    """At once, over HTTP, token by token the texts of transformers; none was exported before."""
    asked = [(prompt, i / 15, [0.5, 1.0, 2.0][i % 3]) for i, prompt in enumerate(prompts(16))]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: ask(server, *one).choices[0].text, asked))
    wanted = [expected(*one) for one in asked]
    print(f"{sum(a == b for a, b in zip(found, wanted))} of 16 texts identical")
    assert found == wanted


def test_the_base_is_unguided_beside_them(server):
    base, _ = models()
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(ask, server, prompts(2)[0], model="base") for _ in range(2)]
        guided = [pool.submit(ask, server, prompts(2)[0], 0.2, 1.0) for _ in range(2)]
        output = base.generate(torch.tensor(prompts(1)), max_new_tokens=TOKENS)[0, 3:].tolist()
        text = after(prompts(1)[0], output)
        assert [one.result().choices[0].text for one in found] == [text] * 2
        assert [one.result().choices[0].text for one in guided] == [expected(prompts(1)[0], 0.2, 1.0)] * 2


def test_streams_choices_and_stops(server):
    prompt = prompts(3)[2]
    whole = ask(server, prompt, 0.2, 1.0)
    chunks = list(ask(server, prompt, 0.2, 1.0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    stop = whole.choices[0].text.split()[3]
    for stream in (False, True):
        answer = ask(server, prompt, 0.2, 1.0, stop=stop, stream=stream)
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
        assert "".join(c.text for c in choices) == whole.choices[0].text.partition(stop)[0]
        assert choices[-1].finish_reason == "stop"
    sampled = ask(server, prompt, 0.2, 1.0, temperature=1.0, seed=4, n=3)
    assert len({choice.text for choice in sampled.choices}) == 3
    again = ask(server, prompt, 0.2, 1.0, temperature=1.0, seed=4, n=3)
    assert [c.text for c in again.choices] == [c.text for c in sampled.choices]
    assert choice_seed(4, 0) != choice_seed(4, 1)


def test_chats_and_what_was_used(server):
    raw = server.client.chat.completions.with_raw_response.create(
        model="parm", messages=[{"role": "user", "content": "w3 w9"}], temperature=0, max_tokens=8,
        extra_body={"preference": [0.2, 0.8], "beta": 0.5},
    )  # fmt: skip
    assert raw.headers["x-preference"] == '{"helpful": 0.2, "brief": 0.8}'
    assert raw.headers["x-beta"] == "0.5"
    assert raw.parse().choices[0].message.content


WRONG = [
    ({"preference": {"helpfull": 1, "brief": 0}}, "Did you mean 'helpful'"),
    ({"preference": [0.5, 0.6]}, "sum to 1"),
    ({"beta": 0}, "must be a number"),
    ({"temprature": 1}, "not known"),
    ({"vllm_xargs": {"guidance_preference": [1, 0]}}, "without `guidance_`"),
    ({"presence_penalty": 1.0}, "presence_penalty"),
    ({"preference": [1, 0], "model": "base"}, "has no preference"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_bad_requests(server, fields, message):
    body = {"model": "parm", "prompt": [7, 8], "max_tokens": 2, "temperature": 0, **fields}
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        server.client.post("/completions", body=body, cast_to=object)
    assert ask(server, [7, 8], 0.2, 1.0).choices[0].text == expected([7, 8], 0.2, 1.0)


def test_what_would_answer_unguided_is_not_there(server):
    for path in ("/responses", "/messages", "/embeddings", "/load_lora_adapter"):
        with pytest.raises(openai.NotFoundError):
            server.client.post(path, body={}, cast_to=object)


def test_clients_that_go_away_leave_no_family_behind(server):
    for i in range(6):
        with ask(server, prompts(3)[i % 3], i / 5, 1.0, stream=True, max_tokens=100) as stream:
            next(iter(stream))
    assert ask(server, [7, 8], 0.2, 1.0).choices[0].text == expected([7, 8], 0.2, 1.0)
    assert server.process.poll() is None
