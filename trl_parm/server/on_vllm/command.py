# SPDX-License-Identifier: Apache-2.0
"""vLLM's server with our client in the engine's place."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from trl_parm.decoding.methods import guidance_strength
from trl_parm.server.served import BASE_NAME, Served
from trl_parm.serving.engine import engine_arguments, lora_slots

from .exports import Exports


GUIDED_NAME = "parm"
OURS = ("served_model_name", "host", "port", "api_key", "middleware", "lora_modules")
"""Arguments of vLLM's server that are set here."""


def serve(arguments: Any, listening: Any, keys: list[str], on_ready: Callable[[list[str]], None]) -> None:
    """Serves on a bound socket until it is told to end. Raises `ValueError` for what can't be served."""
    if not arguments.arm:
        raise ValueError("With `engine: vllm` give `arm`, an adapter on the base model.")
    slots = lora_slots(arguments.engine_args, OURS)
    guidance_strength(arguments.beta)
    with tempfile.TemporaryDirectory(prefix="trl-parm-") as folder:
        exports = Exports(arguments.model_name_or_path, arguments.arm, Path(folder), slots)
        guided = guided_model(exports, arguments.preference, arguments.beta)
        asyncio.run(_serve(arguments, listening, keys, exports, guided, on_ready))


def guided_model(exports: Exports, preference: Mapping[str, float] | None, beta: float) -> Served:
    """The guided model, by its defaults."""
    from peft_pblora import as_preference

    objectives = exports.objectives
    weights = preference or dict.fromkeys(objectives, 1 / len(objectives))
    as_preference(weights, objectives)
    weights = {objective: float(weights[objective]) for objective in objectives}
    return Served(GUIDED_NAME, cast(Any, None), tuple(objectives), weights, beta)


def engine_words(arguments: Any, keys: list[str], rank: int) -> list[str]:
    """The words of `vllm serve`."""
    given = {
        "dtype": arguments.dtype, "disable_uvicorn_access_log": True,
        **engine_arguments(arguments.model_name_or_path, rank, arguments.engine_args, OURS),
        "host": arguments.host, "port": arguments.port, "served_model_name": [GUIDED_NAME, BASE_NAME],
        "api_key": keys, "middleware": ["trl_parm.server.on_vllm.middleware.PreferenceMiddleware"],
    }  # fmt: skip
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)] if value else []
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return words


async def _serve(
    arguments: Any, listening: Any, keys: list[str], exports: Exports, guided: Served, on_ready: Callable
) -> None:
    from vllm.entrypoints.launchers.api_server import entry  # pyright: ignore[reportMissingImports]
    from vllm.entrypoints.launchers.cli_args import (  # pyright: ignore[reportMissingImports]
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]

    from .client import GuidedClient

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(engine_words(arguments, keys, exports.rank))
    validate_parsed_serve_args(args)
    host, port = listening.getsockname()[:2]
    args.port = port
    async with entry.build_async_engine_client(args) as engine:
        client = GuidedClient(engine, exports, guided, arguments.max_body_bytes)
        on_ready([GUIDED_NAME, BASE_NAME])
        shutdown = await entry.build_and_serve(client, f"http://{host}:{port}", listening, args)
    await shutdown
