# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a request, in the form in which OpenAI's API says it."""

from __future__ import annotations

from typing import Any


KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error",
         504: "server_error"}  # fmt: skip


class RequestError(Exception):
    """A request that can't be answered.

    Args:
        message (`str`): What came, what is allowed, what to do.
        status (`int`, *optional*, defaults to 400): Of HTTP.
        code (`str`, *optional*): For programs, such as `"model_not_found"`.
        param (`str`, *optional*): The field of the request that is wrong.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str, code: str | None = None) -> RequestError:
    """A field of a request that is wrong: 400."""
    return RequestError(message, 400, code, param)
