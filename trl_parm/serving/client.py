# SPDX-License-Identifier: Apache-2.0
"""Guided generation with vLLM's offline engine."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

from .engine import INSTALL, Capacity, check_engine, check_lora_slots
from .guidance import Guidance, Sample, make_sample


try:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(INSTALL) from error


def guided_generate(
    llm: Any,
    prompts: Sequence[str | list[int]],
    guidance: Guidance | Sequence[Guidance],
    sampling_params: Any | Sequence[Any] | None = None,
) -> list[Any]:
    """`LLM.generate` with guides, each sample with its own.

    Every sample takes one request of the base model and one for each guide. Families are admitted as the engine has
    room for all of their requests, and enter it while it is paused, so that they start in one step. No one else may
    use the engine meanwhile.

    Args:
        llm (`vllm.LLM`): With one of our logits processors and `enable_lora=True`.
        prompts (`Sequence[str]` or `Sequence[list[int]]`): Texts or token ids.
        guidance ([`Guidance`] or a sequence of them): For all prompts, or one for each.
        sampling_params (`SamplingParams` or a sequence of them, *optional*): As in `LLM.generate`, with n = 1.

    Returns:
        `list[RequestOutput]`: the base model's output of each prompt, in their order.

    Raises:
        ValueError: an engine, a prompt or a setting that coupled requests can't have; nothing has run then.
        RuntimeError: a family that came apart; vLLM's `EngineDeadError`, if the engine runs in its own process, whose
            log says what happened.

    Example:

    ```python
    llm = LLM(model, enable_lora=True, logits_processors=["trl_parm.serving:CoupledLogitsProcessorV2"])
    loras = [LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]
    guided_generate(llm, prompts, [Guidance(lora, beta=0.5) for lora in loras], SamplingParams(max_tokens=256))
    ```
    """
    engine = llm.llm_engine
    check_engine(engine.vllm_config)
    capacity = Capacity(engine.vllm_config)
    guides = _for_each(guidance, Guidance, "guidance", len(prompts))
    params = llm.get_default_sampling_params() if sampling_params is None else sampling_params
    params = _for_each(params, SamplingParams, "sampling_params", len(prompts))
    samples = [make_sample(capacity, llm.get_tokenizer, *of_one) for of_one in zip(prompts, params, guides)]
    check_lora_slots(engine.vllm_config, set(engine.list_loras()).union(*(sample.need.loras for sample in samples)))
    _run(engine, capacity, samples)
    return [sample.result() for sample in samples]


def _for_each(given: Any, kind: type, name: str, prompts: int) -> list[Any]:
    values = [given] * prompts if isinstance(given, kind) else list(given)
    if len(values) != prompts:
        raise ValueError(f"There are {prompts} prompts, but `{name}` has {len(values)} entries. Give one for each.")
    return values


def _run(engine: Any, capacity: Capacity, samples: Sequence[Sample]) -> None:
    waiting = deque(samples)
    running: dict[str, Sample] = {}
    sample_of = {request.name: sample for sample in samples for request in sample.requests}
    try:
        while waiting or running:
            admitted = []
            while waiting and capacity.take(waiting[0].name, waiting[0].need):
                admitted.append(waiting.popleft())
            if admitted:
                running |= {sample.name: sample for sample in admitted}
                _submit(engine, admitted)
            for output in engine.step():
                sample = sample_of[output.request_id]
                sample.outputs[output.request_id] = output
                if sample.finished:
                    capacity.give_back(sample.name)
                    running.pop(sample.name, None)
                else:
                    capacity.prompt_read(sample.name)
    except BaseException:
        # The first error says what went wrong; the engine may be gone.
        with contextlib.suppress(Exception):
            _abort(engine, list(running.values()))
        raise


def _submit(engine: Any, samples: Sequence[Sample]) -> None:
    """Hands requests over while the engine stands still: else one could begin a step before its partner."""
    try:
        engine.sleep(level=0, mode="keep")
        for sample in samples:
            for request in sample.requests:
                engine.add_request(
                    request.name, tokens_input(sample.prompt), request.params, lora_request=request.lora
                )
    except BaseException:
        _abort(engine, samples)
        raise
    finally:
        engine.wake_up(["scheduling"])


def _abort(engine: Any, samples: Sequence[Sample]) -> None:
    """Ends requests in one message, so that no step sees a part of a family."""
    engine.abort_request([request.name for sample in samples for request in sample.requests])
