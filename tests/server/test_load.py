# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, some of whom go away, ask for nonsense or for too much: nobody else's text changes."""

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import pytest


openai = pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")

from server.running import OBJECTIVES, Twin, arguments, running, save_models, wait_until  # noqa: E402

from trl_parm.decoding.cache import GuidedCache  # noqa: E402


TIGHT = {"max_rows": 5, "turn_tokens": 6, "read_tokens": 7}
"""Few rows, which texts pass on often, and prompts that are read in small parts: all that can happen does."""
MODELS = ["parm", "parm", "parm", "genarm", "beside", "base"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def twin(folder):
    return Twin(folder)


@dataclass
class Client:
    """What one asks for."""

    content: str
    model: str
    settings: dict = field(default_factory=dict)

    def ask(self, here) -> list[str]:
        answer = here.chat(self.content, self.model, **self.settings)
        if self.settings.get("stream"):
            texts = [""] * self.settings.get("n", 1)
            for chunk in answer:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            return texts
        return [choice.message.content for choice in answer.choices]

    def alone(self, twin) -> list[str]:
        own = {name: self.settings.get(name) for name in ("preference",)}
        own |= {"beta": self.settings.get("beta", 1.0), "most": self.settings["max_tokens"]}
        if temperature := self.settings.get("temperature"):
            own |= {
                "seed": self.settings["seed"],
                "temperature": temperature,
                "top_p": self.settings.get("top_p", 1.0),
            }
        return [
            twin.text(self.content, model=self.model, index=i, **own) for i in range(self.settings.get("n", 1))
        ]  # fmt: skip


def clients(count: int, seed: int = 0) -> list[Client]:
    """With prompts, preferences, β, lengths and ways of sampling of their own."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        model, weight = draw.choice(MODELS), draw.choice([0.0, 0.25, 0.6, 1.0])
        settings = {"max_tokens": draw.randint(1, 30), "stream": draw.random() < 0.5}
        if model != "base":
            settings |= {"preference": {"helpful": weight, "brief": 1 - weight}, "beta": draw.choice([0.5, 1.0, 3.0])}
        if draw.random() < 0.5:
            settings |= {"temperature": 0.8, "seed": number, "n": draw.choice([1, 1, 3]), "top_p": 0.9}
        words = " ".join(f"w{draw.randint(1, 57)}" for _ in range(draw.randint(1, 25)))
        found.append(Client(words, model, settings))
    return found


def is_empty(server) -> bool:
    """Whether an engine holds nothing of any request."""
    engine = server.engine
    return not (engine._queue or engine._tasks or engine._readings or engine._lanes)


def test_nobodys_text_depends_on_others_or_on_the_order(folder, twin):
    everyone = clients(20)
    expected = [client.alone(twin) for client in everyone]
    assert len({text for texts in expected for text in texts}) > 15
    with running(arguments(folder, **TIGHT)) as here:
        for seed in range(2):
            order = random.Random(seed).sample(range(len(everyone)), len(everyone))
            with ThreadPoolExecutor(len(everyone)) as pool:
                found = dict(zip(order, pool.map(lambda i: everyone[i].ask(here), order)))
            assert [found[i] for i in range(len(everyone))] == expected
        assert wait_until(lambda: is_empty(here.server))
        metrics = httpx.get(f"{here.url}/metrics").text
    passed = next(line for line in metrics.splitlines() if line.startswith("trl_parm_turns_passed_total"))
    assert float(passed.split()[-1]) > 5


def test_clients_that_go_away_ask_for_nonsense_or_for_too_much(folder, twin):
    """32 of them: eleven leave mid-stream, two ask for nonsense and one sends a huge prompt."""
    staying = clients(18, seed=1)
    expected = [client.alone(twin) for client in staying]
    errors: list[type] = []

    def leave(here, number: int) -> None:
        body = {"model": MODELS[number % len(MODELS)], "messages": [{"role": "user", "content": f"w{number + 1} w2"}],
                "max_tokens": 400, "n": 1 + number % 2, "temperature": 0.5, "stream": number % 4 > 0}  # fmt: skip
        with httpx.Client(timeout=60) as client:
            if not body["stream"]:
                with suppress(httpx.ReadTimeout):
                    client.post(f"{here.url}/v1/chat/completions", json=body, timeout=0.3)
                return
            with client.stream("POST", f"{here.url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                for _ in range(1 + number % 3):
                    next(lines)

    def fail(here, **settings) -> None:
        with pytest.raises(openai.APIStatusError) as caught:
            here.chat(**settings)
        errors.append(type(caught.value))

    with running(arguments(folder, max_body_bytes=10_000, **TIGHT)) as here:
        others = [lambda number=number: leave(here, number) for number in range(11)]
        others += [lambda: fail(here, preference={"helpful": 2, "brief": -1}), lambda: fail(here, model="w3")]
        others += [lambda: fail(here, content="w3 " * 100_000)]
        with ThreadPoolExecutor(32) as pool:
            asked = [pool.submit(client.ask, here) for client in staying]
            done = [pool.submit(other) for other in others]
            found = [one.result() for one in asked]
            for one in done:
                one.result()
        assert found == expected
        assert sorted(error.__name__ for error in errors) == ["APIStatusError", "BadRequestError", "NotFoundError"]
        assert wait_until(lambda: is_empty(here.server))
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, GuidedCache)]
        assert here.chat("w3 w9").choices[0].message.content == twin.text("w3 w9")


def test_a_short_request_is_not_held_by_long_ones(folder, twin):
    """With a single row, which a text of 400 tokens has: the short one is done long before."""
    ended: list[str] = []

    def ask(content: str, tokens: int) -> str:
        text = here.chat(content, max_tokens=tokens).choices[0].message.content
        ended.append(content)
        return text

    with running(arguments(folder, methods=None, max_rows=1, turn_tokens=5)) as here:
        here.server.preparing._ends = frozenset()
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(ask, "w1", 400)
            assert wait_until(lambda: bool(here.server.engine._lanes))
            short = pool.submit(ask, "w3 w9", 12)
            assert short.result() == twin.text("w3 w9")
            assert ended == ["w3 w9"]
            long.result()


def test_a_text_that_passed_its_row_on_goes_on_as_before(folder, twin):
    """Two texts that take turns in one row, each with a guide's own prompt, and with noise."""
    with running(arguments(folder, max_rows=1, turn_tokens=3, read_tokens=4)) as here, ThreadPoolExecutor(4) as pool:
        settings = {"max_tokens": 20, "temperature": 0.8, "seed": 3}
        for model in ("beside", "genarm"):
            asked = [pool.submit(here.chat, f"w{i} w9", model, **settings) for i in range(1, 5)]
            found = [one.result().choices[0].message.content for one in asked]
            assert found == [twin.text(f"w{i} w9", model=model, most=20, seed=3, temperature=0.8) for i in range(1, 5)]


def test_models_whose_texts_can_not_join_decode_each_alone(folder, twin, monkeypatch):
    monkeypatch.setattr("trl_parm.server.served.can_join", lambda guided_at: False)
    everyone = clients(8, seed=2)
    with running(arguments(folder, **TIGHT)) as here:
        assert not any(served.joins for served in here.server.catalogue)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda client: client.ask(here), everyone))
        assert wait_until(lambda: is_empty(here.server))
    assert found == [client.alone(twin) for client in everyone]


