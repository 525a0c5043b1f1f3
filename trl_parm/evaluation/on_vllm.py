# SPDX-License-Identifier: Apache-2.0
"""Evaluation on vLLM: the formula of a method at each preference becomes coupled requests, and its adapters LoRAs.

What a method is stands in [`trl_parm.evaluation.methods`] alone. It is made on a base model without weights, and a
formula that comes out can be decoded here if it is a weighted sum of log π_base and log π of adapters on that model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from peft_pblora.export import vllm_rank
from trl_parm.decoding import BASE, LM, Guided
from trl_parm.processes import ALONE, Processes
from trl_parm.records import plain
from trl_parm.serving import Mixture
from trl_parm.serving.engine import SCORES, engine_arguments, lora_slots, usable_slots
from trl_parm.texts import PromptText

from .decoding import ModelAt, Run, end_ids
from .engines import VLLM, Answer, Decoding, Engine
from .models import Make
from .unloaded import Unloaded, export, own_rank


OURS = (
    "dtype", "logprobs_mode", "generation_config", "skip_tokenizer_init", "tokenizer", "data_parallel_size",
    "speculative_config", "runner", "convert",
)  # fmt: skip
"""Arguments of vLLM's engine that are set here, or that coupled requests can't have."""
ROOM = (
    "max_loras", "max_cpu_loras", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "block_size",
    "kv_cache_memory_bytes", "num_gpu_blocks_override", "swap_space", "cpu_offload_gb", "disable_log_stats",
    "download_dir", "hf_token",
)  # fmt: skip
"""Arguments that say how much an engine holds at a time, or where things are: rows don't depend on them."""
LAUNCHED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""What a launcher says in the environment, which an engine must not take for its own group."""
COOLEST = 0.01
"""vLLM raises lower temperatures to this one."""
ELSE = "Use `engine: transformers` for it."


class OnVLLM(Unloaded):
    """[`Models`] whose base model is on vLLM, in an engine that starts when something is to be decoded.

    Args:
        base (`str`): The frozen base model: a folder or Hub id.
        dtype (`str`, *optional*, defaults to `"auto"`): Of its weights and of those of LoRAs; as they were saved if
            not given.
        **engine_args: Further arguments of `vllm.LLM`, such as `max_loras` or `tensor_parallel_size`.

    Raises:
        ImportError: vLLM is not installed.
    """

    engine_name = VLLM

    def __init__(self, base: str, dtype: str = "auto", **engine_args: Any) -> None:
        super().__init__(base, dtype)
        import vllm  # pyright: ignore[reportMissingImports]

        self.version: str = vllm.__version__
        self.engine_args = engine_args
        self._arguments: dict[str, Any] = {}
        self._started: dict[str, Any] = {}
        self._llm: Any = None
        self._processes: Processes = ALONE
        self._prompt: PromptText = ""
        self._numbers = itertools.count(1)
        self._loras: dict[Any, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="trl-parm-")

    @property
    def loading(self) -> dict[str, Any]:
        """What answers depend on beside the weights, as JSON: the engine and its arguments."""
        args = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
        told = {name: value for name, value in args.items() if name not in ROOM}
        return plain({"engine": VLLM, "engine_version": self.version, "dtype": self.kwargs["dtype"], **told})

    def check(
        self, how: Decoding, methods: Sequence[tuple[Make, Sequence[Run]]], prompts: Mapping[int, PromptText],
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        slots = lora_slots(self.engine_args, OURS)
        _check_settings(how)
        longest = max(prompts)
        self._processes, self._prompt = processes, prompts[longest]
        rank, most_loras, size = 1, 0, 1
        for make, runs in methods:
            with self.borrowed():
                model = make(self)
                for run in runs:
                    terms = [term for term, _ in self._formula(how, model, run)[0]]
                    adapters = [term for term in terms if term is not None]
                    rank = max([rank, *(own_rank(term.model, term.adapters[0]) for term in adapters)])
                    most_loras, size = max(most_loras, len(adapters)), max(size, 1 + len(terms))
        if most_loras > usable_slots(slots):
            more = most_loras + slots - usable_slots(slots)
            raise ValueError(
                f"A text needs {most_loras} LoRAs at once, but the engine has {slots} slots for LoRAs (`max_loras`), "
                f"of which {usable_slots(slots)} can be used. Set `engine_args: {{max_loras: {more}}}` or more."
            )
        self._arguments = self._engine_arguments(rank)
        engine_environment(processes, self._devices())
        _check_room(self._engine_config(), size, longest, longest + how.generation["max_new_tokens"])

    def load(self, how: Decoding, make: Make, runs: Sequence[Run]) -> tuple[Engine, list[Run]]:
        """The engine, and runs whose models are [`Mixture`]s of LoRAs, which are exported now."""
        model, llm = make(self), self._start()
        parameters, size = self.extra()
        found = []
        for run in runs:
            guides, base_strength, key = self._formula(how, model, run)
            mixture = Mixture([(term and self._lora(term, key), w) for term, w in guides], base_strength, scored=True)
            found.append(replace(run, model=lambda _, own=mixture: own, extra_parameters=parameters, extra_bytes=size))
        for request in list(self._loras.values())[:1]:
            try:
                llm.llm_engine.add_lora(request)
            except Exception as error:
                reason = shorten(str(error), 300, placeholder="…")
                raise ValueError(f"vLLM can't load an adapter of {runs[0].method!r}: {reason}. {ELSE}") from error
        return CoupledEngine(llm), found

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        with super().borrowed():
            try:
                yield
            finally:
                for request in self._loras.values():
                    with contextlib.suppress(Exception):  # the first error says what went wrong
                        self._llm.llm_engine.remove_lora(request.lora_int_id)
                    shutil.rmtree(request.lora_path, ignore_errors=True)
                self._loras.clear()

    def close(self) -> None:
        """Ends the engine, if one was started."""
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()

    def _formula(self, how: Decoding, model: ModelAt, run: Run) -> tuple[list[tuple[LM | None, float]], float, Any]:
        """The guides of a run with their weights (`None`: the base model), that of the base model, and by what, beside
        its adapter and preference, a guide is known. Raises `ValueError` for what is no such sum."""
        batch = how.batch([run], [self._prompt], how.inputs([self._prompt]))
        found = model(batch)
        found, arguments = found if isinstance(found, tuple) else (found, {})
        if arguments:
            raise ValueError(
                f"The method {run.method!r} has guides that read another prompt than the base model, such as by a "
                f"`template`, which can't be had on vLLM. {ELSE}"
            )
        if found is self.base:
            return [], 1.0, None
        if not isinstance(found, Guided):  # a soup, which is made anew for each preference
            return [(LM(found), 1.0)], 0.0, tuple(batch.weights.values())
        base, alone, guides = 0.0, 0.0, []
        for weight, scorer in found.formula.terms():
            if scorer == BASE:
                base += float(weight)
            elif not isinstance(scorer, LM) or scorer.vocabulary is not None or len(scorer.adapters) > 1:
                raise ValueError(
                    f"The method {run.method!r} is {found.formula!r}, which is no weighted sum of log-probabilities. "
                    + ELSE
                )
            elif scorer.adapters:
                guides.append((scorer, float(weight)))
            else:
                alone += float(weight)
        if guides or not base and alone == 1:
            base, alone = base + alone, 0.0
        # Without guides log π_base has a row of its own, by which it is told.
        guides += [(None, alone)] if alone else []
        if not guides and base != 1:
            raise ValueError(f"The method {run.method!r} at {batch.weights} has no model with a weight. Leave it out.")
        return guides, base, None

    def _lora(self, term: LM, key: Any) -> Any:
        """An adapter at its preference as the engine knows it, exported once. No number, name or path is used twice:
        caches of prefixes are keyed by them."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        α = term.preference
        at = None if α is None else tuple(torch.as_tensor(α).tolist()), term.adapters, key
        if at not in self._loras:
            number = next(self._numbers)
            path = Path(self._folder.name) / f"lora-{number}"
            export(term, path, self._arguments["max_lora_rank"])
            self._loras[at] = LoRARequest(path.name, number, str(path))
        return self._loras[at]

    def _engine_arguments(self, rank: int) -> dict[str, Any]:
        dtype = self.kwargs["dtype"]
        if dtype == "auto":  # as they were saved, where vLLM would take float32 for something else
            saved = getattr(self.config.get_text_config(), "dtype", None)
            dtype = str(saved).removeprefix("torch.") if saved is not None else dtype
        given = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
        return {
            "disable_log_stats": True, **engine_arguments(self.name, vllm_rank(rank), given, OURS), "dtype": dtype,
            "logprobs_mode": SCORES, "generation_config": "vllm", "skip_tokenizer_init": True,
        }  # fmt: skip

    def _engine_config(self) -> Any:
        """With which vLLM would start. Raises `ValueError` for a model or arguments that it refuses."""
        from vllm import EngineArgs  # pyright: ignore[reportMissingImports]

        known = {field.name for field in fields(EngineArgs)}
        if unknown := [name for name in self._arguments if name not in known]:
            raise ValueError(f"`engine_args` has {', '.join(unknown)}, which vLLM {self.version} does not know.")
        try:
            return EngineArgs(**self._arguments).create_engine_config()
        except (ValueError, TypeError, OSError, NotImplementedError) as error:
            reason = shorten(str(error), 400, placeholder="…")
            raise ValueError(
                f"vLLM {self.version} can't take the model {self.name!r} with these arguments: {reason} See "
                "`engine_args`, or use `engine: transformers`."
            ) from error

    def _devices(self) -> int:
        """How many GPUs an engine takes."""
        return math.prod(self._arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))

    def _start(self) -> Any:
        """The engine, started once."""
        if self._llm is None or self._started != self._arguments:
            from vllm import LLM  # pyright: ignore[reportMissingImports]

            self.close()
            with environment(engine_environment(self._processes, self._devices())):
                self._llm = LLM(**self._arguments)
            self._started = self._arguments
        return self._llm


