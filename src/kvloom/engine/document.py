"""`Document`: a text whose KV is kept, and kept as far as it can be when the text is edited.

Knows: what is asked of an edit, and in which order it is carried out.
Does not know: how KV is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvloom.engine.computing import carry_out, document_of, forked, repair
from kvloom.engine.engine import Engine
from kvloom.engine.fidelity import REPAIRED_SHARE, SINK_TOKENS, Approximation, check_edit
from kvloom.engine.kept_text import KeptText
from kvloom.engine.prompts import Prompt, tokenize
from kvloom.engine.tenants import tenant_of
from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Transplant
from kvloom.kv.inspection import deviation
from kvloom.kv.plan import EditPlan, require_movable
from kvloom.kv.span import cut
from kvloom.outputs import EditReceipt, Fidelity
from kvloom.reuse.edit_series import TextEdit, edit_series
from kvloom.reuse.mentions import mentions
from kvloom.reuse.repair import RepairReceipt
from kvloom.reuse.retokenize import TokenEdit
from kvloom.reuse.text_range import LineColumn

if TYPE_CHECKING:
    from kvloom.engine.host import Host


class Document(KeptText):
    """A text and its KV; made by `LLM.document`.

    Text is tokenised piece by piece: what is appended never merges with the tokens before it.

    Attributes:
        receipt: of the last edit, or of the parts it was joined from; None for neither.
    """

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

        The document is then left as it is while nothing else runs, until an exact edit or `repair`.

        Args:
            start: first token of this document.
            source: the other document; of the same model.
            source_start: its first token.
            source_stop: its token behind the last.
            keys: take the keys.
            values: take the values.

        Raises:
            RequestError: a document has no such range, its tokens differ, or so does its salt.
            UnsupportedModelError: the model's positions cannot be moved.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        begun = time.perf_counter()
        if source._llm.loop is not self._llm.loop:
            raise RequestError(
                "The source belongs to another model; give a document of the same one.",
                param="source",
            )
        if source.tenant != self.tenant:
            raise RequestError(
                "The source has another cache_salt; give a document with the same one.",
                param="source",
            )
        stop = start + source_stop - source_start
        with self._whole() as kv, source._whole() as theirs:

            def plan(_: Engine) -> EditPlan:
                spans = tuple(cut(theirs.order, source_start, source_stop))
                return kv.apply(Transplant(start, stop, spans, keys=keys, values=values))

            asked = self._call(plan)
            require_movable(asked, self._llm.spec)
            built, rows = carry_out(self._llm.loop, kv, asked, tenant=self.tenant)
        self._stays_as_it_is = True
        self._become(self._tokens, built)
        return self._receipt("shifted", TokenEdit((), False, True), rows, begun)

    def fork(self) -> Document:
        """Return a second document with the same text; both share the KV they have in common."""

        def fork(engine: Engine) -> KVDoc:
            kv = self._kv.fork()
            engine.hold(kv)
            return kv

        kv = document_of(self._llm.loop, fork)
        stays = self._stays_as_it_is
        return Document(self._llm, self._tokens, kv, tenant=self.tenant, stays_as_it_is=stays)

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
            built, rows = carry_out(loop, kv, plan, wanted.baseline, tenant=self.tenant)
        if wanted.fidelity == "repaired":
            marked = None
            if wanted.rule.wants_marks:
                marked = mentions(old, found, self._llm.tokenizer.token_bytes)
            done = repair(loop, built, wanted.share, wanted.rule, marked)
            built, repaired = done.doc, done.receipt
        self._stays_as_it_is |= wanted.baseline is not None
        self._become(found.applied(old), built)
        self._call(lambda engine: engine.tidy(built))
        return self._receipt(wanted.fidelity, found, rows, begun, repaired)

    def _make_exact(self, tokens: list[int], found: TokenEdit, begun: float) -> EditReceipt:
        """Become these tokens, with the KV that a fresh prefill would have."""
        rows = 0
        if tokens:
            computed = self._compute(tokens, exact_only=True)
            self._stays_as_it_is = False
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


def make_document(llm: Host, text: Prompt, cache_salt: str | None = None) -> Document:
    """Return a document of this text whose KV is computed and kept.

    Args:
        llm: whose document it is.
        text: its text, or token ids.
        cache_salt: keeps the KV from all who do not give the same.

    Raises:
        RequestError: the text is longer than the model's context or the KV memory.
    """
    document = Document(llm, tenant=tenant_of(cache_salt))
    document.append_tokens(tokenize(llm.tokenizer, text)[1])
    return document
