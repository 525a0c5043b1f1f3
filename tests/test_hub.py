# SPDX-License-Identifier: Apache-2.0
"""Adapters over the Hub, through a local server that speaks its protocol, in processes of their own."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from hub_server import TOKEN, HubServer, faults_of, metadata_of

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

KNOWN = """
from trl_parm.identity import known_by
print("known by", known_by("user/arm"))
"""
BY_US = """
from peft_pblora import load_adapter
loaded = load_adapter(AutoModelForCausalLM.from_pretrained("base"), "user/arm")
assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), arm.parameters()))
"""

WITH_CARD = PUSH.replace(
    'arm.push_to_hub("user/arm", private={private})',
    'print(peft_pblora.push_to_hub(arm, "user/arm", private={private}).oid)',
)
LIST = """
import json
from huggingface_hub import HfApi
api = HfApi()
models = {model.id: model.tags for model in api.list_models(author="user")}
print(json.dumps([models, sorted(api.list_repo_files("user/arm")) if models else []]))
"""
BRANCH = WITH_CARD.replace(
    "print(", 'from huggingface_hub import HfApi\nHfApi().create_branch("user/arm", branch="next")\nprint('
)
BRANCH = BRANCH.replace("private={private}", 'revision="next"')
FOLDER = """
import peft_pblora
peft_pblora.push_to_hub("arm", "user/arm")
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub: HubServer, folder: Path, code: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    process = start(hub, folder, code, token)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(hub: HubServer, folder: Path, code: str, token: str | None = TOKEN) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
    }  # fmt: skip
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def listed(hub: HubServer, folder: Path, token: str | None = TOKEN) -> tuple[dict[str, list[str]], list[str]]:
    """The repositories of the user with their tags, and the files of the adapter's."""
    result = run(hub, folder, LIST, token)
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout))


@pytest.fixture
def arm(tmp_path):
    arm = tiny_arm(tiny_llama(1))
    tiny_llama(1).save_pretrained(tmp_path / "base")
    arm.save_pretrained(tmp_path / "arm")
    set_preference(arm, [0.25, 0.75])
    return arm


def test_push_and_load_by_id_and_revision(hub, arm, tmp_path):
    """What a name stands for is known by its commit, so that rows of an older one are told apart."""
    pushed = run(hub, tmp_path, PUSH.format(private=False) + LOAD.format(revision="main") + BY_US + KNOWN)
    assert pushed.returncode == 0, pushed.stderr + "\n".join(hub.requests)
    assert f"known by {hub.repositories['user/arm'].commits[-1][0]}" in pushed.stdout
    expected = arm(torch.arange(2, 18).view(2, 8)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    repository = hub.repositories["user/arm"]
    assert repository.large == {"adapter_model.safetensors"}
    assert {"adapter_config.json", "README.md"} <= set(repository.commits[-1][1])
    (tmp_path / "logits.pt").unlink()
    first, files = repository.commits[-1]
    repository.commit({**files, "adapter_config.json": b"not json"})  # the first commit still loads by its revision
    loaded = run(hub, tmp_path, LOAD.format(revision=first) + KNOWN, token=None)
    assert loaded.returncode == 0, loaded.stderr
    assert f"known by {repository.commits[-1][0]}" in loaded.stdout
    assert repository.commits[-1][0] != first
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.slow
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


def test_what_was_pushed_is_listed_and_is_text_and_safetensors(hub, arm, tmp_path):
    """Its base model is a folder here, a path that the Hub would refuse in a card's metadata."""
    (tmp_path / "runs/models").mkdir(parents=True)
    (tmp_path / "base").rename(tmp_path / "runs/models/base")
    pushed = run(hub, tmp_path, WITH_CARD.replace('"base"', '"runs/models/base"').format(private=True))
    assert pushed.returncode == 0, pushed.stderr
    models, files = listed(hub, tmp_path)
    assert {"pblora", "preference-conditioned"} <= set(models["user/arm"])
    assert files == [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert listed(hub, tmp_path, token=None) == ({}, [])  # it is private
    content = hub.repositories["user/arm"].commits[-1][1]
    assert "auto_map" not in json.loads(content["adapter_config.json"])  # no code to trust
    card = content["README.md"].decode()
    assert faults_of(card) == []
    assert "base_model" not in metadata_of(card)
    assert not any("runs/" in tag for tag in metadata_of(card)["tags"])


@pytest.mark.slow
def test_a_branch_of_its_own(hub, arm, tmp_path):
    assert run(hub, tmp_path, WITH_CARD.format(private=False)).returncode == 0
    repository = hub.repositories["user/arm"]
    first = repository.commits[-1]
    changed = tiny_arm(tiny_llama(1), seed=7)
    changed.save_pretrained(tmp_path / "arm")
    pushed = run(hub, tmp_path, BRANCH)
    assert pushed.returncode == 0, pushed.stderr
    assert repository.commits[-1] == first
    for revision, expected in (("next", changed), ("main", arm), (pushed.stdout.strip(), changed)):
        loaded = run(hub, tmp_path, LOAD.format(revision=revision), token=None)
        assert loaded.returncode == 0, loaded.stderr
        set_preference(expected, [0.25, 0.75])
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected(torch.arange(2, 18).view(2, 8)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["put_object", "commit"])
def test_an_upload_that_breaks_off_leaves_nothing_to_load_and_can_be_repeated(hub, arm, tmp_path, where):
    """Its process is killed while the weights are on their way, or when only the commit is missing."""
    hub.stands_still_at = where
    process = start(hub, tmp_path, WITH_CARD.format(private=False))
    assert hub.stands_still.wait(120), hub.requests
    process.kill()
    process.communicate()
    repository = hub.repositories["user/arm"]
    assert list(repository.commits[-1][1]) == [".gitattributes"]
    refused = run(hub, tmp_path, LOAD.format(revision="main"))
    assert refused.returncode == 1
    assert "Can't find 'adapter_config.json' at 'user/arm'" in refused.stderr
    hub.stands_still_at = None
    again = run(hub, tmp_path, WITH_CARD.format(private=False) + LOAD.format(revision="main"))
    assert again.returncode == 0, again.stderr
    assert len(repository.commits) == 2
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), arm(torch.arange(2, 18).view(2, 8)).logits)


