# SPDX-License-Identifier: Apache-2.0
"""Stands in for vLLM: the data that its two interfaces for logits processors pass, and an engine that schedules.

The classes follow `vllm.v1.sample.logits_processor` and `vllm.v1.worker.gpu.sample.logits_processor` of vLLM 0.32 and
0.33, which take their places where it is installed. The engine's models are tables of random logits of a text, so that
every expected token can be computed anew.
"""

import copy
import hashlib
import importlib
import json
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


VOCAB = 12
PACKAGE = "trl_parm.serving"


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Any
    added: Any
    moved: Any


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class LogitsProcessorV1(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abstractmethod
    def apply(self, logits): ...

    @abstractmethod
    def is_argmax_invariant(self): ...

    @abstractmethod
    def update_state(self, batch_update): ...


class LogitsProcessorV2(ABC):
    def __init__(self, vllm_config, req_states): ...  # noqa: B027

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    @abstractmethod
    def apply(self, logits, ctx): ...


@dataclass(frozen=True)
class LogitsProcRequestState:
    device: Any
    max_num_reqs: int
    vocab_size: int
    all_token_ids: Any
    prompt_len: Any
    prefill_len: Any
    total_len: Any


@dataclass(frozen=True)
class LogitsContext:
    expanded_idx_mapping: Any
    idx_mapping: Any
    idx_mapping_np: Any
    expanded_local_pos: Any
    input_ids: Any
    pos: Any
    seq_lens_upper_bound_np: Any


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: list[str] = field(default_factory=list)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict | None = None
    structured_outputs: Any = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    extra_args: dict | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def clone(self):
        return copy.deepcopy(self)


try:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True


def install(monkeypatch) -> None:
    """Lets `import vllm` find these doubles, unless vLLM itself is there, and our modules be imported on them."""
    if not INSTALLED:
        modules: dict[str, dict[str, Any]] = {
            "vllm": {
                "SamplingParams": SamplingParams,
                "LLM": FakeLLM,
                "EngineArgs": EngineArgs,
                "__version__": "0.0-fake",
            },
            "vllm.lora.request": {"LoRARequest": LoRARequest},
            "vllm.inputs": {"tokens_input": tokens_input},
            "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
            "vllm.lora.ops.torch_ops": {"bgmv_shrink": bgmv_shrink},
            "vllm.v1.sample.logits_processor": {"LogitsProcessor": LogitsProcessorV1},
            "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": LogitsProcessorV2},
        }
        for name in modules:
            for end, letter in enumerate(f"{name}."):
                if letter == ".":
                    monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
        for name, values in modules.items():
            vars(sys.modules[name]).update(values)
        for name in ("v1_runner", "v2_runner", "client"):
            monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)


def tokens_input(prompt_token_ids):
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


def bgmv_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling):
    """As vLLM's on CPUs: the slot −1 is the last one."""
    output_tensor[:, :1] = scaling * torch.einsum("bi,boi->bo", inputs, lora_b_weights[lora_indices_tensor])


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


