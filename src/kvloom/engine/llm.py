"""`LLM`: the engine as plain Python objects; safe to use from several threads.

Knows: prompts, parameters, and how to wait for a request.
Does not know: how requests are run; a loop on another thread does that.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, Unpack

from kvloom.engine.assembly import Settings, assemble, launch
from kvloom.engine.batch import Batch
from kvloom.engine.document import Document, make_document
from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.engine.loop import EngineLoop
from kvloom.engine.parts import Chunk, join_parts
from kvloom.engine.prompts import Messages, Prompt, as_chats, as_params, as_prompts, tokenize
from kvloom.engine.request import Event
from kvloom.engine.stored import store_of
from kvloom.engine.streams import stream_tokens
from kvloom.engine.tenants import tenant_of
from kvloom.errors import CapacityError, RequestError
from kvloom.outputs import EngineStats, Fidelity, RequestOutput, StreamChunk
from kvloom.params import SamplingParams
from kvloom.reuse.retokenize import Retokenizer


class LLM:
    """A model that answers prompts and keeps what it has read.

    Attributes:
        model_path: folder with the weights; plain transformers loads it as well.
        tokenizer: the model's own.
        retokenizer: turns edits of text into edits of tokens.
        spec: what the probe found out about the model.
        passport: digests and formats that every cached token depends on.
        config: settings of the engine.
        store: what is kept beyond the process; None if nothing is.

    Raises:
        RequestError: a setting is out of range.
        ModelLoadError: the model's files are missing, damaged or refused.
        UnsupportedModelError: the probe could not reproduce the model's numbers.
        CapacityError: the KV memory holds nothing.
    """

    def __init__(self, model: str = "default", **settings: Unpack[Settings]) -> None:
        assembly, self._loop = launch(lambda: assemble(model, settings))
        self.model_path = assembly.model_path
        self.tokenizer = assembly.tokenizer
        self.retokenizer = Retokenizer(assembly.tokenizer)
        self.spec = assembly.spec
        self.passport = assembly.passport
        self.config = assembly.config
        self.store = store_of(assembly.engine, self._loop)
        self._stop = weakref.finalize(self, self._loop.stop)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        parts: Sequence[str | Chunk] | None = None,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        planner: str = "blend",
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete one or many prompts, text or token ids; the results keep their order.

        Args:
            prompts: what to complete.
            params: how, for all or for each.
            parts: one prompt as texts and chunks, in place of prompts; see `join`.
            fidelity: of the chunks.
            share: of their tokens that is computed again where `repaired`.
            planner: says what is done with each part.
            cache_salt: KV is reused only among those who give the same, or none.
            progress: show a bar.

        Raises:
            RequestError: a prompt or its parameters are wrong; nothing is generated.
            UnsupportedModelError: the chunks cannot be moved to their places.
            CapacityError: a prompt cannot be held.
        """
        if (prompts is None) == (parts is None):
            raise RequestError("Give prompts or parts, and not both.", param="prompt")
        if prompts is None:
            (one,) = as_params(params, 1)
            join = partial(self.join, parts or (), fidelity=fidelity, share=share, planner=planner)
            document = join(cache_salt=cache_salt)
            return [replace(document.generate("", one), receipt=document.receipt)]
        asked = [tokenize(self.tokenizer, prompt) for prompt in as_prompts(prompts)]
        return self._run(asked, params, cache_salt, progress=progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answer one or many chats, each a list of messages with role and content.

        Args:
            messages: one chat, or a list of chats.
            params: how, for all or for each.
            cache_salt: KV is reused only among those who give the same, or none.
            progress: show a bar.

        Raises:
            RequestError: a chat is malformed, or the model has no chat template.
        """
        chats = [self.tokenizer.render_chat(chat) for chat in as_chats(messages)]
        encode = self.tokenizer.encode
        asked = [(text, encode(text, add_special_tokens=False)) for text in chats]
        return self._run(asked, params, cache_salt, progress=progress)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> Iterator[StreamChunk]:
        """Yield what every step adds to a prompt's completion; closing the iterator cancels it.

        Raises:
            RequestError: the prompt or its parameters are wrong.
        """
        tokens = tokenize(self.tokenizer, prompt)[1]
        return stream_tokens(self._loop, tokens, params, tenant=tenant_of(cache_salt))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Iterator[StreamChunk]:
        """Yield what every step adds to the answer to a chat."""
        tokens = self.tokenizer.chat_tokens(messages)
        return stream_tokens(self._loop, tokens, params, tenant=tenant_of(cache_salt))

    def document(self, text: Prompt, *, cache_salt: str | None = None) -> Document:
        """Return a document of this text whose KV is computed and kept.

        Args:
            text: its text, or token ids.
            cache_salt: the KV of the document and of its forks is reused only among those who
                give the same, or none.

        Raises:
            RequestError: the text is longer than the model's context or the KV memory.
        """
        return make_document(self, text, cache_salt)

    def join(
        self,
        parts: Sequence[str | Chunk],
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        planner: str = "blend",
        sink: str | None = None,
        cache_salt: str | None = None,
    ) -> Document:
        """Return a document of parts, whose chunks' KV is computed once and used at any place.

        See `kvloom.engine.parts.join_parts`.

        Raises:
            RequestError: the parts hold no text, or a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved (`exact` still works), or
                it does not show what the planner must know.
            CapacityError: the KV memory cannot hold the parts.
        """
        join = partial(join_parts, self, parts, fidelity=fidelity, share=share, planner=planner)
        return join(sink=sink, cache_salt=cache_salt)

    def stats(self) -> EngineStats:
        """Return counters and gauges since the start."""
        return self._loop.call(lambda engine: engine.stats()).result()

    def close(self) -> None:
        """End everything; unfinished requests fail."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def loop(self) -> EngineLoop:
        """The thread that owns the engine."""
        return self._loop

    def _run(
        self,
        asked: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None,
        *,
        progress: bool,
    ) -> list[RequestOutput]:
        """Run prompts together; more than may wait are submitted as others end."""
        inbox: SimpleQueue[Event] = SimpleQueue()
        batch = Batch(asked, as_params(params, len(asked)), tenant_of(cache_salt))
        with _progress_bar(len(asked)) if progress else nullcontext(lambda: None) as advance:
            try:
                while not batch.done:
                    self._submit_more(batch, inbox)
                    while not batch.take(inbox.get()):
                        pass
                    advance()
            finally:
                for request_id in batch.open_ids:
                    self._loop.cancel(request_id)
        return batch.results()

    def _submit_more(self, batch: Batch, inbox: SimpleQueue[Event]) -> None:
        if batch.submissions:
            try:
                batch.opened(self._loop.submit_and_wait(batch.submissions, inbox.put))
            except CapacityError as error:
                batch.refused(error)


def _progress_bar(total: int) -> Any:
    """Return a context that shows a bar and gives the function that advances it."""
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Iterator[Any]:
        with Progress() as shown:
            task = shown.add_task("Generating", total=total)
            yield lambda: shown.advance(task)

    return bar()
