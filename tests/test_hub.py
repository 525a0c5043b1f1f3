# SPDX-License-Identifier: Apache-2.0
"""Adapters over the Hub, through a local server that speaks its protocol, in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from hub_server import TOKEN, HubServer

from peft_pblora import set_preference


PUSH = """
import peft_pblora
from peft import PeftModel
from transformers import AutoModelForCausalLM
arm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "arm")
arm.push_to_hub("user/arm", private={private})
"""
LOAD = """
import torch
import peft_pblora
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
arm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "user/arm", revision={revision!r}).eval()
peft_pblora.set_preference(arm, {{"helpful": 0.25, "harmless": 0.75}})
torch.save(arm(torch.arange(2, 18).view(2, 8)).logits, "logits.pt")
"""


WITH_CARD = PUSH.replace(
    'arm.push_to_hub("user/arm", private={private})',
    'print(peft_pblora.push_to_hub(arm, "user/arm", private={private}).oid)',
)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(
    hub: HubServer, folder, code: str, token: str | None = TOKEN, cache: str = "cache"
) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def arm(tmp_path):
    arm = tiny_arm(tiny_llama(1))
    tiny_llama(1).save_pretrained(tmp_path / "base")
    arm.save_pretrained(tmp_path / "arm")
    set_preference(arm, [0.25, 0.75])
    return arm


def test_push_and_load_by_id_and_revision(hub, arm, tmp_path):
    pushed = run(hub, tmp_path, PUSH.format(private=False))
    assert pushed.returncode == 0, pushed.stderr + "\n".join(hub.requests)
    repository = hub.repositories["user/arm"]
    assert repository.large == {"adapter_model.safetensors"}
    assert {"adapter_config.json", "README.md"} <= set(repository.commits[-1][1])
    first = repository.commits[-1][0]
    broken = {**repository.commits[-1][1], "adapter_config.json": b"not json"}
    expected = arm(torch.arange(2, 18).view(2, 8)).logits
    for revision in ("main", first):
        loaded = run(hub, tmp_path, LOAD.format(revision=revision), token=None)
        assert loaded.returncode == 0, loaded.stderr
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
        repository.commit(broken)  # the first commit still loads by its revision


def test_our_push_keeps_the_card_that_shows_the_import(hub, arm, tmp_path):
    """The model's own `push_to_hub` writes transformers' general card over PEFT's."""
    assert run(hub, tmp_path, PUSH.format(private=False)).returncode == 0
    repository = hub.repositories["user/arm"]
    assert b"import peft_pblora\n" not in repository.commits[-1][1]["README.md"]
    pushed = run(hub, tmp_path, WITH_CARD.format(private=False))
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == repository.commits[-1][0]
    assert b"import peft_pblora\n" in repository.commits[-1][1]["README.md"]
    loaded = run(hub, tmp_path, LOAD.format(revision="main"), token=None)
    assert loaded.returncode == 0, loaded.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), arm(torch.arange(2, 18).view(2, 8)).logits)


def test_a_private_repository_needs_the_token(hub, arm, tmp_path):
    assert run(hub, tmp_path, PUSH.format(private=True)).returncode == 0
    refused = run(hub, tmp_path, LOAD.format(revision="main"), token=None)
    assert refused.returncode == 1
    assert "Can't find 'adapter_config.json' at 'user/arm'" in refused.stderr
    loaded = run(hub, tmp_path, LOAD.format(revision="main"))
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_loading_without_the_import_fails_in_peft(hub, arm, tmp_path):
    """PEFT offers no way to find a method that was not imported; the README and every card show the import."""
    assert run(hub, tmp_path, PUSH.format(private=False)).returncode == 0
    failed = run(hub, tmp_path, LOAD.format(revision="main").replace("import peft_pblora\n", ""))
    assert failed.returncode == 1
    assert "KeyError: 'PBLORA'" in failed.stderr
