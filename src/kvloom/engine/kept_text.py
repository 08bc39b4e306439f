"""Kept texts: a text whose KV is kept, grown at its end, cut and asked.

Knows: the text's tokens, and the KV that is kept of them.
Does not know: how KV is computed, or what else becomes of the text. KV that was forgotten for lack
of room is computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from kvloom.engine.collect import Collector
from kvloom.engine.computing import call, compute, document_of
from kvloom.engine.engine import Engine
from kvloom.engine.request import Computed
from kvloom.engine.streams import stream_tokens
from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Truncate
from kvloom.kv.inspection import layout_of
from kvloom.outputs import DocumentLayout, EditReceipt, Provenance, RequestOutput, StreamChunk
from kvloom.params import SamplingParams
from kvloom.store.key import ANYBODY

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.engine.host import Host

T = TypeVar("T")


class KeptText:
    """A text and its KV: what `Document` offers beside edits.

    Text is tokenised piece by piece: what is appended never merges with the tokens before it.

    Attributes:
        receipt: of the last edit, or of the parts it was joined from; None for neither.
        tenant: digest of whose KV it is; what is computed for it answers nobody else.
    """

    def __init__(
        self,
        llm: Host,
        tokens: list[int] | None = None,
        kv: KVDoc | None = None,
        receipt: EditReceipt | None = None,
        *,
        tenant: str = ANYBODY,
        stays_as_it_is: bool = False,
    ) -> None:
        """Take a document's KV, or begin with no tokens.

        Args:
            llm: whose document it is.
            tokens: of the whole text.
            kv: their KV, held by the engine.
            receipt: of how it came about.
            tenant: digest of whose KV it is.
            stays_as_it_is: its KV is what it is on purpose, and not made exact when there is time.
        """
        self._llm = llm
        self.receipt = receipt
        self.tenant = tenant
        self._stays_as_it_is = stays_as_it_is
        self._tokens = list(tokens or ())
        self._own(document_of(llm.loop, Engine.new_document) if kv is None else kv)

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole text."""
        return list(self._tokens)

    @property
    def text(self) -> str:
        """The whole text."""
        return self._llm.tokenizer.decode(self._tokens, skip_special_tokens=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that hold the document's KV now."""
        return self._call(lambda _: self._kv.nbytes)

    @property
    def layout(self) -> DocumentLayout:
        """How the document's KV lies in memory now."""
        return self._call(lambda _: layout_of(self._kv))

    @property
    def provenance(self) -> Provenance:
        """Return tokens by state; `forgotten` ones are computed again when they are needed."""
        known, length = self._call(lambda _: (self._kv.provenance(), self._kv.length))
        forgotten = len(self._tokens) - length
        if forgotten == 0:
            return known
        return Provenance({**known.tokens, "forgotten": forgotten}, known.nbytes)

    def append(self, text: str) -> None:
        """Add text at the end and compute its KV.

        Raises:
            RequestError: the document would outgrow the model's context or the KV memory.
        """
        self.append_tokens(self._encode(text))

    def append_tokens(self, tokens: list[int]) -> None:
        """Add tokens at the end and compute their KV."""
        if not tokens:
            return
        grown = [*self._tokens, *tokens]
        self._become(grown, self._compute(grown).doc)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            RequestError: the document is not that long.
        """
        if not isinstance(length, int) or not 0 <= length <= len(self._tokens):
            raise RequestError(
                f"The document has {len(self._tokens)} tokens and cannot be cut to {length!r}; "
                f"give a length from 0 to {len(self._tokens)}.",
                param="length",
            )

        def cut(_: Engine) -> None:
            plan = self._kv.apply(Truncate(min(length, self._kv.length)))
            self._kv.truncate(plan.kept_prefix)

        self._call(cut)
        del self._tokens[length:]

    def generate(
        self,
        question: str = "",
        params: SamplingParams | None = None,
        *,
        exact_only: bool = False,
    ) -> RequestOutput:
        """Complete the document followed by a question; the document stays as it is.

        Args:
            question: what follows.
            params: how to generate.
            exact_only: use of the document's KV what equals a fresh prefill, and no more.
        """
        params = params or SamplingParams()
        tokens = self.with_question(question)
        wanted = params.logprobs is not None
        collector = Collector(None, tokens, logprobs_wanted=wanted)
        for chunk in self._stream(tokens, params, exact_only):
            collector.feed(chunk)
        return collector.output()

    def stream(
        self,
        question: str = "",
        params: SamplingParams | None = None,
        *,
        exact_only: bool = False,
    ) -> Iterator[StreamChunk]:
        """Yield the completion of the document followed by a question, step by step."""
        return self._stream(self.with_question(question), params, exact_only)

    @overload
    def score(self, text: str, *, return_logits: Literal[False] = False) -> list[float]: ...
    @overload
    def score(self, text: str, *, return_logits: Literal[True]) -> tuple[list[float], Tensor]: ...
    def score(
        self, text: str, *, return_logits: bool = False
    ) -> list[float] | tuple[list[float], Tensor]:
        """Return the log-probability of each token of a text behind the document.

        Args:
            text: what may follow; the document stays as it is.
            return_logits: give the fp32 logits (tokens, v) they were read from as well.

        Raises:
            RequestError: the document is empty, or the text does not fit behind it.
        """
        if not self._tokens:
            raise RequestError("An empty document predicts nothing; append text first.")
        targets = self._encode(text)
        if not targets:
            raise RequestError("There is no text to score; give at least one token.", param="text")
        computed = self._compute(
            [*self._tokens, *targets], score_from=len(self._tokens) - 1, keep_logits=return_logits
        )
        self._llm.loop.abandon(computed.doc)
        scores = zip(targets, computed.scores, strict=True)
        logprobs = [found[token].logprob for token, found in scores]
        if not return_logits:
            return logprobs
        assert computed.logits is not None
        return logprobs, computed.logits

    def close(self) -> None:
        """Let go of the KV; it may still answer for equal prefixes while there is room."""
        self._finalizer()

    @property
    def kv(self) -> KVDoc:
        """The document's KV; only the engine's thread may touch it."""
        return self._kv

    def with_question(self, question: str) -> list[int]:
        """Return the tokens of the document followed by a question."""
        return [*self._tokens, *self._encode(question)]

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"The text is {text!r}; give a string.", param="text")
        return self._llm.tokenizer.encode(text, add_special_tokens=False)

    def _become(self, tokens: list[int], kv: KVDoc) -> None:
        """Let go of the KV held so far, and own that of these tokens."""
        self._finalizer()
        self._tokens = tokens
        self._own(kv)

    def _own(self, kv: KVDoc) -> None:
        """Let go of a document's KV together with this object; the engine holds it already."""
        self._kv = kv
        # A garbage collector may run on the engine's own thread: it only leaves a note there.
        self._finalizer = weakref.finalize(self, self._llm.loop.abandon, kv)
        if not self._stays_as_it_is:
            tenant = self.tenant
            self._llm.loop.call(lambda engine: engine.repair_when_idle(kv, tenant))

    def _stream(
        self, tokens: list[int], params: SamplingParams | None, exact_only: bool
    ) -> Iterator[StreamChunk]:
        loop, tenant = self._llm.loop, self.tenant
        return stream_tokens(loop, tokens, params, self._kv, tenant=tenant, exact_only=exact_only)

    def _compute(
        self,
        tokens: list[int],
        *,
        exact_only: bool = False,
        score_from: int | None = None,
        keep_logits: bool = False,
    ) -> Computed:
        return compute(
            self._llm.loop,
            tokens,
            self._kv,
            tenant=self.tenant,
            exact_only=exact_only,
            score_from=score_from,
            keep_logits=keep_logits,
        )

    def _call(self, task: Callable[[Engine], T]) -> T:
        return call(self._llm.loop, task)