class CoupledEngine:
    """vLLM's offline engine, which decodes runs whose models are [`Mixture`]s.

    Args:
        llm (`vllm.LLM`): As [`OnVLLM`] starts it.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        slots = llm.llm_engine.vllm_config.lora_config.max_loras
        self._usable = usable_slots(slots)
        self._leaks = self._usable < slots

    def answers(
        self, how: Decoding, runs: Sequence[Run], prompts: Sequence[PromptText], seeds: Sequence[int]
    ) -> tuple[list[Answer], float]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        from trl_parm.serving.client import guided_samples

        ids = how.ids(prompts)
        mixtures: list[Mixture] = [run.model(None) for run in runs]  # pyright: ignore
        settings = {"temperature": 0.0} if how.sampling is None else {"temperature": 1.0, **how.sampling}
        # Ends are those of the base model's generation config alone.
        settings |= {"max_tokens": how.generation["max_new_tokens"], "stop_token_ids": end_ids(how.ends)}
        params = [SamplingParams(**settings, seed=seed, ignore_eos=True, detokenize=False) for seed in seeds]
        start = time.perf_counter()
        samples: list[Any] = []
        for group in self._groups(mixtures):
            samples += guided_samples(
                self._llm, [ids[i] for i in group], [mixtures[i] for i in group], [params[i] for i in group]
            )
        seconds = time.perf_counter() - start
        texts = [list(sample.result().outputs[0].token_ids) for sample in samples]
        return [Answer(text, *sample.log_probs()) for text, sample in zip(texts, samples, strict=True)], seconds

    def _groups(self, mixtures: Sequence[Mixture]) -> Iterator[list[int]]:
        """The numbers of texts that are decoded at once: all, as the engine has room for them; but where its last slot
        acts on the base model too, as many as leave it free, and the LoRAs of others go before."""
        used = [{lora.lora_int_id for lora, _ in mixture.terms() if lora is not None} for mixture in mixtures]
        if not self._leaks:
            yield list(range(len(mixtures)))
            return
        start = 0
        while start < len(mixtures):
            loras, end = set(used[start]), start + 1
            while end < len(mixtures) and len(loras | used[end]) <= self._usable:
                loras |= used[end]
                end += 1
            for number in set(self._llm.llm_engine.list_loras()) - loras:
                self._llm.llm_engine.remove_lora(number)
            yield list(range(start, end))
            start = end


def engine_environment(processes: Processes, parallel: int = 1) -> dict[str, str | None]:
    """What the environment of an engine's start must have otherwise, `None` for what must be gone: nothing, if this
    process is the only one. Else the engine runs in a process of its own, which knows nothing of the others, with its
    share of the GPUs of the machine.

    Args:
        processes ([`Processes`]): Those that share the work.
        parallel (`int`, *optional*, defaults to 1): How many GPUs an engine takes.

    Raises:
        ValueError: fewer GPUs than the processes on this machine need.
    """
    if processes.count == 1:
        return {}
    found: dict[str, str | None] = dict.fromkeys(LAUNCHED)
    found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        if len(names) < processes.here * parallel:
            raise ValueError(
                f"{processes.here} processes on this machine with an engine of {parallel} GPUs each need "
                f"{processes.here * parallel}, but there are {len(names)}. Start fewer processes."
            )
        first = int(os.environ.get("LOCAL_RANK", 0)) * parallel
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + parallel])
    return found


@contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Changes the environment for the time of a `with` block, in which child processes are started that inherit it."""
    former = {name: os.environ.get(name) for name in changes}
    try:
        _set(changes)
        yield
    finally:
        _set(former)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _check_room(config: Any, size: int, longest: int, whole: int) -> None:
    """Raises `ValueError` if an engine, by its `VllmConfig`, can't run a text by itself.

    Args:
        config: The configuration.
        size (`int`): Requests of a text.
        longest, whole (`int`): Tokens of the longest prompt, and with its answer.
    """
    scheduler = config.scheduler_config
    for what, needed, name, room in (
        ("The longest prompt and `max_new_tokens` are", whole, "max_model_len", config.model_config.max_model_len),
        ("The requests of a text are", size, "max_num_seqs", scheduler.max_num_seqs),
        ("The prompts of a text have", size * longest, "max_num_batched_tokens", scheduler.max_num_batched_tokens),
    ):
        if needed > room:
            raise ValueError(
                f"{what} {needed}, but vLLM's `{name}` is {room}. Set a larger one in `engine_args`, or, where that "
                "can't be, shorten prompts by `max_prompt_length`."
            )


def _check_settings(how: Decoding) -> None:
    """Raises `ValueError` for settings of `generate` that coupled requests don't have."""
    if how.acting:
        told = ", ".join(f"{name}={value!r}" for name, value in how.acting.items())
        raise ValueError(
            f"The generation config of the base model has {told}, which acts on tokens and which coupled requests on "
            "vLLM don't have. Use `engine: transformers`, or a copy of the model without it, for all engines alike."
        )
    others = [name for name in how.generation if name not in ("max_new_tokens", "eos_token_id")]
    if others or how.generation.get("max_new_tokens") is None:
        wrong = f"{', '.join(others)} can't be had on vLLM" if others else "there is no `max_new_tokens`"
        raise ValueError(f"Of the arguments of `generate`, {wrong}. Give `max_new_tokens` and settings of sampling.")
    if how.sampling is not None and how.sampling.get("temperature", 1.0) < COOLEST:
        raise ValueError(f"`temperature` is {how.sampling['temperature']}, but vLLM has none below {COOLEST}.")
