# SPDX-License-Identifier: Apache-2.0
"""`trl-parm serve` on loopback: clients at once, each with a preference of its own, and the same one after another.

    python benchmarks/serving.py [--clients 8 32] [--tokens 32] [--repeats 5] [--dtype auto] [--quick]

One server in a process of its own, with one thread, serves an ARM on SmolLM2-135M and the unguided base. In every
round the clients ask at once, guided and unguided, and those of the smallest number one after another. Answers are
streamed; times are a clock's, as clients see them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from common import argument_parser, report, verdict


sys.path.append(str(Path(__file__).parent.parent / "examples"))
TOPICS = ("rain on a Monday", "an old bicycle", "the sea at night", "a lost key", "bread", "a long train ride",
          "your favourite colour", "the first snow")  # fmt: skip


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as made, running(args, Path(made)) as (url, seconds):
        objectives = httpx.get(f"{url}/models").json()["data"][0]["objectives"]
        ask(url, [request(args, objectives, "parm", 0, 1)] * 2)
        first = time.perf_counter()
        rounds = [one_round(args, url, objectives) for _ in range(args.repeats)]
        print(f"{args.repeats} rounds in {time.perf_counter() - first:.0f} s", flush=True)
    report("serving", table(rounds), notes(args, rounds, seconds), args.results, args.table, timed="wall time")


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--clients", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--arm", default="runs/demo/arm", help="an ARM on SmolLM2; a random one if it is not there")
    parser.add_argument("--model", help="the folder of the base model; SmolLM2-135M if not given")
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.tokens = 1, 16
    return args


@contextmanager
def running(args: argparse.Namespace, made: Path) -> Iterator[tuple[str, float]]:
    """A server: where it is, and how many seconds there were from its start to the first token of an answer."""
    from smollm2 import smollm2

    model = args.model or str(smollm2())
    command = [
        sys.executable, "-m", "trl_parm", "serve", "--model_name_or_path", model, "--arm", arm_of(args, model, made),
        "--port", "0", "--dtype", args.dtype, "--max_rows", str(max(args.clients)),
    ]  # fmt: skip
    begun = time.perf_counter()
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    try:
        found = re.search(r"http://\S+/v1", server.stdout.readline())
        if found is None:
            raise SystemExit("The server did not start.")
        url = found[0]
        ask(url, [{"model": "base", "prompt": "A", "max_tokens": 1, "temperature": 0}])
        yield url, time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait(60)


def arm_of(args: argparse.Namespace, model: str, made: Path) -> str:
    """The ARM, or a random one: what it costs is the same."""
    if Path(args.arm).is_dir():
        return args.arm
    from models import load, with_arm

    arm = with_arm(load(model, torch.float32, torch.device("cpu")))
    arm.peft_config["default"].base_model_name_or_path = model
    arm.save_pretrained(made / "arm")
    return str(made / "arm")


def one_round(args: argparse.Namespace, url: str, objectives: list[str]) -> dict[tuple, dict[str, Any]]:
    """Clients, model and way → seconds, tokens and times to first tokens."""
    found = {}
    for clients in args.clients:
        for model in ("parm", "base"):
            asked = [request(args, objectives, model, i, clients) for i in range(clients)]
            found[clients, model, "at once"] = ask(url, asked)
            if clients == min(args.clients):
                found[clients, model, "in turn"] = ask(url, asked, at_once=False)
    return found


def request(args: argparse.Namespace, objectives: list[str], model: str, number: int, clients: int) -> dict[str, Any]:
    weight = number / max(1, clients - 1)
    rest = (1 - weight) / max(1, len(objectives) - 1)
    α = dict(zip(objectives, [weight, *[rest] * (len(objectives) - 1)]))
    content = f"Tell me a long story about {TOPICS[number % len(TOPICS)]}, in {number + 3} parts."
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": args.tokens,
        "temperature": 0, "stream": True, **({"preference": α} if model == "parm" else {}),
    }  # fmt: skip


def ask(url: str, requests: list[dict[str, Any]], at_once: bool = True) -> dict[str, Any]:
    """Asks all of these, and measures."""
    start = time.perf_counter()
    answers = asyncio.run(_ask(url, requests, at_once))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": sum(answer["tokens"] for answer in answers),
        "first": [answer["first"] for answer in answers],
        "whole": [answer["whole"] for answer in answers],
        "texts": [answer["text"] for answer in answers],
    }


async def _ask(url: str, requests: list[dict[str, Any]], at_once: bool) -> list[dict[str, Any]]:
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        if at_once:
            return await asyncio.gather(*(_answer(client, url, body) for body in requests))
        return [await _answer(client, url, body) for body in requests]


async def _answer(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    endpoint = "chat/completions" if "messages" in body else "completions"
    start, first, text = time.perf_counter(), None, ""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", f"{url}/{endpoint}", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            first = time.perf_counter() - start if first is None else first
            for choice in chunk["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            tokens = (chunk.get("usage") or {}).get("completion_tokens", 0)
    return {"first": first, "whole": time.perf_counter() - start, "tokens": tokens, "text": text}


def table(rounds: list[dict[tuple, dict[str, Any]]]) -> list[dict[str, Any]]:
    names = {"parm": "PARM", "base": "unguided"}
    rows = []
    for key in rounds[0]:
        clients, model, way = key
        found = [one[key] for one in rounds]
        first, whole = (sorted(t for one in found for t in one[name]) for name in ("first", "whole"))
        rates = [one["tokens"] / one["seconds"] for one in found]
        row = {
            "": f"{names[model]}, {way}", "clients": clients, "tokens/s": f"{statistics.median(rates):.1f}",
            "first token, p50 / p95 (s)": f"{_share(first, 0.5):.2f} / {_share(first, 0.95):.2f}",
            "answer, p50 / p95 (s)": f"{_share(whole, 0.5):.2f} / {_share(whole, 0.95):.2f}",
        }  # fmt: skip
        if way == "at once" and (clients, model, "in turn") in rounds[0]:
            row["tokens/s / in turn"] = _shown(_ratios(rounds, key, (clients, model, "in turn")))
        if model == "parm":
            row["unguided tokens/s / this"] = _shown(_ratios(rounds, (clients, "base", way), key))
        rows.append(row)
    return rows


def _ratios(rounds: list[dict[tuple, dict[str, Any]]], one: tuple, other: tuple) -> list[float]:
    """Of tokens/s, round by round."""
    rate = [{key: found[key]["tokens"] / found[key]["seconds"] for key in (one, other)} for found in rounds]
    return [found[one] / found[other] for found in rate]


def _shown(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def notes(args: argparse.Namespace, rounds: list[dict[tuple, dict[str, Any]]], seconds: float) -> list[str]:
    least = min(args.clients)
    keys = (least, "parm", "at once"), (least, "parm", "in turn"), (least, "base", "at once")
    joined = statistics.median(_ratios(rounds, keys[0], keys[1]))
    price = statistics.median(_ratios(rounds, keys[2], keys[0]))
    same = [a == b for one in rounds for a, b in zip(one[keys[0]]["texts"], one[keys[1]]["texts"], strict=True)]
    return [
        f"SmolLM2-135M with an ARM on it, {args.dtype}, a server of one thread, a clock's time, {args.repeats} rounds "
        f"in which all lines take turns. Greedy answers of at most {args.tokens} tokens, streamed, α from end to end"
        "; median [quartiles] of rounds, shares of all answers of all rounds.",
        f"{least} guided at once at least 3.00 times the tokens/s of one after another: {joined:.2f}, "
        f"{'met' if joined >= 3 else 'MISSED'}. Unguided / guided tokens/s with {least} clients {price:.2f}, "
        f"{verdict(price, 1.5)}.",
        f"{sum(same)} of {len(same)} guided answers at once are, letter by letter, those of one after another.",
        f"From the start of the command to the first token of an answer: {seconds:.1f} s.",
    ]


if __name__ == "__main__":
    main()
