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
    headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
    if "multipart/" in headers.get(b"content-type", "").lower() or scope["path"].rstrip("/").endswith("/upload"):
        return "This page takes no files."
    length = headers.get(b"content-length", "")
    known = length.isdigit() and int(length) <= MOST_BYTES
    if not known and (length or b"transfer-encoding" in headers):
        return f"This page takes questions of at most {MOST_BYTES} bytes, whose length is told beforehand."
    return None
