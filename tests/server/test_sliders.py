# SPDX-License-Identifier: Apache-2.0
"""The client with sliders in `examples`, without its page."""

import importlib.util
from pathlib import Path

import pytest


pytest.importorskip("openai", reason="needs the extra `dev`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
pytest.importorskip("gradio", reason="needs the extra `demo`")

from server.running import OBJECTIVES, Twin, arguments, running, save_models


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
