# SPDX-License-Identifier: Apache-2.0
"""The demo app in a real, headless Chromium: started as a user starts it, with tiny models and nothing of the net."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import tiny_arm, tiny_llama
from demo_folder import OBJECTIVES, save


pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 180


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of the demo, in a process of its own."""
    folder = tmp_path_factory.mktemp("browser")
    base = tiny_llama(0)
    base.generation_config.eos_token_id = None  # an answer ends where it is told, so that there is time to stop it
    save(folder, base, tiny_arm(tiny_llama(0), OBJECTIVES))
    command = [sys.executable, "-m", "trl_parm.demo", "--arm", str(folder / "arm"), "--model", str(folder / "base")]
    log = folder / "log"
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield wait_for_url(process, log)
    finally:
        process.terminate()
        process.wait(30)


def wait_for_url(process: subprocess.Popen, log: Path) -> str:
    for _ in range(SECONDS):
        found = re.search(r"http://\S+:\d+", log.read_text())
        if found:
            assert found[0].startswith("http://127.0.0.1:")
            urllib.request.urlopen(found[0], timeout=SECONDS).read()
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(1)
    pytest.fail(f"The demo did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A visitor with a window of his own, from which nothing but the demo can be reached."""

    def __init__(self, browser, url: str) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 1000})
        self.context.set_default_timeout(SECONDS * 1000)
        self.page, self.outside, self.errors = self.context.new_page(), [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.context.route(lambda address: not address.startswith(url), self._refuse)
        self.page.goto(url)
        self.page.wait_for_selector("#prompt textarea")

    def _refuse(self, route) -> None:
        self.outside.append(route.request.url)
        route.abort()

    def set(self, field: str, value: object) -> None:
        self.page.locator(f"#{field} input[type=number]").fill(str(value))

    def move(self, number: int, value: float) -> None:
        """Drags a slider, and waits until the other one has followed."""
        self.page.locator(f"#weight-{number} input[type=range]").fill(str(value))
        self.page.wait_for_function(
            "([i, v]) => Math.abs(document.querySelector(`#weight-${i} input[type=number]`).value - v) < 1e-6",
            arg=[1 - number, round(1 - value, 2)],
        )

    def weights(self) -> list[float]:
        return [float(self.page.input_value(f"#weight-{i} input[type=number]")) for i in range(2)]

    def send(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.click("#send")

    def wait_for(self, status: str) -> None:
        self.page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=status)

    def answers(self, number: int) -> tuple[str, str]:
        """The answers to the session's question of this number, once they are done."""
        rows = "document.querySelectorAll('#table tr').length"
        self.page.wait_for_function(f"number => {rows} === number + 1", arg=number)
        return tuple(self.page.inner_text(f"#{name} .judged .text") for name in ("base", "guided"))

    def ask(self, prompt: str, weight: float, number: int = 1) -> tuple[str, str]:
        self.move(0, weight)
        self.send(prompt)
        return self.answers(number)

    def points(self) -> int:
        return self.page.locator("#picture circle").count()


@pytest.fixture
def visit(browser, url):
    visitors = []

    def come() -> Visitor:
        visitors.append(Visitor(browser, url))
        return visitors[-1]

    yield come
    for visitor in visitors:
        assert visitor.outside == []
        assert visitor.errors == []
        visitor.context.close()


def test_a_slider_is_moved_and_another_answer_seen(visit):
    visitor = visit()
    assert visitor.weights() == [0.5, 0.5]
    visitor.set("beta", "0.3")
    first = visitor.ask("w3 w9", 0.9)
    assert visitor.weights() == [0.9, 0.1]
    assert "helpful 0.90 · brief 0.10 · β 0.3" in visitor.page.inner_text("#guided h3")
    second = visitor.ask("w3 w9", 0.1, number=2)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert visitor.points() == 4
    assert "tokens/s" in visitor.page.inner_text("#cost")
    assert visitor.page.locator("#guided .text span[title*='log-ratio']").count() > 5
    visitor.page.click("#clear")
    visitor.page.wait_for_selector("#picture .parm-empty")


def test_the_keyboard_is_enough(visit):
    visitor = visit()
    visitor.page.fill("#prompt textarea", "w3")
    visitor.page.press("#prompt textarea", "Enter")
    visitor.wait_for("Done")
    visitor.page.locator("#weight-0 input[type=range]").press("ArrowRight")
    visitor.page.wait_for_function("document.querySelector('#weight-1 input[type=number]').value == 0.49")
    assert visitor.weights() == [0.51, 0.49]


def test_two_visitors_at_once_keep_apart(visit):
    one, two = visit(), visit()
    alone = [one.ask("w20 w21", 0.0), two.ask("w20 w21", 1.0)]
    assert alone[0][1] != alone[1][1]
    for visitor, weight in ((one, 0.0), (two, 1.0)):
        visitor.move(0, weight)
    one.send("w20 w21")
    two.send("w20 w21")
    for visitor, own in ((one, alone[0]), (two, alone[1])):
        assert visitor.answers(2) == own
        assert visitor.points() == 4
    assert "helpful 0.00" in one.page.inner_text("#guided h3")
    assert "helpful 1.00" in two.page.inner_text("#guided h3")


def test_bad_input_says_what_is_wrong_and_breaks_nothing(visit):
    visitor = visit()
    visitor.send("")
    visitor.wait_for("The prompt is empty")
    visitor.send("w1 " * 3000)
    visitor.wait_for("3003 tokens, but at most 1024 fit")
    visitor.set("beta", "-1")
    visitor.send("w3")
    visitor.wait_for("β is -1")
    visitor.set("beta", "")
    visitor.send("w3")
    visitor.wait_for("“β” is empty")
    assert visitor.page.locator("#status [role=alert]").count() == 1
    assert visitor.points() == 0
    visitor.set("beta", "1")
    assert all(visitor.ask("w3 <b>bold</b>", 0.5))
    assert visitor.page.locator("#table b").count() == 0
    assert "<b>bold</b>" in visitor.page.locator("#table .prompt").get_attribute("title")


def test_stop_stops_and_the_next_question_is_answered(visit):
    visitor = visit()
    visitor.page.get_by_text("Sampling").click()
    visitor.set("most", "256")
    visitor.send("w3")
    visitor.wait_for("Writing")
    visitor.page.click("#stop")
    visitor.wait_for("Stopped")
    visitor.set("most", "5")
    assert all(visitor.ask("w3", 0.5))
    assert visitor.points() == 2
