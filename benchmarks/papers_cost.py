# SPDX-License-Identifier: Apache-2.0
"""What the papers' experiments in `examples/configs/` need, worked out from the configurations: nothing runs.

    python benchmarks/papers_cost.py

Prints the tables of `docs/reproduce.md`: what each command needs in hours, GPUs and memory, and each experiment. The
assumptions are the constants below. GB are 2^30 bytes.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


CONFIGS = Path(__file__).parents[1] / "examples/configs"
GIB = 2**30

GPU = "A100 of 80 GB"
GPU_BYTES = 80 * GIB
USABLE = 0.9
"""Share of the memory that tensors may take."""
PEAK = 312e12
"""Operations a second, bfloat16, dense."""
BANDWIDTH = 2.0e12
"""Bytes of memory a second."""
TRAINING_SHARE = 0.35
"""Share of the peak that training reaches."""
SCORING_SHARE = 0.35
"""Share of the peak that reward models, evaluations of training and prompts reach."""
READING_SHARE = 0.6
"""Share of the bandwidth at which a token of decoding reads weights and cache."""
LAYER_SECONDS = 0.8e-3
"""Least time of one layer in a token of decoding: Python starts its kernels one by one, without CUDA graphs."""
FORWARD, RECOMPUTED, BACKWARD = 2, 2, 2
"""Operations for a parameter and a token: forward, again in gradient checkpointing, backward to the activations, since
frozen weights have no gradients of their own."""
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "auto": 4}
"""Of a parameter."""
GPTQ_BYTES = 0.56
"""Of a parameter in 4 bits, with its scales."""
OPTIMIZER_BYTES = 16
"""Of a trained parameter: weight, gradient and two moments in 32 bits."""
CHECKPOINT_BYTES = 12
"""Of a trained parameter in a checkpoint: weight and two moments."""
CONTEXT_BYTES = 2 * GIB
"""CUDA's own, and what the allocator can't use."""
ROWS = {"PKU-Alignment/PKU-SafeRLHF-10K": 10_000}
"""Pairs of a data set that is read whole."""
PROMPT_TOKENS = {"safety_7b": 45, "assistant": 180}
RESPONSE_TOKENS = {"safety_7b": 110, "assistant": 70}
"""Mean tokens of the data with padding, by the experiment that labels them. Time of training is in proportion."""
ROW_BYTES = 3_000
"""Of a row of results, or of a pair, in JSON."""


@dataclass(frozen=True)
class Model:
    """A transformer, by its architecture.

    Attributes:
        layers, hidden, inner, heads, cached_heads, vocabulary (`int`): Its sizes; `cached_heads` have keys and values.
        matrices (`int`): Of the feed-forward part: three where it has a gate.
        ends (`int`): Matrices of the vocabulary's size, embeddings and head.
        bytes (`float`): Of a parameter, as it is on disk.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    cached_heads: int
    vocabulary: int
    matrices: int = 3
    ends: int = 2
    bytes: float = 2

    @property
    def cached(self) -> int:
        """Width of the keys, and of the values."""
        return self.hidden // self.heads * self.cached_heads

    @property
    def parameters(self) -> int:
        """All but norms and biases."""
        attention = 2 * self.hidden * (self.hidden + self.cached)
        layer = attention + self.matrices * self.hidden * self.inner
        return self.layers * layer + self.ends * self.vocabulary * self.hidden

    @property
    def disk(self) -> float:
        return self.parameters * self.bytes

    def loaded(self, dtype: str) -> float:
        """Bytes in memory; a quantised model stays so."""
        return self.parameters * min(BYTES[dtype], self.bytes if self.bytes < 1 else math.inf)

    def cache(self, rows: int, tokens: int, dtype: str = "bfloat16") -> float:
        """Bytes of keys and values."""
        return 2 * self.layers * self.cached * rows * tokens * BYTES[dtype]

    def adapter(self, rank: int, modules: Sequence[str]) -> int:
        """Parameters of A and B on some layers' attention."""
        widths = {"q_proj": self.hidden, "o_proj": self.hidden, "k_proj": self.cached, "v_proj": self.cached}
        return self.layers * sum(rank * (self.hidden + widths[name]) for name in modules)