@pytest.mark.slow
def test_of_a_trainers_folder_no_pickle_is_pushed(hub, arm, tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-3/adapter_model.safetensors"):
        (tmp_path / "arm" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "arm" / name).write_bytes(pickle.dumps({}))
    (tmp_path / "arm/pareto.png").write_bytes(b"a picture")
    pushed = run(hub, tmp_path, FOLDER)
    assert pushed.returncode == 0, pushed.stderr
    files = set(hub.repositories["user/arm"].commits[-1][1])
    assert files == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "pareto.png",
    }  # fmt: skip


TRAINER = """
import torch
from training_runs import tiny_tokenizer, trainer
run = trainer(
    "out", tiny_tokenizer(), save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="user/arm",
    hub_strategy="all_checkpoints", hub_always_push=True,
)
run.train()
run.save_model()
assert run.push_to_hub() is not None
"""


def test_a_trainer_pushes_its_checkpoints_and_saves_its_model_afterwards(hub, tmp_path):
    """transformers would write each checkpoint over the folder's model, pickled arguments too."""
    pushed = run(hub, tmp_path, TRAINER)
    assert pushed.returncode == 0, pushed.stderr
    files = set(hub.repositories["user/arm"].commits[-1][1])
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= files
    assert {"adapter_model.safetensors", "README.md", "tokenizer.json"} <= files
    assert not [name for name in files if name.endswith("training_args.bin")]
    of_step = hub.repositories["user/arm"].commits[1][1]
    assert not {"trainer_state.json", ".written_by_trl_parm", "sums_since_log.json"} & set(of_step)


@pytest.mark.slow
def test_an_adapter_as_a_pickle_is_refused(hub, arm, tmp_path):
    (tmp_path / "arm/adapter_model.safetensors").rename(tmp_path / "arm/adapter_model.bin")
    refused = run(hub, tmp_path, FOLDER)
    assert refused.returncode == 1
    assert "There is no adapter_model.safetensors" in refused.stderr
    assert hub.repositories == {}


class Code:
    """A pickle of it runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.slow
def test_a_pickle_in_a_repository_runs_no_code(hub, arm, tmp_path):
    assert run(hub, tmp_path, PUSH.format(private=False)).returncode == 0
    files = dict(hub.repositories["user/arm"].commits[-1][1])
    del files["adapter_model.safetensors"]
    hub.repositories["user/arm"].commit({**files, "adapter_model.bin": pickle.dumps({"weight": Code()})})
    refused = run(hub, tmp_path, LOAD.format(revision="main"))
    assert refused.returncode == 1
    assert "adapter_model.bin" in "\n".join(hub.requests)
    assert "UnpicklingError" in refused.stderr
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("metadata", "faults"),
    [
        ("base_model: user/base\ntags: [a]\ndatasets: [user/data]\nlibrary_name: peft", 0),
        ("base_model: runs/models/base\ndatasets: data/of/mine", 2),
        ("tags: a\nlicense: [mit]", 2),
        ("tags: [a", 1),
    ],
)
def test_the_server_refuses_metadata_as_the_hub_does(metadata, faults):
    assert len(faults_of(f"---\n{metadata}\n---\n\n# A model\n")) == faults


@pytest.mark.slow
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
