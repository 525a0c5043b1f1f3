# SPDX-License-Identifier: Apache-2.0
"""From arguments to a server that runs until it is told to end, and then answers what it has begun."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from trl_parm.arguments import option, required
from trl_parm.extras import require
from trl_parm.texts import fill


NEEDED = ("starlette", "uvicorn", "prometheus_client")
EMBEDDED = (
    "methods", "optimize_for_cpu", "model_kwargs", "template", "max_rows", "max_waiting", "max_texts",
    "max_prompt_tokens", "max_tokens", "max_seconds", "read_tokens", "turn_tokens",
)  # fmt: skip
"""Arguments that the engine in this process alone knows."""
KEYS = "TRL_PARM_API_KEYS"
"""The environment variable with keys, separated by commas."""


@dataclass
class ServeArguments:
    """Arguments of `trl-parm serve`."""

    model_name_or_path: str = option("", "The frozen base model, served as `base`: a folder or Hub id.")
    arm: str | None = option(None, "A preference-conditioned adapter, served as `parm`.")
    methods: list[dict | str] | None = option(
        None, "Methods as of evaluate: {method: genarm, name: , arms: , beta: }, as JSON in a flag."
    )
    preference: dict | None = option(None, "Of requests without one, by objective; all alike if not given.")
    beta: float = option(1.0, "β of requests without one, for `arm`.")
    dtype: str = option("auto", "Of weights, such as bfloat16; auto: as they were saved.")
    optimize_for_cpu: bool = option(
        True, "On a CPU, pack weights; bfloat16 where it has units, unless dtype: float32."
    )
    model_kwargs: dict | None = option(None, "Further arguments of from_pretrained, such as {device_map: auto}.")
    template: str | None = option(None, "How the base reads a chat: a text with {prompt}. Its chat template if not.")
    escape_control_tokens: bool = option(True, "Read text of control tokens, such as <|im_end|>, in prompts as text.")
    engine: str = option("transformers", "What decodes: transformers, in this process; or vllm, for `arm` alone.")
    engine_args: dict | None = option(None, "Arguments of `vllm serve`, such as {max_loras: 16}.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port; 0 takes a free one.")
    api_key: str | None = option(None, f"The key that requests must have; {KEYS} in the environment has several.")
    max_rows: int = option(32, "Most texts that are decoded at once.")
    max_waiting: int = option(256, "Most texts that wait; more are answered 503.")
    max_texts: int = option(16, "Most texts of one request.")
    max_prompt_tokens: int | None = option(None, "Most tokens of a prompt; as many as the models take if not given.")
    max_tokens: int = option(1024, "Most tokens of a text.")
    max_body_bytes: int = option(2**20, "Most bytes of a request; more are answered 413.")
    max_seconds: float = option(600.0, "Most seconds of a request, waiting included; longer ones are answered 504.")
    read_tokens: int = option(256, "Most tokens of prompts that are read between two tokens of others' texts.")
    turn_tokens: int = option(128, "Tokens after which a text passes its row on, where others wait.")

    def __post_init__(self) -> None:
        required(self, "model_name_or_path")
        names = [m.get("name", m.get("method")) if isinstance(m, dict) else m for m in self.methods or ()]
        if self.arm and "parm" in names:
            raise ValueError("`arm` is served as `parm`, and a method has that name too. Give that one a `name`.")
        for name in (
            "max_rows", "max_texts", "max_prompt_tokens", "max_tokens", "max_body_bytes", "read_tokens", "turn_tokens",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be 1 or larger.")
        if self.template is not None:
            fill(self.template, prompt="")
        if self.engine_args and self.engine != "vllm":
            raise ValueError("`engine_args` are vLLM's. Leave them out, or set `engine: vllm`.")
        own = {field.name: field.default for field in fields(self) if field.name in EMBEDDED}
        if self.engine == "vllm" and (given := [name for name in own if getattr(self, name) != own[name]]):
            raise ValueError(f"{', '.join(given)} can't be had with `engine: vllm`. Leave it out; see `engine_args`.")
        if self.engine == "vllm" and self.escape_control_tokens:
            raise ValueError(
                "vLLM's server lets control tokens in a message act, whoever wrote them. Set `escape_control_tokens: "
                "false` to say that you know, or use `engine: transformers`."
            )
        if not self.max_seconds > 0 or self.max_waiting < 0:
            raise ValueError("`max_seconds` must be positive, and `max_waiting` 0 or larger.")

    @property
    def all_methods(self) -> list[Any]:
        """What is served beside the base model."""
        own = [{"method": "parm", "arm": self.arm, "beta": self.beta}] if self.arm else []
        return own + (self.methods or [])

    def keys(self) -> list[str]:
        """All keys, of which a request needs one."""
        given = [self.api_key or "", *os.environ.get(KEYS, "").split(",")]
        found = [key.strip() for key in given if key.strip()]
        if not found and (self.api_key is not None or KEYS in os.environ):
            raise ValueError(f"`api_key` or {KEYS} is set, but there is no key in it. Give one, or unset it.")
        return found


def serve(arguments: ServeArguments) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ValueError`, `OSError` or `ImportError` if it can't begin."""
    if arguments.engine == "vllm":
        require("vllm", "`engine: vllm`", "vllm")
    else:
        require("serve", "`trl-parm serve`", *NEEDED)
    begun = time.monotonic()
    listening = bind(arguments.host, arguments.port)
    try:
        keys = arguments.keys()
        if not keys and not _is_loopback(arguments.host):
            print(
                f"warning: anyone who reaches {arguments.host} is answered. Set {KEYS}.", file=sys.stderr, flush=True
            )
        if arguments.engine == "vllm":
            return on_vllm(arguments, listening, keys, begun)
        server = make_server(arguments, keys)
        try:
            _run(server, listening, lambda: say_ready([served.name for served in server.catalogue], listening, begun))
        finally:
            server.engine.close()
    finally:
        listening.close()


