# SPDX-License-Identifier: Apache-2.0
"""The page takes questions and nothing else: no files, also where gradio would take them from a script."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


MOST_BYTES = 500_000
"""The longest prompt takes a fifth of it, whatever its letters."""


class NoUploads:
    """Refuses requests that bring files, or more than a question: 413, before gradio writes anything to its disk."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(refusal, status_code=413)(scope, receive, send)


def _refusal(scope: Scope) -> str | None:
    headers = [(name.lower(), value.lower()) for name, value in scope["headers"]]
    types = [value for name, value in headers if name == b"content-type"]
    # Of several types gradio may read another one than is looked at here.
    if len(types) > 1 or any(b"multipart/" in one for one in types) or scope["path"].rstrip("/").endswith("/upload"):
        return "This page takes no files."
    found = dict(headers)
    length = found.get(b"content-length", b"0")
    # A body that comes in chunks may be longer than it says beside that.
    if b"transfer-encoding" in found or not length.isdigit() or int(length) > MOST_BYTES:
        return f"This page takes questions of at most {MOST_BYTES} bytes, whose length is told beforehand."
    return None