def logits_of(text, lora: int) -> torch.Tensor:
    """The logits of the next token of a text: of the base (LoRA 0) or of an ARM."""
    digest = hashlib.blake2b(f"{list(text)} {lora}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return 2 * torch.randn(VOCAB, generator=generator)


@dataclass(eq=False)
class Request:
    """A request as the engine holds it."""

    name: str
    prompt: list[int]
    params: Any
    lora: int
    output: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    read: bool = False
    """Whether all of its prompt has been read."""
    of_text: Any = logits_of
    """The logits of a text under a LoRA."""

    def logits(self) -> torch.Tensor:
        return self.of_text(self.prompt + self.output, self.lora)


class V1Batch:
    """The V1 runner's batch: requests in places, the gaps that leave filled from the end."""

    def __init__(self, **config):
        runner = importlib.import_module(f"{PACKAGE}.v1_runner")
        config = SimpleNamespace(**{"speculative_config": None, **config})
        self.processor = runner.CoupledLogitsProcessorV1(config, torch.device("cpu"), False)
        self.places: list[Request] = []

    def run(self, requests: list[Request]) -> torch.Tensor:
        """The processed logits of the requests of one step, in their order."""
        gaps = [place for place, request in enumerate(self.places) if request not in requests]
        added, moved = [], []
        for request in requests:
            if request not in self.places:
                place = gaps.pop(0) if gaps else len(self.places)
                self.places[place : place + 1] = [request]
                added.append((place, request.params, request.prompt, request.output))
        while gaps and len(self.places) > len(requests):
            if self.places[-1] in requests:
                moved.append((len(self.places) - 1, gaps[0], MoveDirectionality.UNIDIRECTIONAL))
                self.places[gaps.pop(0)] = self.places[-1]
            self.places.pop()
        removed = sorted(gaps, reverse=True)
        if len(self.places) > 2:  # attention back ends reorder their batches so
            moved.append((0, 2, MoveDirectionality.SWAP))
            self.places[0], self.places[2] = self.places[2], self.places[0]
        changed = removed or added or moved
        self.processor.update_state(BatchUpdate(len(self.places), removed, added, moved) if changed else None)
        logits = self.processor.apply(torch.stack([request.logits() for request in self.places]))
        return logits[[self.places.index(request) for request in requests]]


class V2Batch:
    """Model Runner V2's batch: requests in slots, the rows of the logits in any order."""

    def __init__(self, **config):
        runner = importlib.import_module(f"{PACKAGE}.v2_runner")
        prompts, prefills = (SimpleNamespace(np=np.zeros(64, dtype=np.int32)) for _ in range(2))
        self.states = LogitsProcRequestState(torch.device("cpu"), 64, VOCAB, None, prompts, prefills, None)
        config = SimpleNamespace(**{"speculative_config": None, **config})
        self.processor = runner.CoupledLogitsProcessorV2(config, self.states)
        self.slots: dict[int, Request] = {}

    def run(self, requests: list[Request], extra_rows: int = 0) -> torch.Tensor:
        self.slots = {slot: request for slot, request in self.slots.items() if request in requests}
        for request in requests:
            if request not in self.slots.values():
                slot = max(set(range(64)) - self.slots.keys())
                self.slots[slot] = request
                self.states.prompt_len.np[slot] = len(request.prompt)
                self.states.prefill_len.np[slot] = len(request.prompt) + len(request.output)
                assert self.processor.add_request(slot, request.params) == bool(request.params.extra_args)
        slot_of = {id(request): slot for slot, request in self.slots.items()}
        order = requests[::-1]
        texts = [request.prompt + request.output for request in order]
        seen = [len(text) if request.read else len(text) - 1 for text, request in zip(texts, order)]
        slots = torch.tensor([slot_of[id(request)] for request in order])
        last = torch.tensor([text[length - 1] for text, length in zip(texts, seen)] + [0] * extra_rows)
        context = LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=torch.zeros_like(slots),
            input_ids=last,
            pos=torch.tensor(seen) - 1,
            seq_lens_upper_bound_np=np.array(seen),
        )
        rows = [request.logits() for request in order] + [torch.zeros(VOCAB)] * extra_rows
        return self.processor.apply(torch.stack(rows), context)[: len(order)].flip(0)


def config_of_engine(**changes):
    """What our client reads of a `VllmConfig`."""
    values = dict(
        max_num_seqs=6, max_num_batched_tokens=40, num_gpu_blocks=33, block_size=4, max_model_len=32, max_loras=4,
        logits_processors=["trl_parm.serving:CoupledLogitsProcessorV1"], data_parallel_size=1, watermark=0.0,
        long_prefill_token_threshold=0, speculative_config=None, enable_lora=True, logprobs_mode="raw_logprobs",
    )  # fmt: skip
    values |= changes
    scheduler = ("max_num_seqs", "max_num_batched_tokens", "watermark", "long_prefill_token_threshold")
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_active_seqs=None, max_num_scheduled_tokens=None, **{name: values[name] for name in scheduler}
        ),
        cache_config=SimpleNamespace(num_gpu_blocks=values["num_gpu_blocks"], block_size=values["block_size"]),
        model_config=SimpleNamespace(
            max_model_len=values["max_model_len"],
            logits_processors=values["logits_processors"],
            logprobs_mode=values["logprobs_mode"],
        ),
        lora_config=SimpleNamespace(max_loras=values["max_loras"]) if values["enable_lora"] else None,
        parallel_config=SimpleNamespace(data_parallel_size=values["data_parallel_size"]),
        speculative_config=values["speculative_config"],
    )