LLAMA_7B = Model(32, 4096, 11008, 32, 32, 32_001)
BEAVER = Model(32, 4096, 11008, 32, 32, 32_001, ends=1)
GPT2_LARGE = Model(36, 1280, 5120, 20, 20, 50_257, matrices=2, ends=1, bytes=4)
MODELS = {
    "PKU-Alignment/alpaca-7b-reproduced": LLAMA_7B,
    "PKU-Alignment/beaver-7b-v1.0-reward": BEAVER,
    "PKU-Alignment/beaver-7b-v1.0-cost": BEAVER,
    "TheBloke/alpaca-lora-65B-GPTQ": Model(80, 8192, 22016, 64, 64, 32_000, bytes=GPTQ_BYTES),
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_7B,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Model(22, 2048, 5632, 32, 4, 32_000),
    "allenai/tulu-2-7b": LLAMA_7B,
    "allenai/tulu-2-13b": Model(40, 5120, 13824, 40, 40, 32_000),
    "Ray2333/gpt2-large-helpful-reward_model": GPT2_LARGE,
    "Ray2333/gpt2-large-harmless-reward_model": GPT2_LARGE,
    "mohameddhiab/humor-no-humor": Model(6, 768, 3072, 12, 12, 30_522, matrices=2, ends=1, bytes=4),
}
"""All models that the configurations name."""
EXPERIMENTS = {
    "safety_7b": (
        "relabel", "parm", "genarm_harmless", "genarm_helpful", "dpo_harmless", "dpo_helpful", "evaluate", "plot",
    ),
    "safety_65b": ("evaluate", "plot"),
    "ablation": ("pblora_0_8", "svd_lora", "evaluate", "plot"),
    "assistant": (
        "relabel", "parm", "genarm_helpful", "genarm_harmless", "genarm_humor", "dpo_helpful", "dpo_harmless",
        "dpo_humor", "evaluate", "plot",
    ),
    "tulu": ("parm", "uniarm", "evaluate", "plot"),
}  # fmt: skip
"""Experiment → its files in their order. Experiments stand in an order in which each finds what it reads."""
VERB = re.compile(r"# (trl-parm|trl) (\w+)")
"""How the first line of a file begins: the command that it is for."""


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def parsed(path: Path) -> dict[str, Any]:
    return yaml.safe_load(read(path))


@dataclass(frozen=True)
class Config:
    """A file of `examples/configs/`."""

    experiment: str
    name: str

    @property
    def path(self) -> Path:
        return CONFIGS / self.experiment / f"{self.name}.yaml"

    @property
    def given(self) -> dict[str, Any]:
        return parsed(self.path)

    @property
    def words(self) -> tuple[str, str]:
        """The command that reads it, program and verb."""
        found = VERB.match(read(self.path))
        assert found is not None, f"{self.path} does not begin with its command"
        return found[1], found[2]

    @property
    def data(self) -> str:
        """The experiment whose pairs it reads."""
        return re.findall(r"runs/(\w+)/pairs|$", read(self.path))[0] or self.experiment

    @property
    def model(self) -> Model:
        return MODELS[self.given["model_name_or_path"]]


@dataclass(frozen=True)
class Need:
    """What a command needs: seconds in one process, bytes on its GPUs, bytes that it writes. On several GPUs the
    layers of a model compute one after the other."""

    what: str
    seconds: float
    memory: float
    written: float

    @property
    def hours(self) -> float:
        """GPU-hours."""
        return self.gpus * self.seconds / 3600

    @property
    def gpus(self) -> int:
        return math.ceil(self.memory / (GPU_BYTES * USABLE))


def configs(experiment: str) -> list[Config]:
    return [Config(experiment, name) for name in EXPERIMENTS[experiment]]


def command(config: Config) -> str:
    """What a user types."""
    return f"{' '.join(config.words)} --config {config.path.relative_to(CONFIGS.parents[1])}"


def need(config: Config) -> Need:
    return {"relabel": relabel, "train": train, "dpo": train, "evaluate": evaluate, "plot": plot}[config.words[1]](
        config
    )


def plot(config: Config) -> Need:
    return Need("no GPU", 0, 0, 1e7)


