# SPDX-License-Identifier: Apache-2.0
"""A server of tiny models in a thread of this process, and the same texts by `generate`, each alone."""

from __future__ import annotations

import inspect
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from conftest import tiny_arm, tiny_llama
from demo_folder import spaced_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_parm.decoding import PARM, GenARM
from trl_parm.evaluation.decoding import RowSampling
from trl_parm.server.command import ServeArguments, bind, make_server
from trl_parm.server.texts import choice_seed


OBJECTIVES = ["helpful", "brief"]
ESCAPES = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
"""Whether this transformers can read control tokens as text."""
SIZES = {"max_position_embeddings": 512}


def save_models(folder: Path) -> None:
    """A base model with an ARM on it, two LoRAs on it, and a model with an ARM of its own, beside it."""
    spaced_tokenizer().save_pretrained(folder / "base")
    base = tiny_llama(0, **SIZES)
    base.save_pretrained(folder / "base")
    save_on(folder, "base", tiny_arm(base, OBJECTIVES), "arm")
    for seed, name in enumerate(OBJECTIVES):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        save_on(folder, "base", get_peft_model(tiny_llama(0, **SIZES), config), name)
    small = {**SIZES, "hidden_size": 16, "intermediate_size": 24}
    spaced_tokenizer().save_pretrained(folder / "small")
    tiny_llama(5, **small).save_pretrained(folder / "small")
    save_on(folder, "small", tiny_arm(tiny_llama(5, **small), OBJECTIVES, seed=5), "small_arm")


def save_on(folder: Path, backbone: str, model: Any, name: str) -> None:
    """Saves an adapter as one that was trained on a model of the folder."""
    model.peft_config["default"].base_model_name_or_path = str(folder / backbone)
    model.save_pretrained(folder / name)


def arguments(folder: Path, **changes: Any) -> ServeArguments:
    """Of a server of these models."""
    methods = [
        {"method": "genarm", "arms": {name: str(folder / name) for name in OBJECTIVES}},
        {"method": "parm", "name": "beside", "arm": str(folder / "small_arm"), "template": "user {prompt} assistant"},
    ]
    given = {"arm": str(folder / "arm"), "methods": methods, "dtype": "float32", "optimize_for_cpu": False}
    given |= {"escape_control_tokens": ESCAPES, **changes}
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


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


class Twin:
    """The texts of requests by `generate`, one at a time, on models of its own that share nothing.

    Args:
        folder (`Path`): Where the models are.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.folder = spaced_tokenizer(), folder
        self.base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        self.guides = {
            name: AutoPeftModelForCausalLM.from_pretrained(folder / name).eval()
            for name in ("arm", "small_arm", *OBJECTIVES)
        }

    def guided(self, model: str, preference: Any, beta: float) -> Any:
        """A model that is served."""
        arms = {name: self.guides[name] for name in OBJECTIVES}
        return {
            "base": lambda: self.base,
            "parm": lambda: PARM(self.base, self.guides["arm"], preference, beta),
            "beside": lambda: PARM(self.base, self.guides["small_arm"], preference, beta),
            "genarm": lambda: GenARM(self.base, arms, [preference[name] for name in OBJECTIVES], beta),
        }[model]()

    def ids(self, content: str) -> list[int]:
        chat = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def tokens(
        self, ids: list[int], preference: Any = None, beta: float = 1.0, most: int = 12, seed: int | None = None,
        index: int = 0, model: str = "parm", own: list[int] | None = None, **sampling: Any,
    ) -> list[int]:  # fmt: skip
        """The tokens after a prompt, an end token included; a guide may have a prompt of its own."""
        noise = [] if seed is None else [RowSampling([choice_seed(seed, index)], len(ids), **sampling)]
        guide = {} if own is None else {"guide_input_ids": torch.tensor([own])}
        output = self.guided(model, preference or dict.fromkeys(OBJECTIVES, 0.5), beta).generate(
            torch.tensor([ids]), max_new_tokens=most, do_sample=False, logits_processor=noise, pad_token_id=0, **guide
        )
        return output[0, len(ids) :].tolist()

    def decoded(self, tokens: list[int]) -> str:
        """Tokens as a text, without control tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def after(self, ids: list[int], tokens: list[int]) -> str:
        """The text with which tokens go on after others."""
        return self.decoded(ids + tokens)[len(self.decoded(ids)) :]

    def text(
        self, content: str, preference: Any = None, beta: float = 1.0, model: str = "parm", **settings: Any
    ) -> str:
        """The text that answers a chat's question."""
        own = self.tokenizer(f"user {content} assistant")["input_ids"] if model == "beside" else None
        tokens = self.tokens(self.ids(content), preference, beta, model=model, own=own, **settings)
        return self.decoded(tokens)


def events(lines: Any) -> list[Any]:
    """The events of a stream, the last of which is its end."""
    found = [line.removeprefix("data: ") for line in lines if line]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
