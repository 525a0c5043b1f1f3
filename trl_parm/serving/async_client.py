# SPDX-License-Identifier: Apache-2.0
"""Guided generation with vLLM's asynchronous engine, for servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from .engine import INSTALL, Capacity, check_engine, check_lora_slots
from .guidance import Guidance, Sample, make_sample


try:
    from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(INSTALL) from error


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
        check_engine(engine.vllm_config)
        self._engine = engine
        self._capacity = Capacity(engine.vllm_config)
        self._loras: set[int] = set()
        self._room = asyncio.Condition()
        self._submitting = asyncio.Lock()

    async def generate(self, prompt: str | list[int], sampling_params: Any, guidance: Guidance) -> AsyncIterator[Any]:
        """Yields the base model's output as it grows, the whole text so far each time.

        It waits until the engine has room for all requests of the sample. A reader that goes away ends them together.

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
        check_lora_slots(self._engine.vllm_config, self._loras | sample.need.loras)
        self._loras |= sample.need.loras
        async with self._room:
            await self._room.wait_for(lambda: self._capacity.take(sample.name, sample.need))
        try:
            base, *guides = await self._submit(sample)
            output = await base.get()
            async with self._room:
                self._capacity.prompt_read(sample.name)
                self._room.notify_all()
            while not output.finished:
                yield output
                output = await base.get()
            outputs = [output, *[await guide.get() for guide in guides]]
            sample.outputs = {request.name: o for request, o in zip(sample.requests, outputs)}
            yield sample.result()
        finally:
            await self._leave(sample)

    async def _submit(self, sample: Sample) -> list[Any]:
        """Hands requests over while the engine stands still: else one could begin a step before its partner."""
        async with self._submitting:
            try:
                await self._engine.sleep(level=0, mode="keep")
                return [
                    await self._engine.add_request(
                        request.name, tokens_input(sample.prompt), request.params, lora_request=request.lora
                    )
                    for request in sample.requests
                ]
            except BaseException:
                await self._abort(sample)
                raise
            finally:
                await self._engine.wake_up(["scheduling"])

    async def _leave(self, sample: Sample) -> None:
        if not sample.finished:
            await self._abort(sample)
        async with self._room:
            self._capacity.give_back(sample.name)
            self._room.notify_all()

    async def _abort(self, sample: Sample) -> None:
        """Ends requests in one message, so that no step sees a part of a family."""
        if not self._engine.errored:
            await self._engine.abort([request.name for request in sample.requests])