def labelled(experiment: str) -> dict[str, int]:
    """Pairs of each split, as `relabel` of an experiment makes them."""
    given = Config(experiment, "relabel").given
    part = re.search(r"\[:(\d+)\]", given["data"]["split"])
    every = int(part[1]) if part else ROWS[given["data"]["path"]]
    sizes = {"validation": given["validation_size"], "test": given["test_size"]}
    return {"train": every - sum(sizes.values()), **sizes}


def tokens_of(experiment: str) -> int:
    """Mean tokens of a prompt with a response."""
    return PROMPT_TOKENS[experiment] + RESPONSE_TOKENS[experiment]


def relabel(config: Config) -> Need:
    """Each reward model reads both responses of each pair; one is in memory at a time."""
    pairs, rewards = sum(labelled(config.experiment).values()), config.given["rewards"].values()
    seconds = sum(scoring_seconds(reward, 2 * pairs * tokens_of(config.experiment)) for reward in rewards)
    memory = max(reward_bytes(reward) + activations(MODELS[reward["source"]], 8 * 1024) for reward in rewards)
    return Need(f"{pairs:,} pairs, {len(rewards)} rewards", seconds, memory + CONTEXT_BYTES, 3 * pairs * ROW_BYTES)


def train(config: Config) -> Need:
    """An ARM, or a policy by DPO, whose reference is a forward more."""
    given, model, sizes = config.given, config.model, labelled(config.data)
    of_dpo = config.words[1] == "dpo"
    passes = FORWARD + RECOMPUTED + BACKWARD + (FORWARD if of_dpo else 0)
    tokens = 2 * tokens_of(config.data)  # of a pair
    pairs = sizes["train"] * given["num_train_epochs"]
    seconds = pairs * tokens * model.parameters * passes / (PEAK * TRAINING_SHARE)
    if "eval_data" in given:  # once at the end: without α, at the vertices and the uniform vector
        points = 1 + (len(given["objectives"]) + 1 if "objectives" in given else 1)
        seconds += sizes["validation"] * tokens * points * forward_seconds(model)
    trained, saved = trainable(config), given.get("save_total_limit", 4)
    longest = 2 * given["per_device_train_batch_size"] * given["max_length"]
    memory = model.loaded("bfloat16") + trained * OPTIMIZER_BYTES + CONTEXT_BYTES
    memory += longest * model.layers * model.hidden * 2  # what gradient checkpointing keeps
    memory += activations(model, longest) + 2 * longest * model.vocabulary * 4  # logits, and their gradient
    steps = pairs // (given["per_device_train_batch_size"] * given["gradient_accumulation_steps"])
    what = f"{steps:,} steps of 32 pairs, {trained / 1e6:.2f}M parameters"
    return Need(what, seconds, memory, trained * (4 + saved * CHECKPOINT_BYTES))


def trainable(config: Config) -> int:
    """Parameters of an adapter's A and B; the small matrices between them are left out."""
    given = config.given
    settings = given.get("adapter_kwargs") or {"r": given["lora_r"]}
    rank = settings.get("r", 0) + settings.get("r1", 0) + settings.get("r2", 0)
    return config.model.adapter(rank, given.get("target_modules") or given["lora_target_modules"])


