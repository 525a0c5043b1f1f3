# SPDX-License-Identifier: Apache-2.0
"""A stub of an OpenAI-compatible endpoint: it answers as a function says, or fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trl_parm.endpoint import PROBE


class JudgeServer:
    """Serves `/v1/chat/completions`.

    Args:
        answer (`Callable`): The text of the last message → a text, or `(status, body)`, or seconds to wait.
    """

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer, self.requests, self.headers, self.busy, self.most = answer, [], [], 0, 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.requests.append((self.path, body))
                    server.headers.append(dict(self.headers))
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                asked = body["messages"][-1]["content"]
                found = "1" if asked == PROBE else server.answer(asked)
                status, data, headers = 200, found, {}
                if isinstance(found, float):
                    time.sleep(found)
                    data = "late"
                if isinstance(found, tuple):
                    status, data, *more = found
                    headers = more[0] if more else {}
                if status == 200 and isinstance(data, str):
                    usage = {"prompt_tokens": 10, "completion_tokens": 2}
                    data = {"choices": [{"message": {"role": "assistant", "content": data}}], "usage": usage}
                with server._lock:
                    server.busy -= 1
                payload = data if isinstance(data, bytes) else json.dumps(data).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(payload)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload)
                except BrokenPipeError:  # who asked has waited long enough
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # of more than this a client hears nothing for a second

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, body in self.requests]

    def __enter__(self) -> JudgeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