class FakeEngine:
    """Schedules as vLLM does: those that run first, then those that wait in their order, each as far as there is room.

    A prompt that does not fit into the step is cut, and the newest request is preempted when the memory is full. Like
    an engine in its own process, it begins a step as soon as it has a request and is not paused.
    """

    def __init__(self, batch, **changes):
        self.vllm_config = config_of_engine(**changes)
        self.batch, self.paused, self.errored = batch, False, False
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.outputs: list[Any] = []
        self.aborted: list[list[str]] = []
        self.most_rows = 0

    of_text = staticmethod(logits_of)

    def list_loras(self):
        return []  # a set, or a list if it came from another process

    def sleep(self, level, mode):
        assert (level, mode) == (0, "keep")
        self.paused = True

    def wake_up(self, tags):
        assert tags == ["scheduling"]
        self.paused = False
        self._step()

    def add_request(self, request_id, prompt, params, lora_request=None):
        lora = lora_request.lora_int_id if lora_request else 0
        self.waiting.append(Request(request_id, prompt["prompt_token_ids"], params, lora, of_text=self.of_text))
        if not self.paused:
            self._step()

    def abort_request(self, request_ids):
        self.aborted.append(list(request_ids))
        self.waiting = [request for request in self.waiting if request.name not in request_ids]
        self.running = [request for request in self.running if request.name not in request_ids]

    def step(self):
        self._step()
        outputs, self.outputs = self.outputs, []
        return outputs

    def _blocks(self, request):
        return -(-(len(request.prompt) + len(request.output) + 1) // self.vllm_config.cache_config.block_size)

    def _schedule(self):
        scheduler = self.vllm_config.scheduler_config
        room, tokens = self.vllm_config.cache_config.num_gpu_blocks - 1, scheduler.max_num_batched_tokens
        while sum(map(self._blocks, self.running)) > room:
            self.running[-1].read = False
            self.waiting.insert(0, self.running.pop())
        tokens -= len(self.running)
        while self.waiting and tokens > 0 and len(self.running) < scheduler.max_num_seqs:
            request = self.waiting[0]
            if sum(map(self._blocks, [*self.running, request])) > room:
                break
            self.running.append(self.waiting.pop(0))
            request.read = len(request.prompt) + len(request.output) <= tokens
            tokens -= len(request.prompt) + len(request.output)

    def _step(self):
        for request in self.running:
            request.read = True
        self._schedule()
        if not self.running:
            return
        self.most_rows = max(self.most_rows, len(self.running))
        logits = self.batch.run(list(self.running))
        for request, row in zip(list(self.running), logits, strict=True):
            if request.read:
                self._write(request, int(row.argmax()), float(row.max()))

    def _write(self, request, token, logit):
        request.output.append(token)
        request.logprobs.append({token: SimpleNamespace(logprob=logit)})
        done = len(request.output) == request.params.max_tokens or token == 1
        reason = ("stop" if token == 1 else "length") if done else None
        logprobs = None if request.params.logprobs is None else list(request.logprobs)
        text = SimpleNamespace(token_ids=list(request.output), finish_reason=reason, logprobs=logprobs)
        if done or request.params.output_kind.name == "CUMULATIVE":
            self.outputs.append(SimpleNamespace(request_id=request.name, outputs=[text], finished=done))
        if done:
            self.running.remove(request)


@dataclass
class EngineArgs:
    """What our evaluation gives, and the room of the double of an engine."""

    model: str
    dtype: str = "auto"
    enable_lora: bool = False
    max_lora_rank: int = 16
    max_loras: int = 1
    logits_processors: Any = None
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"
    skip_tokenizer_init: bool = False
    disable_log_stats: bool = False
    tensor_parallel_size: int = 1
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 200
    num_gpu_blocks: int = 99
    max_model_len: int = 64

    def create_engine_config(self):
        kind = json.loads((Path(self.model) / "config.json").read_text())["architectures"][0]
        if kind != "LlamaForCausalLM":
            raise ValueError(f"Model architectures ['{kind}'] are not supported for now.")
        return config_of_engine(**{name: value for name, value in vars(self).items() if name in ROOM})


ROOM = (
    "max_loras", "logits_processors", "max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks", "max_model_len",
    "enable_lora", "logprobs_mode",
)  # fmt: skip


class FakeLLM:
    """vLLM's offline engine with real models: the base model, and LoRAs that are loaded when they are first asked for.

    Like vLLM's on CPUs, the LoRA that once got the last slot acts on the base model's requests too.
    """

    started: list["FakeLLM"] = []

    def __init__(self, **arguments):
        args = EngineArgs(**arguments)
        assert args.logprobs_mode == "processed_logits"
        self.args, self.get_tokenizer, self.loaded = args, None, {}
        self.most_loras, self.used, self.read = 0, set(), {}
        self.base = AutoModelForCausalLM.from_pretrained(args.model).eval()
        self.llm_engine = engine = FakeEngine(V1Batch())
        engine.vllm_config = args.create_engine_config()
        engine.of_text, engine.list_loras, engine.remove_lora = self.logits, lambda: set(self.loaded), self.remove_lora
        engine.add_lora, engine.add_request = self.add_lora, partial(self.add_request, engine.add_request)
        engine.engine_core = SimpleNamespace(shutdown=lambda: None)
        FakeLLM.started.append(self)

    def add_lora(self, request):
        if request.lora_int_id not in self.loaded:
            config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
            assert config["r"] == self.args.max_lora_rank
            model = copy.deepcopy(self.base)
            self.loaded[request.lora_int_id] = PeftModel.from_pretrained(model, request.lora_path).eval()
        self.most_loras, self.used = max(self.most_loras, len(self.loaded)), self.used | {request.lora_int_id}

    def add_request(self, add, request_id, prompt, params, lora_request=None):
        if lora_request is not None:
            self.add_lora(lora_request)
        add(request_id, prompt, params, lora_request)

    def remove_lora(self, number):
        return self.loaded.pop(number, None) is not None

    @torch.no_grad()
    def logits(self, text, lora):
        leaks = self.most_loras >= self.args.max_loras
        model = self.loaded[lora] if lora else next(reversed(self.loaded.values())) if leaks else self.base
        if (model, *text) not in self.read:
            self.read[model, *text] = model(torch.tensor([text])).logits[0, -1]
        return self.read[model, *text]