def evaluate(config: Config) -> Need:
    """Decoding, method by method, to the last token that is allowed, and scoring."""
    given = config.given
    prompts = labelled(config.data)["test"]
    grid = given.get("preferences") or [[i, given["grid_steps"] - i] for i in range(given["grid_steps"] + 1)]
    prompt, new = PROMPT_TOKENS[config.data], given["max_new_tokens"]
    longest = given["max_prompt_length"] + new
    seconds = largest = texts = 0.0
    for entry in given["methods"]:
        for points, forwards in runs_of(entry, grid, config):
            count = max(1, given["batch_size"] // points)  # prompts of a batch, each at all points of the group
            rows = count * points
            batches = math.ceil(prompts / count)
            seconds += batches * decoding_seconds(forwards, rows, prompt, new)
            extra = {model: model.loaded("bfloat16") for model, _ in forwards if model is not config.model}
            caches = sum(model.cache(rows * times, longest) for model, times in forwards)
            largest = max(largest, caches + sum(extra.values()))
            texts += prompts * points
    rewards = given["rewards"].values()
    seconds += sum(scoring_seconds(reward, texts * (prompt + new)) for reward in rewards)
    seconds += texts * (prompt + new) * forward_seconds(config.model)  # log-probabilities under the base model
    memory = config.model.loaded(given["dtype"]) + largest + sum(map(reward_bytes, rewards)) + CONTEXT_BYTES
    memory += max(activations(MODELS[reward["source"]], 8 * 1024) for reward in rewards)
    what = f"{texts:,.0f} texts of {new} tokens: {len(given['methods'])} methods, {len(grid)} preferences"
    return Need(what, seconds, memory, texts * ROW_BYTES)


def runs_of(entry: str | dict, grid: Sequence[Sequence[float]], config: Config) -> Iterator[tuple[int, list]]:
    """How many preferences a method decodes together, for each such group; and the models that read every row of a
    batch, with how often they do: once for each guide."""
    entry = {"method": entry} if isinstance(entry, str) else entry
    method, base = entry["method"], config.model
    guide = guide_of(entry, base)
    if method == "base":
        yield 1, [(base, 1)]
    elif method == "untrained_arm":
        yield 1, forwards(base, guide, 1)
    elif method in ("parm", "svd_lora", "uniarm"):
        yield len(grid), forwards(base, guide, 1)
    elif method == "rewarded_soups":
        for _ in grid:
            yield 1, [(base, 1)]
    elif method in ("genarm", "mod", "mod_w2s"):  # together: points that leave the same objectives out
        groups = Counter(tuple(weight != 0 for weight in point) for point in grid)
        for used, points in groups.items():
            guides = sum(used) + (1 if method == "mod_w2s" else 0)
            yield points, [(base, guides)] if method == "mod" else forwards(base, guide, guides)
    else:
        raise ValueError(f"What the method {method!r} of {config.path} decodes with is not known here. Add it.")


def forwards(base: Model, guide: Model, guides: int) -> list[tuple[Model, int]]:
    """A base model and guides, which are adapters on one backbone: the base model's own, or another."""
    return [(base, 1 + guides)] if guide is base else [(base, 1), (guide, guides)]


def guide_of(entry: dict, base: Model) -> Model:
    """The backbone of a method's guides, by the file that trained them."""
    found = backbones(entry)
    assert len(found) <= 1, f"guides on several backbones: {found}"
    return MODELS[found.pop()] if found else base


def backbones(entry: str | dict) -> set[str]:
    """Names of the models that a method's adapters are on, and of its reference."""
    if isinstance(entry, str):
        return set()
    folders = [entry["arm"]] if "arm" in entry else [*(entry.get("arms") or entry.get("policies") or {}).values()]
    trained = [Config(*folder.removeprefix("runs/").split("/")) for folder in folders]
    return {config.given["model_name_or_path"] for config in trained} | {entry.get("reference")} - {None}


def decoding_seconds(models: Iterable[tuple[Model, int]], rows: int, prompt: int, new: int) -> float:
    """Of one batch: each token reads all weights and the cache, and takes Python its time."""
    seconds = 0.0
    for model, times in models:
        read = model.loaded("bfloat16") + model.cache(rows * times, prompt + new // 2)
        token = read / (BANDWIDTH * READING_SHARE) + rows * times * FORWARD * model.parameters / PEAK
        seconds += new * max(token, model.layers * LAYER_SECONDS)
        seconds += rows * times * prompt * forward_seconds(model)
    return seconds


def forward_seconds(model: Model) -> float:
    """Of a token."""
    return FORWARD * model.parameters / (PEAK * SCORING_SHARE)


def scoring_seconds(reward: dict, tokens: float) -> float:
    return tokens * forward_seconds(MODELS[reward["source"]])


def reward_bytes(reward: dict) -> float:
    return MODELS[reward["source"]].loaded(reward.get("dtype", "auto"))


def activations(model: Model, tokens: int) -> float:
    """Bytes of a layer at work, in 16 bits."""
    return tokens * (8 * model.hidden + model.matrices * model.inner) * 2


def sources(config: Config) -> set[str]:
    """Names of the models that a file has downloaded."""
    given = config.given
    named = {given[key] for key in ("model_name_or_path",) if key in given}
    named |= {reward["source"] for reward in given.get("rewards", {}).values()}
    return named.union(*map(backbones, given.get("methods", ())))


def commands() -> list[dict[str, str]]:
    """A row for each command that needs a GPU."""
    rows = []
    for config in (config for experiment in EXPERIMENTS for config in configs(experiment)):
        needs = need(config)
        if needs.seconds:
            rows.append(
                {
                    "file": f"{config.experiment}/{config.name}",
                    "work": needs.what,
                    "memory, GB": f"{needs.memory / GIB:.0f}",
                    "GPUs": str(needs.gpus),
                    "GPU-hours": shown(needs.hours),
                }
            )
    return rows


def experiments() -> list[dict[str, str]]:
    """A row for each experiment, and one for all."""
    rows, every = [], set[str]()
    total = 0.0
    for experiment in EXPERIMENTS:
        files = configs(experiment)
        needs = {config.name: need(config) for config in files}
        names = set[str]().union(*map(sources, files))
        verbs = {config.name: config.words[1] for config in files}
        hours = {
            title: sum(needs[name].hours for name, verb in verbs.items() if verb in of)
            for title, of in {"relabel": ("relabel",), "train": ("train", "dpo"), "evaluate": ("evaluate",)}.items()
        }
        every |= names
        total += sum(hours.values())
        rows.append(
            {
                "experiment": experiment,
                "GPUs": str(max(one.gpus for one in needs.values())),
                **{f"{title}, GPU-hours": shown(value) for title, value in hours.items()},
                "in all": shown(sum(hours.values())),
                "CPU memory, GB": f"{max(MODELS[name].disk for name in names) / GIB:.0f}",
                "models on disk, GB": f"{downloaded(names):.0f}",
                "written, GB": f"{sum(one.written for one in needs.values()) / GIB:.1f}",
            }
        )
    return [*rows, {**dict.fromkeys(rows[0], ""), "experiment": "all", "in all": shown(total),
                    "models on disk, GB": f"{downloaded(every):.0f}"}]  # fmt: skip


def assumptions() -> list[dict[str, str]]:
    tokens = "; ".join(f"{data}: {PROMPT_TOKENS[data]} and {RESPONSE_TOKENS[data]}" for data in PROMPT_TOKENS)
    values = {
        f"peak of an {GPU}, bfloat16": f"{PEAK / 1e12:.0f} TFLOP/s",
        "share of it in training; in scoring and in reading prompts": f"{TRAINING_SHARE}; {SCORING_SHARE}",
        "its memory bandwidth; share of it in decoding": f"{BANDWIDTH / 1e12:.0f} TB/s; {READING_SHARE}",
        "least time of a layer in a token of decoding, without CUDA graphs": f"{LAYER_SECONDS * 1e3:.1f} ms",
        "operations for a parameter and token: forward, recomputed, backward": f"{FORWARD}, {RECOMPUTED}, {BACKWARD}",
        "share of a GPU's memory for tensors; beside them": f"{USABLE}; {CONTEXT_BYTES / GIB:.0f} GB",
        "bytes of a parameter in 16 bits; in 4, with scales": f"{BYTES['bfloat16']}; {GPTQ_BYTES}",
        "bytes of a trained parameter in memory; in a checkpoint": f"{OPTIMIZER_BYTES}; {CHECKPOINT_BYTES}",
        "mean tokens of a prompt and a response": tokens,
        "length of an answer": "`max_new_tokens`, always; of a prompt, for memory, `max_prompt_length`",
    }
    return [{"assumption": name, "value": value} for name, value in values.items()]


def shown(hours: float) -> str:
    """Hours by as many digits as they are good for."""
    return "-" if hours == 0 else f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def downloaded(names: Iterable[str]) -> float:
    return sum(MODELS[name].disk for name in names) / GIB


def markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> list[str]:
    """Those of the page, each with what its numbers are."""
    computed = [f"Computed, not measured:\n\n{markdown(rows)}" for rows in (experiments(), commands())]
    return [*computed, f"Assumed:\n\n{markdown(assumptions())}"]


def main() -> None:
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