def on_vllm(arguments: ServeArguments, listening: socket.socket, keys: list[str], begun: float) -> None:
    """Serves on vLLM."""
    from .on_vllm.command import serve as serve_on_vllm

    serve_on_vllm(arguments, listening, keys, lambda names: say_ready(names, listening, begun))


def make_server(arguments: ServeArguments, keys: list[str]) -> Any:
    """A [`Server`](trl_parm.server.app.Server) whose models are loaded and whose engine runs."""
    from trl_parm.evaluation.models import Models

    from .app import Server
    from .engine import Engine, Rows
    from .metrics import Metrics
    from .preparing import Limits, Preparing
    from .served import load_served

    models = Models(
        arguments.model_name_or_path, arguments.dtype, arguments.optimize_for_cpu, **(arguments.model_kwargs or {})
    )
    catalogue = load_served(models, arguments.all_methods, arguments.preference)
    limits = Limits(
        arguments.max_prompt_tokens, arguments.max_tokens, arguments.max_texts, arguments.max_seconds,
        arguments.max_body_bytes,
    )  # fmt: skip
    preparing = Preparing(models, limits, arguments.template, arguments.escape_control_tokens)
    rows = Rows(arguments.max_rows, arguments.max_waiting, arguments.read_tokens, arguments.turn_tokens)
    metrics = Metrics()
    return Server(catalogue, preparing, Engine(rows, metrics), metrics, keys)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `OSError` if it is in use or not one of this machine's."""
    listening = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        why = f"The port {port} of {host} can't be had: {error.strerror}. Choose another `port` or `host`."
        raise OSError(why) from None
    return listening


def say_ready(names: list[str], listening: socket.socket, begun: float) -> None:
    """One line, from which on connections are taken."""
    listening.listen(1024)
    host, port = listening.getsockname()[:2]
    url, seconds = f"http://{_in_url(host)}:{port}/v1", time.monotonic() - begun
    print(f"Serving {', '.join(names)} at {url}, {seconds:.1f} s after its start", flush=True)


def _run(server: Any, listening: socket.socket, say: Callable[[], None]) -> None:
    """Until a signal; then nothing new is taken, and what runs comes to its end. It says when signals are heeded."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say()

    config = uvicorn.Config(server.app(), log_level="warning", access_log=False, lifespan="off")
    # uvicorn hands a signal on when it has drained; this one has had its effect by then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    Announcing(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
