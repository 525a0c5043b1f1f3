# SPDX-License-Identifier: Apache-2.0
"""The command: what it refuses before it begins, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from conftest import tiny_arm, tiny_llama
from demo_folder import spaced_tokenizer

from trl_parm.arguments import parse
from trl_parm.cli.main import main
from trl_parm.server.command import KEYS, ServeArguments, bind


pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")

from server.running import ESCAPES, OBJECTIVES, SIZES, save_models, save_on


SECRET = "w41 w42 w43"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    save_models(folder)
    return folder


def refused(capsys, *words: str) -> str:
    """The one line with which a command ends that can't begin."""
    assert main(["serve", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-parm serve: error: ")]
    assert len(lines) == 1
    return lines[0]


def words(folder, **given: str) -> list[str]:
    given = {"model_name_or_path": str(folder / "base"), "escape_control_tokens": str(ESCAPES), "port": "0", **given}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def test_a_port_in_use(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"The port {port} of 127.0.0.1 can't be had" in refused(capsys, *words(folder, port=str(port)))


WORST = '{"method": "worst_case", "arm": "ARM"}'


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": '{"method": "parm"}'}, "has no arm"),
        ({"template": "no place"}, "has no {prompt}"),
        ({"max_prompt_tokens": "0"}, "`max_prompt_tokens` is 0"),
        ({"methods": '{"method": "parn"}'}, "must be one of"),
        ({"methods": '["base"]'}, "Two models are called 'base'"),
        ({"methods": f"[{', '.join(2 * [WORST])}]"}, "Two models are called 'worst_case'"),
        ({"methods": '{"method": "args", "rewards": {"a": "trl_parm.rewards:brevity"}}'}, "can't be served"),
        ({"methods": '{"method": "rewarded_soups", "policies": {"a": "b"}}'}, "can't be served"),
        ({"arm": "ARM", "methods": '["parm"]'}, "Give that one a `name`"),
        ({"arm": "ARM", "preference": '{"helpful": 1, "harmless": 0}'}, "the objectives served are helpful, brief"),
        ({"arm": "ARM", "preference": '{"helpful": 1, "brief": 1}'}, "must sum to 1"),
        ({"arm": "ARM", "beta": "0"}, "must be a positive"),
        ({"max_rows": "0"}, "1 or larger"),
        ({"max_seconds": "0"}, "must be positive"),
        ({"prot": "1"}, "Did you mean `port`"),
        ({"port": "70000"}, "from 0 to 65535"),
        ({"host": "no.such.host.invalid"}, "can't be had"),
        ({"arm": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_what_can_not_begin(folder, capsys, given, message):
    given = {name: str(folder / "arm") if value == "ARM" else value for name, value in given.items()}
    assert message in refused(capsys, *words(folder, **given))


def test_an_arm_of_another_vocabulary(folder, capsys, tmp_path):
    """Without a tokenizer that would align it."""
    other = tiny_llama(3, vocab_size=80, **SIZES)
    other.save_pretrained(tmp_path / "other")
    tokenizer = spaced_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(5)])
    core = tokenizer.backend_tokenizer.to_str().replace('"w1"', '"another"')
    tokenizer.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(core)
    save_on(tmp_path, "other", tiny_arm(other, OBJECTIVES), "arm")
    line = refused(capsys, *words(folder, arm=str(tmp_path / "arm")))
    assert "tokenizer" in line or "vocabular" in line


def test_keys_come_from_a_flag_and_the_environment(monkeypatch):
    monkeypatch.setenv(KEYS, "one, two,,")
    given = parse("serve", ServeArguments, ["--model_name_or_path", "m", "--api-key", "three"])
    assert given.keys() == ["three", "one", "two"]
    monkeypatch.delenv(KEYS)
    assert ServeArguments("m").keys() == []


def test_starts_on_loopback():
    assert ServeArguments("m").host == "127.0.0.1"
    with bind("127.0.0.1", 0) as one, bind("::1", 0) if socket.has_ipv6 else bind("localhost", 0) as other:
        assert one.getsockname()[1] != other.getsockname()[1]


class Command:
    """The command in a process of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        settings = ["--arm", str(folder / "arm"), "--dtype", "float32", "--optimize_for_cpu", "false", *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trl_parm", "serve", *words(folder), *settings], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        self.ready = self.process.stdout.readline()
        self.url = re.search(r"http://[\d.]+:\d+", self.ready)[0]


def test_sigterm_drains(folder):
    """What runs comes to its end, nothing new is taken, and nothing of what was said stands in the output."""
    path = folder / "base" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))  # its texts are long
    command = Command(folder)
    assert re.match(r"Serving parm, base at http://127.0.0.1:\d+/v1, \d+\.\d s after its start", command.ready)
    body = {"model": "base", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 300, "stream": True}
    refused = threading.Event()
    with httpx.stream("POST", f"{command.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        try:
            httpx.get(f"{command.url}/health", timeout=5)
        except httpx.ConnectError:
            refused.set()
    out, err = command.process.communicate(timeout=60)
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-2]
    assert len(rest) > 100
    assert refused.is_set()
    assert command.process.returncode == 0
    assert not any(word in out + err for word in (*SECRET.split(), "Traceback"))


def test_sigterm_is_heeded_from_the_first_line_on(folder):
    command = Command(folder)
    command.process.send_signal(signal.SIGTERM)
    command.process.communicate(timeout=60)
    assert command.process.returncode == 0


def test_keys_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv(KEYS, " , ")
    with pytest.raises(ValueError, match="there is no key in it"):
        ServeArguments(model_name_or_path="base").keys()
