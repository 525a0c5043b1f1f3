# SPDX-License-Identifier: Apache-2.0
"""Guided generation with vLLM's engines: the offline one, and the asynchronous one for servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, cast

from .engine import INSTALL, SCORES, Capacity, Need
from .guidance import Guidance, Mixture, Sample, make_sample


try:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(INSTALL) from error


def guided_generate(
    llm: Any,
    prompts: str | list[int] | Sequence[str | list[int]],
    guidance: Guidance | Mixture | Sequence[Guidance | Mixture],
    sampling_params: Any | Sequence[Any] | None = None,
) -> list[Any]:
    """`LLM.generate` with guides, each sample with its own.

    Every sample takes one request of the base model and one for each guide. Families are admitted as the engine has
    room for all of their requests, and enter it while it is paused, so that they start in one step. No one else may
    use the engine meanwhile.

    Args:
        llm (`vllm.LLM`): With one of our logits processors and `enable_lora=True`.
        prompts (`str`, `list[int]` or a sequence of them): Texts or token ids; one alone is a batch of one.
        guidance ([`Guidance`], [`Mixture`] or a sequence of them): For all prompts, or one for each.
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
    return [sample.result() for sample in guided_samples(llm, prompts, guidance, sampling_params)]


def guided_samples(
    llm: Any,
    prompts: str | list[int] | Sequence[str | list[int]],
    guidance: Guidance | Mixture | Sequence[Guidance | Mixture],
    sampling_params: Any | Sequence[Any] | None = None,
) -> list[Sample]:
    """As [`guided_generate`], whose outputs are the samples' `result()`, with those of all requests of each."""
    engine = llm.llm_engine
    if isinstance(prompts, str) or all(isinstance(token, int) for token in prompts) and prompts:
        prompts = cast("list[Any]", [prompts])
    capacity = Capacity(engine.vllm_config, engine.list_loras())
    guides = _for_each(guidance, Guidance | Mixture, "guidance", len(prompts))
    mode = engine.vllm_config.model_config.logprobs_mode
    if mode != SCORES and any(own.scored for own in guides):
        raise ValueError(f"Scored samples need an engine that tells logits: start it with logprobs_mode={SCORES!r}.")
    params = llm.get_default_sampling_params() if sampling_params is None else sampling_params
    params = _for_each(params, SamplingParams, "sampling_params", len(prompts))
    samples = [make_sample(capacity, llm.get_tokenizer, *of_one) for of_one in zip(prompts, params, guides)]
    _run(engine, capacity, samples)
    return samples


def _for_each(given: Any, kind: Any, name: str, prompts: int) -> list[Any]:
    values = [given] * prompts if isinstance(given, kind) else list(given)
    if len(values) != prompts:
        raise ValueError(f"There are {prompts} prompts, but `{name}` has {len(values)} entries. Give one for each.")
    return values


def _run(engine: Any, capacity: Capacity, samples: Sequence[Sample]) -> None:
    waiting = deque(samples)
    running: dict[str, Sample] = {}
    sample_of = {name: sample for sample in samples for name in sample.names}
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
                prompt = tokens_input(sample.prompt)
                engine.add_request(request.name, prompt, request.params, lora_request=request.lora)
    except BaseException:
        _abort(engine, samples)
        raise
    finally:
        engine.wake_up(["scheduling"])


def _abort(engine: Any, samples: Sequence[Sample]) -> None:
    """Ends requests in one message, so that no step sees a part of a family."""
    engine.abort_request([name for sample in samples for name in sample.names])