def test_what_a_generation_config_does_to_scores_is_done_for_each(folder, twin):
    """As `generate` does it: by what each text has, whoever else is there."""
    acting = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
    with running(arguments(folder, **TIGHT)) as here, ThreadPoolExecutor(6) as pool:
        here.server.preparing._base.generation_config.update(**acting)
        asked = [pool.submit(here.chat, f"w{i} w9 w9", preference=[0.25, 0.75]) for i in range(6)]
        found = [one.result().choices[0].message.content for one in asked]
    twin.base.generation_config.update(**acting)
    try:
        expected = [twin.text(f"w{i} w9 w9", {"helpful": 0.25, "brief": 0.75}) for i in range(6)]
    finally:
        twin.base.generation_config.update(repetition_penalty=None, no_repeat_ngram_size=None, min_new_tokens=None)
    assert found == expected
    assert found[3] != twin.text("w3 w9 w9", {"helpful": 0.25, "brief": 0.75})


def test_too_many_that_wait_are_refused(folder, twin):
    with running(arguments(folder, methods=None, max_rows=1, max_waiting=2, turn_tokens=1000)) as here:
        hold = threading.Event()
        step = here.server.engine._turn
        here.server.engine._turn = lambda: (hold.wait(20), step())
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(here.chat, "w3 w9") for _ in range(3)]  # one for the row, and two that wait
            assert wait_until(lambda: len(here.server.engine._queue) == 3)
            with pytest.raises(openai.InternalServerError) as caught:
                here.chat()
            hold.set()
            assert [one.result().choices[0].message.content for one in asked] == [twin.text("w3 w9")] * 3
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert caught.value.response.headers["retry-after"] == "1"


def test_texts_with_rows_do_not_wait(folder, twin):
    with running(arguments(folder, methods=None, max_rows=4, max_waiting=0)) as here:
        answer = here.chat("w3 w9", n=4)
    assert [choice.message.content for choice in answer.choices] == [twin.text("w3 w9")] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_take_too_long_end(folder, twin, stream):
    with running(arguments(folder, methods=None, max_seconds=0.5)) as here:
        engine = here.server.engine
        step, slow = engine._turn, threading.Event()
        engine._turn = lambda: (slow.is_set() and time.sleep(0.1), step())
        here.server.preparing._ends = frozenset()
        slow.set()
        with pytest.raises(openai.APIError) as caught:
            list(here.chat(max_tokens=400, stream=stream))
        slow.clear()
        assert caught.value.code == "timeout"
        assert stream or caught.value.status_code == 504
        assert wait_until(lambda: is_empty(here.server))
        assert here.chat("w3 w9").choices[0].message.content == twin.text("w3 w9")


