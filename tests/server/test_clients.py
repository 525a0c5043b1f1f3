# SPDX-License-Identifier: Apache-2.0
"""Clients of ours: the one with sliders in `examples`, without its page, and a judge."""

import importlib.util
import re
from pathlib import Path

import pytest


pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
pytest.importorskip("gradio", reason="needs the extra `demo`")

from server.running import OBJECTIVES, Twin, arguments, running, save_models

from trl_parm.endpoint import Endpoint, Failure
from trl_parm.judges import Judge


EXAMPLE = Path(__file__).parents[2] / "examples" / "sliders.py"


def test_sliders_steer(tmp_path, monkeypatch):
    save_models(tmp_path)
    twin = Twin(tmp_path)
    with running(arguments(tmp_path, methods=None, max_tokens=12)) as here:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{here.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        spec = importlib.util.spec_from_file_location("sliders", EXAMPLE)
        sliders = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sliders)
        assert sliders.objectives == OBJECTIVES
        # Its answers are sampled; greedy ones can be compared.
        create = sliders.client.chat.completions.create
        monkeypatch.setattr(sliders.client.chat.completions, "create", lambda **given: create(temperature=0, **given))
        found = list(sliders.answer("w3 w9", 0.2, 0.6))
        assert found[-1] == twin.text("w3 w9", {"helpful": 0.25, "brief": 0.75})
        assert len(found) > 3


def test_a_judge_may_be_what_we_serve(tmp_path):
    save_models(tmp_path)
    twin, preference = Twin(tmp_path), {"helpful": 0.25, "brief": 0.75}
    request = {"temperature": 0, "max_tokens": 12, "stop": [" w"], "preference": preference}
    responses = ["w3 w9", "w4 w5 w6", "w7"]
    with running(arguments(tmp_path, methods=None)) as here:
        endpoint = Endpoint(f"{here.url}/v1", "parm", request=request, cache="", pause=0.0)
        endpoint.check()
        found = Judge(endpoint, "w1 {response}", r"w(\d+)")(["w2"] * 3, responses)
        assert endpoint.counted["requests"] == 3
        assert endpoint.counted["completion_tokens"] > 0
        (refused,) = Judge(Endpoint(f"{here.url}/v1", "gpt", cache=""), "{response}")(["w2"], ["w3"])
    texts = [twin.text(f"w1 {response}", preference) for response in responses]
    assert all(" w" in text for text in texts)  # at which all answers end
    assert found == [int(re.findall(r"w(\d+)", text.split(" w")[0])[-1]) for text in texts]
    assert len(set(found)) > 1
    assert isinstance(refused, Failure)
    assert "gpt" in refused.reason
