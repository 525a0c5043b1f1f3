# SPDX-License-Identifier: Apache-2.0
"""The engine as vLLM's server sees it: whoever asks for a preference gets a family of coupled requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from trl_parm.noise import row_seed
from trl_parm.server.served import Served
from trl_parm.server.texts import Decoder, begun_stop
from trl_parm.serving import AsyncGuidance, Guidance
from trl_parm.templates import BEFORE

from .exports import Export, Exports
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
        self._taking: asyncio.Task[Export] | None = None  # the event loop keeps no tasks by itself
        self._leaving: list[Export] = []

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
        """A LoRA at a preference, which is given back also where the client went away before it was there."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        await self._exporting.acquire()
        taking = self._taking = asyncio.create_task(self._take(preference))
        try:
            export = await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._unused)
            raise
        try:
            yield LoRARequest(export.name, export.number, str(export.path))
        finally:
            self.exports.give_back(export)

    async def _take(self, preference: Sequence[float]) -> Export:
        """What [`Exports.take`] gives. It holds the lock to its end, which its thread comes to in any case.

        Those that go for it leave the engine before their files do. Where one can't, nobody gets a LoRA more, and the
        next request tries again.
        """
        try:
            try:
                export, gone = await asyncio.to_thread(self.exports.take, preference)
            except RuntimeError as error:
                raise ValueError(f"{error} Try again later, or start the server with more `max_loras`.") from None
            self._leaving += gone
            try:
                while self._leaving:
                    await self._engine.remove_lora(self._leaving[0].number)
                    self.exports.remove(self._leaving.pop(0))
            except BaseException:
                self.exports.give_back(export)
                raise
            return export
        finally:
            self._exporting.release()

    def _unused(self, taking: asyncio.Task[Export]) -> None:
        if not taking.cancelled() and taking.exception() is None:
            self.exports.give_back(taking.result())

    async def _text(self, prompt: Any, params: Any, own: Guidance, index: int) -> AsyncGenerator[Any, None]:
        """The outputs of one text, by what is new in each; a stop string ends it here, in all of its requests."""
        stops, ids = list(params.stop or ()), list(_ids(prompt))
        delta, least = params.output_kind.name == "DELTA", params.min_tokens
        params.stop = []
        params.output_kind = type(params.output_kind).CUMULATIVE
        told_text, told_tokens, kept = "", 0, 0
        outputs = self._guidance.generate(ids, params, own)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                (one,) = output.outputs
                tokens, one.index = list(one.token_ids), index
                if len(tokens) <= least:
                    kept = len(one.text)
                elif stops and told_tokens < least:  # of outputs that were not read in time only the last one is left
                    kept = self._length(ids, tokens[:least], params.skip_special_tokens)
                text, stop = _until_stop(one.text, stops, kept, params.include_stop_str_in_output, output.finished)
                if stop is not None:
                    one.finish_reason, one.stop_reason, output.finished = "stop", stop, True
                one.text, one.token_ids = (text[len(told_text) :], tokens[told_tokens:]) if delta else (text, tokens)
                if delta and one.logprobs is not None:
                    one.logprobs = one.logprobs[told_tokens:]
                told_text, told_tokens = text, len(tokens)
                yield output
                if stop is not None:
                    return

    def _length(self, prompt: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool) -> int:
        """How many characters of a text are certain with these tokens."""
        decoder = Decoder(self._engine.get_tokenizer(), prompt[-BEFORE:], skip_special_tokens)
        return sum(len(decoder.add(token)) for token in tokens)


def _until_stop(text: str, stops: Sequence[str], kept: int, included: bool, last: bool) -> tuple[str, str | None]:
    """What of a text can be told, and the stop string that ends it, as in vLLM the first one to be complete.

    Args:
        text (`str`): All of it so far.
        stops (`Sequence[str]`): The stop strings.
        kept (`int`): Characters of its first `min_tokens` tokens: a stop string ends after them.
        included (`bool`): Whether the stop string is told too.
        last (`bool`): Whether nothing follows.
    """
    places = [(text.find(stop, max(0, kept - len(stop) + 1)), stop) for stop in stops]
    if found := [(place + len(stop), stop) for place, stop in places if place >= 0]:
        end, stop = min(found, key=lambda one: one[0])
        return text[: end if included else end - len(stop)], stop
    return text if last else text[: len(text) - begun_stop(text, stops)], None


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
    """Raises `ValueError` for a prompt that is more than tokens: those of images have a type of their own."""
    if not isinstance(prompt, Mapping) or prompt.get("type", "token") != "token":
        raise ValueError("A guided request must be text: the coupled requests of a family read tokens.")
    return prompt["prompt_token_ids"]
