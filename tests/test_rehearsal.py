# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments from relabelling to figures, as their configurations say it, in miniature on a CPU.

Flags stand in for size alone: fewer pairs, steps, prompts and tokens, and a CPU. All else is the file's, and each
experiment gives the commands of `docs/reproduce.md` in their order. What is not rehearsed is the 4-bit format of the
65B model, which needs a library and a GPU: its stand-in has weights in 16 bits.
"""

import csv
import json
import re
from pathlib import Path

import pytest
from forked_commands import ForkedCommands
from hub_server import TOKEN, HubServer
from papers_cost import EXPERIMENTS, Config, configs
from PIL import Image
from rehearsal import put_papers

from trl_parm.decoding.vocabulary import PROBE
from trl_parm.evaluation.methods import METHODS
from trl_parm.records import read_rows


pytestmark = pytest.mark.slow
TRAIN = (
    "--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--gradient_accumulation_steps", "1",
    "--per_device_train_batch_size", "2", "--warmup_steps", "0", "--logging_steps", "1", "--save_steps", "2",
)  # fmt: skip
PAIRS = 30
RELABEL = ("--validation_size", "4", "--test_size", "8")
PROMPTS = 3
EVALUATE = (
    "--max_new_tokens", "3", "--num_prompts", str(PROMPTS), "--batch_size", "64", "--optimize_for_cpu", "false",
)  # fmt: skip
AFTER = {"safety_65b": ["safety_7b"], "ablation": ["safety_7b"], "tulu": ["assistant"]}
"""Experiment → the ones whose pairs and models it reads."""
READ = {
    "alpaca-7b": (r"<s> BEGINNING OF CONVERSATION: USER: .* ASSISTANT:(.*</s>)?", "ASSISTANT:"),
    "beaver-7b": (r"<s> BEGINNING OF CONVERSATION: USER: .* ASSISTANT:.*", ""),
    "alpaca-lora-65B": (r"<s> Below is an instruction that .*### Instruction:\n.*", "\n\n### Response:\n"),
    "Llama-2-7b-chat": (r"(<s> \[INST\] .*? \[/INST\]( .*? </s>)?)+", " [/INST]"),
    "TinyLlama": (r"(<\|user\|>\n.*?</s> \n<\|assistant\|>\n(.*?</s> \n)?)+", "<|assistant|>\n"),
    "tulu-2": (r"(<\|user\|>\n.*?\n<\|assistant\|>\n(.*?</s> \n)?)+", "<|assistant|>\n"),
    "gpt2-large": (r"(\n\nHuman: .*?\n\nAssistant: .*?)+|\w*( please)+\n\nAssistant: .*", ""),  # a prompt is cut off
    "humor-no-humor": (r"\[CLS\] (?!.*(human|assistant|about)).*\[SEP\]", ""),
}
"""Part of a model's name → the template of the papers, in all that it reads, and how a prompt ends that it answers."""
CUT = r"(<s> )?\w*( please)+.*"
"""The end of a prompt that is too long."""


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """Runs commands in a folder whose Hub has the papers' models and data."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with HubServer() as hub:
        commits = put_papers(folder / "hub", hub)
        environment = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "CI": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRL_PARM_TRACEBACK": "1",
        }  # fmt: skip
        (folder / "work").mkdir()
        with ForkedCommands(folder / "work", environment) as commands:
            yield Papers(commands, commits)


class Papers:
    """Experiments that have run so far, with what the tokenizers of each command have read."""

    def __init__(self, commands: ForkedCommands, commits: dict[str, str]) -> None:
        self.commands, self.commits = commands, commits
        self.read: dict[str, dict[str, dict[str, set[str]]]] = {}

    def run(self, experiment: str) -> None:
        """Gives the commands of an experiment, once, after those of others that it needs."""
        if experiment not in self.read:
            for other in AFTER.get(experiment, ()):
                self.run(other)
            self.read[experiment] = {config.name: self.commands(words_of(config)) for config in configs(experiment)}


def words_of(config: Config) -> list[str]:
    """The command of a file, with flags for its size."""
    program, verb = config.words
    flags = {"relabel": RELABEL, "train": TRAIN, "dpo": TRAIN, "evaluate": EVALUATE, "plot": ()}[verb]
    if verb == "relabel":
        data = config.given["data"]
        flags += ("--data", json.dumps({**data, "split": re.sub(r"\[.*|$", f"[:{PAIRS}]", data["split"], count=1)}))
    return [program, verb, "--config", str(config.path), *flags]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_from_its_data_to_its_figures(papers, experiment):
    papers.run(experiment)
    work = papers.commands.folder
    given, drawn = (Config(experiment, name).given for name in ("evaluate", "plot"))
    objectives = list(given["rewards"])
    entries = [{"method": entry} if isinstance(entry, str) else entry for entry in given["methods"]]
    names = {entry.get("name", METHODS[entry["method"]].title): METHODS[entry["method"]].control for entry in entries}
    grid = [tuple(one) for one in given.get("preferences", [(i / 10, 1 - i / 10) for i in range(11)])]
    expected = [(name, pytest.approx(α)) for name, control in names.items() if not control for α in grid]
    expected += [(name, None) for name, control in names.items() if control]
    rows = read_rows(work / given["output_dir"] / "results.jsonl")
    found = [(row["method"], row["preference"] and tuple(row["preference"])) for row in rows]
    assert len(rows) == PROMPTS * len(expected)
    assert {name for name, _ in found} == set(names)
    for name, α in expected:
        assert sum(other == name and preference == α for other, preference in found) == PROMPTS
    assert all(row["tokens"] >= 1 and all(isinstance(row[name], float) for name in objectives) for row in rows)
    prompts = {str(row["prompt"]) for row in rows}
    assert len(prompts) == PROMPTS
    assert max(map(len, prompts)) > 1000  # which is cut

    record = json.loads((work / given["output_dir"] / "results.config.json").read_text())
    assert record["base"]["fingerprint"] == papers.commits[given["model_name_or_path"]]
    assert {reward["fingerprint"] for reward in record["rewards"].values()} <= set(papers.commits.values())

    figures = work / drawn["output_dir"]
    points = table(figures / "fronts.csv")
    assert len(points) == len(expected)
    assert {f"α {name}" for name in objectives} | set(objectives) <= set(points[0])
    measures = table(figures / "measures.csv")
    assert {row["method"] for row in measures} == set(names)
    assert {row["measure"] for row in measures} >= {"hypervolume", "mean inner product"}
    references = {row["reference"] for row in measures if row["measure"] == "hypervolume"}
    assert references == {
        ", ".join(f"{name} {reference[name]:g}" for name in objectives) for reference in drawn["references"]
    }
    assert {row["minus"] for row in table(figures / "differences.csv")} == {drawn["against"]}
    assert {row["method"] for row in table(figures / "costs.csv")} == set(names)
    assert all(f"| {name} |" in (figures / "measures.md").read_text() for name in names)
    pictures = {path.name for path in figures.glob("*.png")}
    assert pictures
    for picture in pictures:
        assert min(Image.open(figures / picture).size) > 300
        assert (figures / picture).with_suffix(".svg").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_models_read_the_templates_of_the_papers(papers, experiment):
    papers.run(experiment)
    for config in configs(experiment):
        read = papers.read[experiment][config.name]
        assert len(read) >= {"plot": 0, "dpo": 1, "train": 1}.get(config.words[1], 2)
        for name, texts in read.items():
            if name.startswith("runs/"):  # an adapter's folder, with a tokenizer of its own
                name = Config(*name.split("/")[1:3]).given["model_name_or_path"]
            (found,) = (READ[part] for part in READ if part in name)
            pattern, end = found
            for text in texts - {PROBE}:
                fits = re.fullmatch(f"{pattern}|{CUT}" if end else pattern, text, re.DOTALL)
                assert fits, f"{config.name}: {name} read {text!r}"
                assert config.name != "evaluate" or text.endswith(end), f"{name} answered {text!r}"
