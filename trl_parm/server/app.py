# SPDX-License-Identifier: Apache-2.0
"""The server's face: OpenAI's API over HTTP, health and metrics. Nothing that was said is logged."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answers import Answer, event
from .engine import Engine, Task
from .errors import RequestError
from .metrics import CONTENT_TYPE, Metrics
from .preparing import Preparing
from .protocol import read_json, read_request
from .served import Catalogue, Served
from .texts import Piece


BODY_SECONDS = 30.0
"""In which a body must have come."""
GONE = 499
"""Nobody reads it: the client went away."""
UNKNOWN = "(none)"
Handler = Callable[[HTTPRequest], Awaitable[Response]]


class Server:
    """What handlers have in common.

    Args:
        catalogue ([`Catalogue`]): The models.
        preparing ([`Preparing`]): Makes tasks of requests.
        engine ([`Engine`]): Does them.
        metrics ([`Metrics`]): Counts them.
        keys (`Sequence[str]`, *optional*): One of these must come with a request; none is needed if there are none.
    """

    def __init__(
        self, catalogue: Catalogue, preparing: Preparing, engine: Engine, metrics: Metrics, keys: Sequence[str] = ()
    ) -> None:
        self.catalogue, self.preparing, self.engine, self.metrics = catalogue, preparing, engine, metrics
        self._keys, self._created = [key.encode() for key in keys], int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        of = [
            Route("/v1/models", self._guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self.model), methods=["GET"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.completion), methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.exposition, methods=["GET"]),
        ]
        return Starlette(routes=of, exception_handlers={HTTPException: self._http_error, Exception: _server_error})

    async def health(self, http: HTTPRequest) -> Response:
        ok = self.engine.is_alive
        return JSONResponse({"status": "ok" if ok else "down"}, 200 if ok else 503)

    async def exposition(self, http: HTTPRequest) -> Response:
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)

    async def models(self, http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(one) for one in self.catalogue]})

    async def model(self, http: HTTPRequest) -> Response:
        return JSONResponse(self._described(self.catalogue.named(http.path_params["name"])))

    async def chat(self, http: HTTPRequest) -> Response:
        return await self._answer(http, chat=True)

    async def completion(self, http: HTTPRequest) -> Response:
        return await self._answer(http, chat=False)

    def _guarded(self, handler: Handler) -> Handler:
        """A handler that wants a key, and whose errors have OpenAI's form."""

        async def guarded(http: HTTPRequest) -> Response:
            http.state.model = UNKNOWN
            try:
                self._check_key(http)
                response = await handler(http)
            except RequestError as error:
                response = error_response(error)
            except Exception:
                self._count(http, 500)
                raise
            if not isinstance(response, StreamingResponse):  # which is counted when it has come to its end
                self._count(http, response.status_code)
            return response

        return guarded

    def _count(self, http: HTTPRequest, status: int) -> None:
        endpoint = http.scope["route"].path.removeprefix("/v1/")
        self.metrics.answered(http.state.model, endpoint, status)

    async def _http_error(self, http: HTTPRequest, error: Exception) -> Response:
        """What no handler was asked: another address, or another method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        self.metrics.answered(UNKNOWN, UNKNOWN, status)
        what = {404: "There is nothing at", 405: "This method is not for"}.get(status, "This can't be done at")
        response = error_response(RequestError(f"{what} {http.url.path[:200]}.", status))
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    def _check_key(self, http: HTTPRequest) -> None:
        """Raises [`RequestError`] with status 401 without a right key; how long it takes does not tell how wrong."""
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer"
        found = [hmac.compare_digest(given.encode("latin-1"), key) and known for key in self._keys]
        if found and not any(found):
            raise RequestError("The API key is missing or wrong.", 401, "invalid_api_key")

    def _described(self, served: Served) -> dict[str, Any]:
        found = {"id": served.name, "object": "model", "created": self._created, "owned_by": "trl-parm"}
        own = {"objectives": list(served.objectives), "preference": served.preference, "beta": served.beta}
        return {**found, **own, "max_model_len": served.positions}

    async def _answer(self, http: HTTPRequest, chat: bool) -> Response:
        started = time.monotonic()
        body = read_json(await self._body(http))
        http.state.model = self.catalogue.named(body.get("model")).name  # a refused request is counted as its model's
        request = read_request(body, chat, self.catalogue, min(self.preparing.limits.texts, self.engine.rows.rows))
        inbox = Inbox()
        tasks = await asyncio.to_thread(self.preparing.tasks, request, inbox.put, started)
        answer = Answer(request, sum(len(task.texts[0].prompt) for task in tasks), self.preparing.token_text)
        pieces = self._pieces(http, inbox, tasks, answer)
        if not request.stream:
            async for _ in pieces:
                pass
            return JSONResponse(answer.whole()) if answer.is_whole else Response(status_code=GONE)
        first = await anext(pieces, None)  # an error before the first token is an error of the request
        if first is None:
            return Response(status_code=GONE)
        events = self._events(http, first, pieces, answer)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _body(self, http: HTTPRequest) -> bytes:
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("Send JSON, with the header Content-Type: application/json.", 415, "not_json")
        most, body = self.preparing.limits.body, bytearray()
        too_large = RequestError(f"The body has more than {most} bytes.", 413, "body_too_large")
        length = http.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise RequestError(f"The body did not come in {BODY_SECONDS:g} seconds.", 408, "timeout") from None
        except ClientDisconnect:
            raise RequestError("The client went away.", GONE) from None
        return bytes(body)

    async def _events(
        self, http: HTTPRequest, first: Piece, pieces: AsyncIterator[Piece], answer: Answer
    ) -> AsyncIterator[bytes]:
        """A stream's events. What goes wrong now can't be told by a status any more: it is the last event."""
        status = GONE
        try:
            if (chunk := answer.chunk(first)) is not None:
                yield chunk
            async for piece in pieces:
                if (chunk := answer.chunk(piece)) is not None:
                    yield chunk
            if answer.is_whole:
                status = 200
                yield answer.last()
        except RequestError as error:
            status = error.status
            yield event(error.body())
        finally:
            self._count(http, status)
            await pieces.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    async def _pieces(
        self, http: HTTPRequest, inbox: Inbox, tasks: list[Task], answer: Answer
    ) -> AsyncIterator[Piece]:
        """The pieces of all texts as they come, until the last, or until the client goes away, whose tasks then end
        too."""
        self.engine.submit(tasks)
        gone = asyncio.create_task(_gone(http))
        try:
            while not answer.is_whole:
                found = asyncio.create_task(inbox.get())
                await asyncio.wait({found, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    found.cancel()
                    return
                if isinstance(piece := found.result(), Exception):
                    raise piece
                answer.add(piece)
                yield piece
        finally:
            gone.cancel()
            if not answer.is_whole:
                self.engine.leave(tasks)


class Inbox:
    """What the engine's thread tells the loop of a request."""

    def __init__(self) -> None:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        self.get = self._queue.get

    def put(self, piece: Piece | Exception) -> None:
        """For any thread."""
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)


def error_response(error: RequestError) -> JSONResponse:
    """An error as an answer."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


async def _gone(http: HTTPRequest) -> None:
    """Ends when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _server_error(http: HTTPRequest, error: Exception) -> Response:
    return error_response(RequestError("Something is wrong in the server; its log says what.", 500))
