# SPDX-License-Identifier: Apache-2.0
"""The engine as vLLM's server sees it: whoever asks for a preference gets a family of coupled requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from trl_parm.noise import row_seed
from trl_parm.server.served import Served
from trl_parm.server.texts import until_stop
from trl_parm.serving import AsyncGuidance, Guidance

from .exports import Exports
from .middleware import BETA, PREFERENCE


class GuidedClient:
    """An engine client of vLLM's, with guidance. All but `generate` is the engine's own.

    Args:
        engine (`AsyncLLM`): With one of our logits processors and `enable_lora=True`; nobody else may use it.
        exports ([`Exports`]): LoRAs at the preferences that are asked for.
        guided ([`Served`]), most_bytes (`int`): For the middleware: the guided model by its defaults, and the largest
            body that it reads.
    """

    def __init__(self, engine: Any, exports: Exports, guided: Served, most_bytes: int) -> None:
        self._engine, self.exports = engine, exports
        self.guided, self.most_bytes = guided, most_bytes
        self._guidance, self._exporting = AsyncGuidance(engine), asyncio.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **arguments: Any
    ) -> AsyncIterator[Any]:
        """As the engine's, where the request has no preference. Else the texts of a guided request, each a family.

        Raises:
            ValueError: what coupled requests can't have; nothing has run then.
        """
        extra = dict(sampling_params.extra_args or {})
        preference, beta = extra.pop(PREFERENCE, None), extra.pop(BETA, None)
        if preference is None:
            outputs = self._guidance.generate_alone(prompt, sampling_params, request_id, **arguments)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
            return
        params = sampling_params.clone()
        params.extra_args = extra or None
        async with self._lora(preference) as lora, contextlib.AsyncExitStack() as stack:
            own = Guidance(lora, beta)
            texts = [self._text(prompt, one, own, i) for i, one in enumerate(_texts_of(params))]
            for text in texts:
                await stack.enter_async_context(contextlib.aclosing(text))
            async for output in _merged(texts, request_id, params.output_kind.name == "FINAL_ONLY"):
                yield output

    @contextlib.asynccontextmanager
    async def _lora(self, preference: Sequence[float]) -> AsyncIterator[Any]:
        """A LoRA at a preference; those that go for it leave the engine before their files do."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        async with self._exporting:
            try:
                export, gone = await asyncio.to_thread(self.exports.take, preference)
            except RuntimeError as error:
                raise ValueError(f"{error} Try again later, or start the server with more `max_loras`.") from None
            for other in gone:
                await self._engine.remove_lora(other.number)
                self.exports.remove(other)
        try:
            yield LoRARequest(export.name, export.number, str(export.path))
        finally:
            self.exports.give_back(export)

    async def _text(self, prompt: Any, params: Any, own: Guidance, index: int) -> AsyncGenerator[Any, None]:
        """The outputs of one text, by what is new in each; a stop string ends it here, in all of its requests."""
        stops, ids = list(params.stop or ()), list(_ids(prompt))
        delta = params.output_kind.name == "DELTA"
        params.stop = []
        params.output_kind = type(params.output_kind).CUMULATIVE
        told_text, told_tokens = "", 0
        outputs = self._guidance.generate(ids, params, own)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                (one,) = output.outputs
                text, waiting, stopped = until_stop(one.text, stops, output.finished)
                if stopped:
                    one.finish_reason, one.stop_reason = (
                        "stop",
                        next(s for s in stops if one.text[len(text) :].startswith(s)),
                    )
                    output.finished = True
                tokens, one.index = list(one.token_ids), index
                one.text, one.token_ids = (text[len(told_text) :], tokens[told_tokens:]) if delta else (text, tokens)
                if delta and one.logprobs is not None:
                    one.logprobs = one.logprobs[told_tokens:]
                told_text, told_tokens = text, len(tokens)
                yield output
                if stopped:
                    return


def _texts_of(params: Any) -> list[Any]:
    """The settings of each text of a request: with one seed they have noise of their own, as by `trl-parm serve`."""
    found = []
    for i in range(params.n):
        one = params.clone()
        one.n = 1
        one.seed = None if params.seed is None else row_seed(params.seed, i)
        found.append(one)
    return found


async def _merged(texts: Sequence[AsyncIterator[Any]], request_id: str, whole: bool) -> AsyncIterator[Any]:
    """The outputs of several texts as those of one request: as they come, or all at the end."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()

    async def read(text: AsyncIterator[Any]) -> None:
        try:
            async for output in text:
                await inbox.put(output)
            await inbox.put(None)
        except Exception as error:
            await inbox.put(error)

    readers = [asyncio.create_task(read(text)) for text in texts]
    left, last = len(texts), {}
    try:
        while left:
            output = await inbox.get()
            if isinstance(output, Exception):
                raise output
            if output is None:
                left -= 1
                continue
            last[output.outputs[0].index] = output
            output.request_id = request_id
            if not whole:
                output.finished = output.finished and left == 1
                yield output
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    if whole:
        first = last[0]
        first.outputs = [last[i].outputs[0] for i in range(len(texts))]
        first.finished = True
        yield first


def _ids(prompt: Any) -> list[int]:
    """Raises `ValueError` for a prompt that is more than tokens."""
    if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt or prompt.get("multi_modal_data"):
        raise ValueError("A guided request must be text: the coupled requests of a family read tokens.")
    return prompt["prompt_token_ids"]