class AsyncGuidance:
    """`AsyncLLMEngine.generate` with guides. It has to be the engine's only user: room for families is counted here.

    Args:
        engine (`vllm.AsyncLLMEngine`): With one of our logits processors and `enable_lora=True`.

    Raises:
        ValueError: an engine that can't run coupled requests.

    Example:

    ```python
    guided = AsyncGuidance(engine)
    async for output in guided.generate("How are you?", SamplingParams(max_tokens=256), Guidance(lora, beta=0.5)):
        print(output.outputs[0].text)
    ```
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._capacity = Capacity(engine.vllm_config)
        self._room = asyncio.Condition()
        self._line: deque[str] = deque()
        self._submitting = asyncio.Lock()

    async def generate(
        self, prompt: str | list[int], sampling_params: Any, guidance: Guidance
    ) -> AsyncGenerator[Any, None]:
        """Yields the base model's output as it grows, the whole text so far each time.

        It waits until the engine has room for all requests of the sample, behind those that came before, so that small
        samples can't keep a large one waiting for ever. A reader that goes away ends them together.

        Args:
            prompt (`str` or `list[int]`): A text or token ids.
            sampling_params (`SamplingParams`): As in `AsyncLLMEngine.generate`, with n = 1 and without stop strings,
                which end one request at a time.
            guidance ([`Guidance`]): The guides.

        Raises:
            ValueError: what coupled requests can't have; nothing has run then.
            RuntimeError: requests that wrote different texts. vLLM's `EngineDeadError` if they came apart while they
                ran; the engine's log says how.
        """
        if sampling_params.stop:
            raise ValueError("Coupled requests of an asynchronous engine have no stop strings. Use `stop_token_ids`.")
        sample = make_sample(self._capacity, self._engine.get_tokenizer, prompt, sampling_params, guidance)
        async with self._taking(sample.name, sample.need) as prompt_read:
            try:
                base, *guides = await self._submit(sample)
                output = await base.get()
                await prompt_read()
                while not output.finished:
                    yield output
                    output = await base.get()
                outputs = [output, *[await guide.get() for guide in guides]]
                sample.outputs = dict(zip(sample.names, outputs))
                yield sample.result()
            finally:
                if not sample.finished:
                    await self._abort(sample)

    async def generate_alone(
        self, prompt: Any, sampling_params: Any, request_id: str, **arguments: Any
    ) -> AsyncGenerator[Any, None]:
        """`AsyncLLMEngine.generate` without guides, which waits for its room too.

        Args:
            prompt (`dict`): With `prompt_token_ids`.
            sampling_params (`SamplingParams`), request_id (`str`), **arguments: As of the engine.
        """
        need = self._capacity.need(len(prompt["prompt_token_ids"]), sampling_params.max_tokens, [], sampling_params.n)
        async with self._taking(request_id, need) as prompt_read:
            outputs = self._engine.generate(prompt, sampling_params, request_id, **arguments)
            try:
                async for output in outputs:
                    await prompt_read()
                    yield output
            finally:
                await outputs.aclose()

    @contextlib.asynccontextmanager
    async def _taking(self, name: str, need: Need) -> AsyncIterator[Any]:
        """The engine's room for something, once it is there and nobody waits who came before; gives what notes that
        its prompts have been read."""

        async def prompt_read() -> None:
            if not need.prompt_read:
                async with self._room:
                    self._capacity.prompt_read(name)
                    self._room.notify_all()

        async with self._room:
            self._line.append(name)
            try:
                await self._room.wait_for(lambda: self._line[0] == name and self._capacity.take(name, need))
            finally:
                self._line.remove(name)
                self._room.notify_all()
        try:
            yield prompt_read
        finally:
            async with self._room:
                self._capacity.give_back(name)
                self._room.notify_all()

    async def _submit(self, sample: Sample) -> list[Any]:
        """As the offline engine's `_submit`; gives the queue of each request's outputs."""
        async with self._submitting:
            try:
                await self._engine.sleep(level=0, mode="keep")
                queues = []
                for request in sample.requests:
                    prompt = tokens_input(sample.prompt)
                    queue = self._engine.add_request(request.name, prompt, request.params, lora_request=request.lora)
                    queues.append(await queue)
                return queues
            except BaseException:
                await self._abort(sample)
                raise
            finally:
                await self._engine.wake_up(["scheduling"])

    async def _abort(self, sample: Sample) -> None:
        if not self._engine.errored:
            await self._engine.abort(sample.names)
