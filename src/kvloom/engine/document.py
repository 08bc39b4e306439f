"""`Document`: a text whose KV is kept, grown, cut, forked and asked.

Knows: the document's tokens, and the KV that is kept of them.
Does not know: how KV is computed. KV that was forgotten for lack of room is computed again.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from kvloom.engine.collect import Collector
from kvloom.engine.computing import (
    call,
    carry_out,
    compute,
    document_of,
    forked,
    repair,
)
from kvloom.engine.engine import Engine
from kvloom.engine.fidelity import REPAIRED_SHARE, SINK_TOKENS, Approximation, check_edit
from kvloom.engine.prompts import Prompt, tokenize
from kvloom.engine.request import Computed
from kvloom.engine.streams import stream_tokens
from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Transplant, Truncate
from kvloom.kv.inspection import deviation, layout_of
from kvloom.kv.plan import EditPlan, require_movable
from kvloom.kv.span import cut
from kvloom.outputs import (
    DocumentLayout,
    EditReceipt,
    Fidelity,
    Provenance,
    RequestOutput,
    StreamChunk,
)
from kvloom.params import SamplingParams
from kvloom.reuse.edit_series import TextEdit, edit_series
from kvloom.reuse.mentions import mentions
from kvloom.reuse.repair import RepairReceipt
from kvloom.reuse.retokenize import TokenEdit
from kvloom.reuse.text_range import LineColumn

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.engine.host import Host

T = TypeVar("T")


class Document:
    """A text and its KV; made by `LLM.document`.

    Text is tokenised piece by piece: what is appended never merges with the tokens before it.

    Attributes:
        receipt: of the last edit, or of the parts it was joined from; None for neither.
    """

    def __init__(
        self,
        llm: Host,
        tokens: list[int] | None = None,
        kv: KVDoc | None = None,
        receipt: EditReceipt | None = None,
    ) -> None:
        self._llm = llm
        self.receipt = receipt
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

    def edit(
        self,
        start: int | LineColumn,
        end: int | LineColumn,
        text: str,
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
        baseline: str | None = None,
    ) -> EditReceipt:
        """Put text in the place of a range of characters, and keep the KV that can be kept.

        Args:
            start: first character replaced, or its (line, column) from zero, in UTF-16 units.
            end: character behind the last, likewise.
            text: what comes in their place.
            fidelity: `exact` computes all that the edit could touch; `repaired` a share of it,
                `shifted` the new text only.
            share: of the old tokens behind the edit, to be computed again where `repaired`.
            selector: how these are chosen: `blend`, `mentions`, `first` or `random`.
            baseline: `unrotated` shows moved keys as other systems do, to compare `shifted` with.

        Raises:
            RequestError: the text has no such range, or a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        edit = TextEdit(text, start, end)
        return self.edit_all(
            [edit], fidelity=fidelity, share=share, selector=selector, baseline=baseline
        )

    def edit_all(
        self,
        edits: Sequence[TextEdit],
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
        baseline: str | None = None,
        lossless_only: bool = False,
    ) -> EditReceipt:
        """Make several edits, each in the text that those before it left; all of them or none.

        Args:
            edits: at least one.
            fidelity: as `edit` has it, likewise the next three.
            share: of the old tokens behind the first edit.
            selector: how these are chosen.
            baseline: what `shifted` is compared with.
            lossless_only: refuse a text that the tokenizer cannot spell.

        Raises:
            RequestError: as `edit` has it, or the tokenizer cannot spell a text.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        begun = time.perf_counter()
        wanted = check_edit(fidelity, share, selector, baseline)
        found = edit_series(self._llm.retokenizer, self._tokens, edits, lossless_only=lossless_only)
        return self._edit(found, wanted, begun)

    def replace(
        self,
        text: str,
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
        baseline: str | None = None,
    ) -> EditReceipt:
        """Become another text, and keep the KV of what both have in common.

        The settings are those of `edit`.

        Raises:
            RequestError: a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        begun = time.perf_counter()
        wanted = check_edit(fidelity, share, selector, baseline)
        found = self._llm.retokenizer.replace_text(self._tokens, text)
        return self._edit(found, wanted, begun)

    def repair(self) -> EditReceipt:
        """Compute everything again that is not exact, and wait for it.

        Raises:
            CapacityError: the KV memory cannot hold it.
        """
        begun = time.perf_counter()
        return self._make_exact(self._tokens, TokenEdit((), True, True), begun)

    def transplant(
        self,
        start: int,
        source: Document,
        source_start: int,
        source_stop: int,
        *,
        keys: bool = True,
        values: bool = True,
    ) -> EditReceipt:
        """Show tokens from `start` on with the KV that equal tokens have in another document.

        Args:
            start: first token of this document.
            source: the other document; of the same model.
            source_start: its first token.
            source_stop: its token behind the last.
            keys: take the keys.
            values: take the values.

        Raises:
            RequestError: a document has no such range, or its tokens differ.
            UnsupportedModelError: the model's positions cannot be moved.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        begun = time.perf_counter()
        if source._llm.loop is not self._llm.loop:
            raise RequestError(
                "The source belongs to another model; give a document of the same one.",
                param="source",
            )
        stop = start + source_stop - source_start
        with self._whole() as kv, source._whole() as theirs:

            def plan(_: Engine) -> EditPlan:
                spans = tuple(cut(theirs.order, source_start, source_stop))
                return kv.apply(Transplant(start, stop, spans, keys=keys, values=values))

            asked = self._call(plan)
            require_movable(asked, self._llm.spec)
            built, rows = carry_out(self._llm.loop, kv, asked)
        self._become(self._tokens, built)
        return self._receipt("shifted", TokenEdit((), False, True), rows, begun)

    def fork(self) -> Document:
        """Return a second document with the same text; both share the KV they have in common."""

        def fork(engine: Engine) -> KVDoc:
            kv = self._kv.fork()
            engine.hold(kv)
            return kv

        return Document(self._llm, self._tokens, document_of(self._llm.loop, fork))

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
        loop = self._llm.loop
        for chunk in stream_tokens(loop, tokens, params, self._kv, exact_only=exact_only):
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
        tokens = self.with_question(question)
        return stream_tokens(self._llm.loop, tokens, params, self._kv, exact_only=exact_only)

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

    def deviation(self, other: Document, layer: int = 0) -> tuple[float, float]:
        """Return how far keys and values of a layer are from another document's of equal tokens.

        Keys are compared where they stand now. Each is the largest difference, as a share of the
        other's largest number.

        Raises:
            RequestError: the tokens differ, there are none, or the model has no such layer.
        """
        layers = self._llm.spec.layers
        if not self._tokens or self._tokens != other.tokens:
            raise RequestError("Only documents of the same tokens can be compared.", param="other")
        if not 0 <= layer < len(layers):
            raise RequestError(
                f"The model has {len(layers)} layers and none that is {layer}.", param="layer"
            )
        with self._whole() as kv, other._whole() as theirs:
            return self._call(lambda _: deviation(kv, theirs, layers[layer]))

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

    def _edit(self, found: TokenEdit, wanted: Approximation, begun: float) -> EditReceipt:
        """Carry out an edit of tokens."""
        if wanted.fidelity == "exact":
            return self._make_exact(found.applied(self._tokens), found, begun)
        if not found.replaced:
            return self._receipt(wanted.fidelity, found, 0, begun)
        if found.replaced[0].start < SINK_TOKENS:
            # What all other tokens attend to has changed: nothing behind it is worth keeping.
            return self._make_exact(found.applied(self._tokens), found, begun)
        return self._approximate(found, wanted, begun)

    def _approximate(self, found: TokenEdit, wanted: Approximation, begun: float) -> EditReceipt:
        """Carry out an edit of tokens that keeps KV behind it."""
        loop, old, repaired = self._llm.loop, self._tokens, None
        with self._whole() as kv:
            plan = self._call(lambda _: kv.apply(found.edit))
            require_movable(plan, self._llm.spec)
            built, rows = carry_out(loop, kv, plan, wanted.baseline)
        if wanted.fidelity == "repaired":
            marked = None
            if wanted.rule.wants_marks:
                marked = mentions(old, found, self._llm.tokenizer.token_bytes)
            done = repair(loop, built, wanted.share, wanted.rule, marked)
            built, repaired = done.doc, done.receipt
        self._become(found.applied(old), built)
        self._call(lambda engine: engine.tidy(built))
        return self._receipt(wanted.fidelity, found, rows, begun, repaired)

    def _make_exact(self, tokens: list[int], found: TokenEdit, begun: float) -> EditReceipt:
        """Become these tokens, with the KV that a fresh prefill would have."""
        rows = 0
        if tokens:
            computed = compute(self._llm.loop, tokens, self._kv, exact_only=True)
            self._become(tokens, computed.doc)
            rows = computed.usage.computed_tokens
        else:
            self.truncate(0)
        return self._receipt("exact", found, rows, begun)

    @contextmanager
    def _whole(self) -> Iterator[KVDoc]:
        """Give a fork of the KV, computed again where it was forgotten, that stays what it is."""
        while True:
            with forked(self._llm.loop, self._kv) as kv:
                if kv.length == len(self._tokens):
                    yield kv
                    return
            self._become(self._tokens, self._compute(self._tokens).doc)

    def _receipt(
        self,
        fidelity: Fidelity,
        found: TokenEdit,
        rows: int,
        begun: float,
        repaired: RepairReceipt | None = None,
    ) -> EditReceipt:
        self.receipt = EditReceipt(
            fidelity=fidelity,
            tokens=self.provenance.tokens,
            recomputed=rows + (repaired.repaired if repaired else 0),
            repaired=repaired.repaired if repaired else 0,
            deviation=repaired.deviation if repaired else None,
            deviation_left=repaired.left if repaired else None,
            canonical=found.canonical,
            lossless=found.lossless,
            seconds=time.perf_counter() - begun,
        )
        return self.receipt

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

    def _compute(
        self, tokens: list[int], *, score_from: int | None = None, keep_logits: bool = False
    ) -> Computed:
        return compute(
            self._llm.loop, tokens, self._kv, score_from=score_from, keep_logits=keep_logits
        )

    def _call(self, task: Callable[[Engine], T]) -> T:
        return call(self._llm.loop, task)


def make_document(llm: Host, text: Prompt) -> Document:
    """Return a document of this text whose KV is computed and kept.

    Raises:
        RequestError: the text is longer than the model's context or the KV memory.
    """
    document = Document(llm)
    document.append_tokens(tokenize(llm.tokenizer, text)[1])
    return document
