# SPDX-License-Identifier: Apache-2.0
"""A server of tiny models in a thread of this process, and the same texts by `generate`, each alone."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from conftest import tiny_arm, tiny_llama
from demo_folder import spaced_tokenizer
from peft import LoraConfig, get_peft_model

from trl_parm.decoding import PARM
from trl_parm.evaluation.decoding import RowSampling
from trl_parm.server.command import ServeArguments, bind, make_server
from trl_parm.server.texts import choice_seed


OBJECTIVES = ["helpful", "brief"]
SIZES = {"max_position_embeddings": 512}


def save_models(folder: Path) -> None:
    """A base model with an ARM on it, two LoRAs on it, and a model with an ARM of its own, beside it."""
    spaced_tokenizer().save_pretrained(folder / "base")
    base = tiny_llama(0, **SIZES)
    base.save_pretrained(folder / "base")
    _save_on(folder, "base", tiny_arm(base, OBJECTIVES), "arm")
    for seed, name in enumerate(OBJECTIVES):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        _save_on(folder, "base", get_peft_model(tiny_llama(0, **SIZES), config), name)
    small = {**SIZES, "hidden_size": 16, "intermediate_size": 24}
    spaced_tokenizer().save_pretrained(folder / "small")
    tiny_llama(5, **small).save_pretrained(folder / "small")
    _save_on(folder, "small", tiny_arm(tiny_llama(5, **small), OBJECTIVES, seed=5), "small_arm")


def _save_on(folder: Path, backbone: str, model: Any, name: str) -> None:
    model.peft_config["default"].base_model_name_or_path = str(folder / backbone)
    model.save_pretrained(folder / name)


def arguments(folder: Path, **changes: Any) -> ServeArguments:
    """Of a server of these models."""
    methods = [
        {"method": "genarm", "arms": {name: str(folder / name) for name in OBJECTIVES}},
        {"method": "parm", "name": "beside", "arm": str(folder / "small_arm"), "template": "user {prompt} assistant"},
    ]
    given = {"arm": str(folder / "arm"), "methods": methods, "dtype": "float32", "optimize_for_cpu": False, **changes}
    return ServeArguments(str(folder / "base"), **given)


class Running:
    """A server that runs.

    Attributes:
        url (`str`): Where.
        server ([`Server`]): Its parts.
        client (`openai.OpenAI`): The official client.
    """

    def __init__(self, server: Any, port: int, key: str = "none") -> None:
        self.server, self.url = server, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def chat(self, content: str = "w3 w9", model: str | None = None, **settings: Any) -> Any:
        """An answer to a question. Fields that OpenAI does not have are passed beside its own."""
        extra = {name: settings.pop(name) for name in ("preference", "beta", "top_k", "min_p") if name in settings}
        return self.client.chat.completions.create(
            model=model or "parm", messages=[{"role": "user", "content": content}], extra_body=extra,
            **{"temperature": 0, "max_tokens": 12, **settings},
        )  # fmt: skip


@contextmanager
def running(args: ServeArguments, keys: list[str] | None = None):
    """A server of these arguments, on a free port, until the block ends."""
    server = make_server(args, keys or [])
    listening: socket.socket = bind("127.0.0.1", 0)
    web = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", access_log=False, lifespan="off"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    listening.listen()
    thread.start()
    try:
        yield Running(server, listening.getsockname()[1], (keys or ["none"])[0])
    finally:
        web.should_exit = True
        thread.join(30)
        server.engine.close()
        listening.close()
    assert not thread.is_alive()


class Twin:
    """The texts of requests by `generate`, one at a time, on models that share nothing with the server's."""

    def __init__(self) -> None:
        self.tokenizer = spaced_tokenizer()
        self.arm = tiny_arm(tiny_llama(0, **SIZES), OBJECTIVES)
        self.base = self.arm.get_base_model()

    def ids(self, content: str) -> list[int]:
        chat = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def tokens(
        self, ids: list[int], preference: Any = None, beta: float = 1.0, most: int = 12, seed: int | None = None,
        index: int = 0, **sampling: Any,
    ) -> list[int]:
        """The tokens after a prompt, an end token included; of the unguided base without a preference."""
        model = self.base if preference is None else PARM(self.base, self.arm, preference, beta)
        noise = [] if seed is None else [RowSampling([choice_seed(seed, index)], len(ids), **sampling)]
        with self.arm.disable_adapter() if preference is None else _nothing():
            output = model.generate(
                torch.tensor([ids]), max_new_tokens=most, do_sample=False, logits_processor=noise, pad_token_id=0
            )
        return output[0, len(ids) :].tolist()

    def text(self, content: str, preference: Any = None, *args: Any, **kwargs: Any) -> str:
        """The text that answers a chat's question."""
        return self.tokenizer.decode(self.tokens(self.ids(content), preference, *args, **kwargs), skip_special_tokens=True)


@contextmanager
def _nothing():
    yield


def events(lines: Any) -> list[Any]:
    """The events of a stream, the last of which is its end."""
    found = [line.removeprefix("data: ") for line in lines if line]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
