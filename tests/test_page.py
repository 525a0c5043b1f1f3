# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation that one can send: whole, alone, and safe, whatever models and prompts have written."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from trl_parm.cli.main import main
from trl_parm.records import read_rows


EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1">&amp; "w1" \u2028'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def save(folder, objectives, methods=("Base", "PARM", "<b>GenARM</b>"), prompts=6):
    """An evaluation of three methods whose texts try to leave their place."""
    chance, rows = np.random.default_rng(0), []
    vertices = np.eye(len(objectives)).tolist()
    grid = [*vertices, [1 / len(objectives)] * len(objectives)]
    for method in methods:
        for α in [None] if method == "Base" else grid:
            for i in range(prompts):
                rewards = {name: round(float(chance.normal()), 4) for name in objectives}
                rows.append(
                    {
                        "method": method, "preference": α, "label": "-", "prompt": f"w{i} {EVIL if i == 1 else ''}",
                        "response": f"{method} at {α} on {i} {EVIL if i == 2 else ''}", **rewards, "tokens": 3,
                        "seconds": 1.0, "seed": i, "extra_parameters": 0, "extra_bytes": 0, "capped": False,
                        "log_prob_base": -1.0, "log_ratio": 0.5,
                    }
                )  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.config.json").write_text(json.dumps({"objectives": objectives, "template": EVIL}))
    return str(folder / "results.jsonl")


def page_of(folder, objectives=("helpful", "harmless"), *words):
    results = save(folder, list(objectives))
    made = ["plot", "--results", results, "--output_dir", str(folder / "out"), "--html", "true", "--resamples", "50"]
    assert main([*made, *words]) == 0
    return folder / "out/fronts.html"


class Read(HTMLParser):
    """The elements of a page, and the text of each kind."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "line", "path", "circle", "rect", "polyline", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_a_page_has_everything_and_needs_nothing(tmp_path):
    path = page_of(tmp_path, ("helpful", "harmless"), "--references", '{"helpful": -2, "harmless": -2}')
    text = path.read_text()
    page = Read(text)
    kinds = [tag for tag, _ in page.elements]
    assert kinds.count("script") == 2
    assert "img" not in kinds
    links = [value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href")]
    assert links == ["data:,"]
    assert "http:" not in re.sub(r"(?s)<script.*", "", text)
    assert "https:" not in re.sub(r"(?s)<script.*", "", text)
    assert "default-src 'none'" in dict(page.elements)["meta"].get("content", "") or "default-src 'none'" in text
    rows = read_rows(tmp_path / "results.jsonl")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [row["response"] for row in data["rows"]] == [row["response"] for row in rows]
    assert data["prompts"] == list(dict.fromkeys(row["prompt"] for row in rows))
    assert data["methods"] == ["Base", "PARM", "<b>GenARM</b>"]
    points = [attrs for _, attrs in page.elements if attrs.get("class") == "point"]
    assert len(points) == 1 + 2 * 3
    means = {}
    for row in rows:
        means.setdefault((row["method"], str(row["preference"])), []).append((row["helpful"], row["harmless"]))
    for point, values in zip(points, means.values(), strict=True):
        first, second = np.mean(values, 0)
        assert f"helpful {first:.3g}".replace("-", "−") in point["data-told"]
        assert f"harmless {second:.3g}".replace("-", "−") in point["data-told"]
        assert re.search(r"\[−?[\d.e−]+, −?[\d.e−]+\]", point["data-told"])
    cells = page.texts["td"]
    assert "hypervolume" in cells
    assert "<b>GenARM</b>" in cells
    assert EVIL in json.loads(page.texts["pre"][0])["template"]
    where = {(p["data-method"], p["data-alpha"]): p for p in points}
    assert ("PARM", "helpful 1, harmless 0") in where


def test_marks_stand_where_their_numbers_are(tmp_path):
    page = Read(page_of(tmp_path).read_text())
    circles = [attrs for tag, attrs in page.elements if tag == "circle"]
    told = [a["data-told"] for _, a in page.elements if a.get("class") == "point" and a["data-alpha"] != "-"]
    number = re.compile(r"^(?:helpful|harmless) (−?[\d.]+)", re.MULTILINE)
    values = [[float(found.replace("−", "-")) for found in number.findall(text)] for text in told]
    for axis, name, sign in ((0, "cx", 1), (1, "cy", -1)):
        at = np.array([float(circle[name]) for circle in circles])
        assert np.corrcoef(at, [value[axis] for value in values])[0, 1] * sign > 0.999


@pytest.mark.parametrize("objectives", [["a", "b", "c"], ["a", "b", "c", "d"]])
def test_a_plane_for_each_pair_of_objectives(tmp_path, objectives):
    page = Read(page_of(tmp_path, objectives).read_text())
    names = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg"]
    count = len(objectives)
    assert len(names) == count * (count - 1) // 2
    assert names[0] == "b over a"


def test_the_responses_of_so_many_prompts(tmp_path, capsys):
    text = page_of(tmp_path, ("helpful", "harmless"), "--html_prompts", "2").read_text()
    assert "To the first 2 of 6 prompts" in text
    assert text.count("on 3 ") == 0
    assert "needs no other file" in capsys.readouterr().out


def test_a_page_of_somebody_stays(tmp_path):
    results = save(tmp_path, ["helpful", "harmless"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/fronts.html").write_text("mine")
    assert main(["plot", "--results", results, "--output_dir", str(tmp_path / "out"), "--html", "true"]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fronts.html"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_page_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = page_of(tmp_path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors, requests = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.title() == "Responses at preferences"
        assert page.locator(".card").count() == 1 + 2 * 3  # the first prompt, all methods and preferences
        point = page.locator('.point[data-method="PARM"]').nth(1)
        point.hover()
        told = page.locator("#told")
        assert told.is_visible()
        assert told.inner_text().splitlines()[:2] == ["PARM", "α: helpful 0, harmless 1"]
        point.click()
        assert page.locator("#method").input_value() == "PARM"
        assert [card.inner_text() for card in page.locator(".card .text").all()] == ["PARM at [0.0, 1.0] on 0 "]
        page.locator("#method").select_option("all")
        names = [head.inner_text().split("\n")[0] for head in page.locator(".card h3").all()]
        assert names == ["Base", "PARM", "<b>GenARM</b>"]  # side by side, with the control
        page.locator("#words").fill("W2")
        assert page.locator("#asked").inner_text().startswith("w2")
        assert EVIL.split("\u2028")[0].strip() in page.locator(".card .text").first.inner_text()
        page.locator("#words").fill("script")
        assert page.locator("#prompt option").count() == 1
        page.locator("#words").fill("nothing has this")
        assert page.locator("#asked").inner_text() == "No prompt has these words."
        assert page.locator(".card").count() == 0
        assert page.title() == "Responses at preferences"
        assert errors == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        browser.close()