def test_what_fails_while_decoding_is_an_error_of_those_who_asked(folder, twin, monkeypatch, caplog):
    """And nobody else's: the others' lane, and requests after it, go on."""
    from trl_parm.server import lanes

    read = lanes.read
    with running(arguments(folder, **TIGHT)) as here, ThreadPoolExecutor(4) as pool:
        broken = next(served for served in here.server.catalogue if served.name == "genarm")

        def fail(guided, cache, ids, pads, *own):
            if len(guided.terms) == 2 and cache.length > 8:
                raise RuntimeError("out of memory")
            return read(guided, cache, ids, pads, *own)

        monkeypatch.setattr(lanes, "read", fail)
        asked = [pool.submit(here.chat, "w3 w9", model) for model in ("parm", broken.name, "base")]
        with pytest.raises(openai.InternalServerError) as caught:
            asked[1].result()
        assert asked[0].result().choices[0].message.content == twin.text("w3 w9")
        assert asked[2].result().choices[0].message.content == twin.text("w3 w9", model="base")
        monkeypatch.setattr(lanes, "read", read)
        assert here.chat("w3 w9", "genarm").choices[0].message.content == twin.text("w3 w9", model="genarm")
        assert wait_until(lambda: is_empty(here.server))
    assert caught.value.code == "decoding_failed"
    assert "out of memory" not in caught.value.message  # that is for the log
    assert "out of memory" in caplog.text
    assert "w3" not in caplog.text


@pytest.mark.parametrize("failing", [1, 2])
def test_a_prompt_that_fails_ends_the_other_texts_of_its_request_alone(folder, twin, monkeypatch, failing):
    """Where texts are decoded each alone: another reading of the request is ahead, or has a row already."""
    from trl_parm.server import lanes

    monkeypatch.setattr("trl_parm.server.served.can_join", lambda guided_at: False)
    with running(arguments(folder, methods=None, optimize_for_cpu=False)) as here:
        read, calls = lanes.read, []

        def fail(guided, cache, *rest):
            calls.append(cache.length)
            if len(calls) == failing:
                raise RuntimeError("out of memory")
            return read(guided, cache, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(lanes, "read", fail)
            with pytest.raises(openai.InternalServerError, match="Decoding failed"):
                here.chat("w3 w9", n=2)
            assert wait_until(lambda: is_empty(here.server))
        assert calls == [0] * failing  # nothing was read for a text after that
        assert here.chat("w3 w9").choices[0].message.content == twin.text("w3 w9")


def in_a_lane(here, pool, **settings):
    """The answer to a long request that is being decoded."""
    asked = pool.submit(here.chat, "w3 w9", max_tokens=300, **settings)
    assert wait_until(lambda: any(lane.texts for lane in here.server.engine._lanes.values()))
    return asked


def test_what_can_not_join_is_an_error_of_those_who_came(folder, twin, monkeypatch):
    from trl_parm.server import lanes

    def fail(*given):
        raise RuntimeError("out of memory")

    with running(arguments(folder, methods=None)) as here, ThreadPoolExecutor(1) as pool:
        here.server.preparing._ends = frozenset()
        first = in_a_lane(here, pool)
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "joined", fail)
            with pytest.raises(openai.InternalServerError, match="Decoding failed"):
                here.chat("w5")
        here.chat("w5")
        assert not first.done()
        whole = first.result()
    tokens = twin.tokens(twin.ids("w3 w9"), most=300)
    assert twin.tokenizer.eos_token_id not in tokens[:-1]
    assert whole.choices[0].message.content == twin.decoded(tokens)


@pytest.mark.parametrize("weight", [1e-50, 1e-40, 1e-31])
def test_a_weight_that_float32_does_not_know_is_none(folder, twin, weight):
    """Its formula is another than that of the texts beside it."""
    with running(arguments(folder)) as here, ThreadPoolExecutor(1) as pool:
        here.server.preparing._ends = frozenset()
        first = in_a_lane(here, pool, model="genarm")
        tiny = here.chat("w5", "genarm", preference={"helpful": 1.0, "brief": weight}, beta=1e6)
        none = here.chat("w5", "genarm", preference={"helpful": 1.0, "brief": 0.0}, beta=1e6)
        assert not first.done()
        assert first.result().usage.completion_tokens == 300
    assert tiny.preference == none.preference
    assert tiny.choices[0].message.content == none.choices[0].message.content


def test_an_engine_that_is_closed_ends_what_waits(folder):
    with running(arguments(folder, methods=None)) as here, ThreadPoolExecutor(1) as pool:
        here.server.preparing._ends = frozenset()
        asked = pool.submit(here.chat, max_tokens=450)
        assert wait_until(lambda: bool(here.server.engine._lanes))
        here.server.engine.close()
        with pytest.raises(openai.InternalServerError) as caught:
            asked.result()
        assert caught.value.code == "shutting_down"
        assert httpx.get(f"{here.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            here.chat()
        assert here.client.models.list().data[0].objectives == OBJECTIVES
