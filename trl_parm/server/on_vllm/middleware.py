# SPDX-License-Identifier: Apache-2.0
"""Between a client and vLLM's server: reads `preference` and `beta` of a request, and tells which were used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl_parm.server.errors import RequestError, wrong
from trl_parm.server.protocol import read_json, wanted_guidance
from trl_parm.server.served import BASE_NAME, Served


PREFERENCE, BETA = "guidance_preference", "guidance_beta"
"""Names of what stands in a request's free-form arguments, for the engine's client."""
ANSWERS = ("/v1/chat/completions", "/v1/completions")
OTHERS = ("/health", "/metrics", "/ping", "/version", "/load", "/v1/models", "/tokenize", "/detokenize")
"""All that is reachable: what else vLLM serves would answer without guidance, or changes the server."""
UNGUIDED = {
    "use_beam_search": "vLLM's server searches with requests of its own, which have no guidance",
    "cache_salt": "it does not reach the coupled requests that write a guided text",
    "priority": "it does not reach the coupled requests that write a guided text",
}
"""Fields that vLLM knows and that guided requests can't have, and why."""


class PreferenceMiddleware:
    """ASGI middleware, of an application whose engine client is a [`GuidedClient`].

    Args:
        app: The application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            path = scope["path"].rstrip("/")
            if path in ANSWERS and scope["method"] == "POST":
                receive, send = await self._read(scope, receive, send)
            elif path not in (*OTHERS, *ANSWERS):
                raise RequestError(f"There is nothing at {path[:200]}.", 404)
        except RequestError as error:
            return await _answer(send, error)
        await self.app(scope, receive, send)

    async def _read(self, scope: Any, receive: Any, send: Any) -> tuple[Any, Any]:
        """What the application reads in the body's place, and by what it sends."""
        client = scope["app"].state.engine_client
        body = read_json(await _body(receive, client.most_bytes))
        chat = scope["path"].rstrip("/") == ANSWERS[0]
        headers: list[tuple[bytes, bytes]] = []
        new = guided_body(body, client.guided, known_fields(chat), headers)
        text = json.dumps(new).encode()
        scope["headers"] = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope["headers"].append((b"content-length", str(len(text)).encode()))
        parts = iter([{"type": "http.request", "body": text, "more_body": False}])

        async def receive_body() -> Any:
            return next(parts, None) or await receive()

        async def send_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        return receive_body, send_headers


def guided_body(
    body: Mapping[str, Any], guided: Served, known: set[str], headers: list[tuple[bytes, bytes]]
) -> dict[str, Any]:
    """A request as vLLM reads it, its preference among the free-form arguments; what was used goes to the headers.

    Raises:
        RequestError: an unknown field, a wrong preference or β, or arguments that would forge them.
    """
    unknown = [name for name in body if name not in known | {"preference", "beta"}]
    if unknown:
        message = f"`{unknown[0][:80]}` is not known here, and might change the text, so that it is refused."
        raise wrong(unknown[0], message, "unknown_parameter")
    extra = body.get("vllm_xargs") or {}
    if not isinstance(extra, Mapping) or any(name.startswith("guidance_") for name in extra):
        raise wrong("vllm_xargs", "`vllm_xargs` must be an object without `guidance_`. Give `preference` and `beta`.")
    named = body.get("model") or guided.name
    found = {name: value for name, value in body.items() if name not in ("preference", "beta")} | {"model": named}
    served = guided if named == guided.name else Served(BASE_NAME, guided.model_at)
    weights, beta = wanted_guidance(body, served)
    if named != guided.name:
        return found
    for name, reason in UNGUIDED.items():
        if body.get(name):
            message = (
                f"`{name}` can't be had with guidance: {reason}. Leave it out, or ask for the model {BASE_NAME!r}."
            )
            raise wrong(name, message, "unsupported_parameter")
    α = [weights[objective] for objective in guided.objectives]
    headers.append((b"x-preference", json.dumps(weights).encode()))
    headers.append((b"x-beta", json.dumps(beta).encode()))
    return {**found, "vllm_xargs": {**extra, PREFERENCE: α, BETA: beta}}


def known_fields(chat: bool) -> set[str]:
    """The fields of a request that vLLM knows."""
    from vllm.entrypoints.openai.chat_completion.protocol import (  # pyright: ignore[reportMissingImports]
        ChatCompletionRequest,
    )
    from vllm.entrypoints.openai.completion.protocol import (  # pyright: ignore[reportMissingImports]
        CompletionRequest,
    )

    return set((ChatCompletionRequest if chat else CompletionRequest).model_fields) | {"metadata", "store"}


async def _body(receive: Any, most: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("The client went away.", 499)
        body += message.get("body", b"")
        if len(body) > most:
            raise RequestError(f"The body has more than {most} bytes.", 413, "body_too_large")
        if not message.get("more_body"):
            return bytes(body)


async def _answer(send: Any, error: RequestError) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
