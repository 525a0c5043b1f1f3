# SPDX-License-Identifier: Apache-2.0
"""What is counted, for Prometheus, in a registry of the server's own: numbers alone, nothing of what was said."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from .served import Served


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts requests, tokens and times. Models that are not served are counted as one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"namespace": "trl_parm", "registry": self.registry}
        self._requests = Counter("requests", "Requests by their answers.", ["model", "endpoint", "status"], **of)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **of)
        self._written = Counter("generated_tokens", "Tokens that were written.", ["model", "guided"], **of)
        self._left = Counter("clients_gone", "Prompts whose clients went away before the end.", ["model"], **of)
        self._turns = Counter("turns_passed", "Texts that gave their rows to others that waited.", **of)
        self._first = Histogram("time_to_first_token_seconds", "From a request to a prompt's first token.", ["model"],
                                buckets=SECONDS, **of)  # fmt: skip
        self._whole = Histogram("request_seconds", "From a request to a prompt's last token.", ["model"],
                                buckets=SECONDS, **of)  # fmt: skip
        self._step = Histogram("step_seconds", "A token of texts that are decoded together.",
                               ["model"], buckets=SECONDS, **of)  # fmt: skip
        self.waiting = Gauge("waiting_texts", "Texts that wait for a row.", **of)
        self.running = Gauge("running_texts", "Texts that are read or written.", **of)

    def answered(self, model: str, endpoint: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(model, endpoint, str(status)).inc()

    def ended(self, model: str, seconds: float, prompt_tokens: int) -> None:
        """A request came to its end."""
        self._whole.labels(model).observe(seconds)
        self._prompt.labels(model).inc(prompt_tokens)

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def wrote(self, served: Served, tokens: int, seconds: float) -> None:
        """A step wrote so many tokens."""
        self._written.labels(served.name, str(served.is_guided).lower()).inc(tokens)
        self._step.labels(served.name).observe(seconds)

    def client_gone(self, model: str) -> None:
        self._left.labels(model).inc()

    def turn_passed(self) -> None:
        self._turns.inc()

    def exposition(self) -> bytes:
        """The answer of `/metrics`."""
        return generate_latest(self.registry)
