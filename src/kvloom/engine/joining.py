"""Joining: one prompt out of parts, some of which are chunks with KV of their own.

Knows: the order of parts, what stands in memory for each, and what has to be computed.
Does not know: tokenizers' templates or HTTP.

Source: PromptCache (Gim et al. 2024) for chunks with KV of their own; CacheBlend (Yao et al. 2025),
section 4, for their repair. Deviation: a chunk is computed behind a sink that is then left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from kvloom.engine.chunks import chunk_spans
from kvloom.engine.computing import call, carry_out, compute, document_of, repair
from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import Compute, EditPlan, Part, Take, merged, require_movable
from kvloom.kv.span import Span
from kvloom.outputs import EditReceipt, Fidelity
from kvloom.reuse.select import Selector
from kvloom.store.key import ANYBODY
from kvloom.types import ModelSpec


@dataclass(frozen=True, slots=True)
class TokenPart:
    """A part of a prompt in tokens.

    Attributes:
        tokens: token ids.
        reusable: whether its KV may be computed alone and used at any place.
    """

    tokens: tuple[int, ...]
    reusable: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """A prompt whose parts stand in one document.

    Attributes:
        doc: the KV of the parts; held until the receiver releases it.
        tokens: the whole prompt.
        receipt: what was shown, computed and repaired.
    """

    doc: KVDoc
    tokens: list[int]
    receipt: EditReceipt


@dataclass(frozen=True, slots=True)
class Joining:
    """How parts are joined.

    Attributes:
        loop: runs what is computed.
        spec: of the model, whose positions must be movable.
        sink: tokens that a chunk is computed behind.
        fidelity: of the chunks.
        share: of their rows that is repaired.
        rule: chooses these.
        tenant: whose chunks they are.
    """

    loop: EngineLoop
    spec: ModelSpec
    sink: tuple[int, ...]
    fidelity: Fidelity
    share: float
    rule: Selector
    tenant: str = ANYBODY

    def join(self, parts: Sequence[TokenPart]) -> Joined:
        """Return the parts as one document; its last text sees what was repaired before it.

        Raises:
            RequestError: there are no tokens.
            UnsupportedModelError: the model's positions cannot be moved.
            CapacityError: the KV memory cannot hold the parts.
        """
        begun = time.perf_counter()
        tokens = [token for part in parts for token in part.tokens]
        if not tokens:
            raise RequestError("The prompt has no tokens; give a part with text.", param="parts")
        body = list(parts)
        while body and (self.fidelity == "exact" or not body[-1].reusable):
            body.pop()
        built, rows = self._shown(body, tokens)
        found = None
        if self.fidelity == "repaired":
            repaired = repair(self.loop, built, self.share, self.rule)
            built, found = repaired.doc, repaired.receipt
        try:
            computed = compute(self.loop, tokens, built, tenant=self.tenant)
        finally:
            self.loop.abandon(built)
        rows += computed.usage.computed_tokens
        receipt = EditReceipt(
            fidelity=self.fidelity,
            tokens=computed.usage.provenance.tokens,
            recomputed=rows + (found.repaired if found else 0),
            repaired=found.repaired if found else 0,
            deviation=found.deviation if found else None,
            deviation_left=found.left if found else None,
            seconds=time.perf_counter() - begun,
        )
        return Joined(computed.doc, tokens, receipt)

    def _shown(self, body: Sequence[TokenPart], tokens: list[int]) -> tuple[KVDoc, int]:
        """Return a document of parts, and the rows that were run for it and its chunks."""
        known = call(self.loop, lambda engine: engine.memory.known_prefix(tokens, self.tenant))
        rows = place = 0
        with ExitStack() as stack:
            parts: list[Part] = []
            for part in body:
                place += len(part.tokens)
                if not part.reusable or place <= known:
                    parts.append(Compute(part.tokens))
                    continue
                doc, computed = self._chunk(part.tokens)
                stack.callback(self.loop.abandon, doc)
                rows += computed
                parts.append(Take(self._spans(doc)))
            plan = EditPlan(merged(parts))
            require_movable(plan, self.spec)
            empty = document_of(self.loop, Engine.new_document)
            stack.callback(self.loop.abandon, empty)
            built, run = carry_out(self.loop, empty, plan, tenant=self.tenant)
        return built, rows + run

    def _spans(self, doc: KVDoc) -> tuple[Span, ...]:
        return call(self.loop, lambda _: chunk_spans(doc, self.sink))

    def _chunk(self, tokens: tuple[int, ...]) -> tuple[KVDoc, int]:
        """Return a fork of a chunk's document, and the rows that were run for it."""
        sink, tenant, loop = self.sink, self.tenant, self.loop
        doc = document_of(loop, lambda engine: engine.chunks.find(sink, tokens, tenant))
        rows = 0
        while doc is None:
            computed = compute(loop, [*sink, *tokens], tenant=tenant)
            rows += computed.usage.computed_tokens
            doc = document_of(loop, partial(self._add, tokens, computed.doc))
        return doc, rows

    def _add(self, tokens: tuple[int, ...], doc: KVDoc, engine: Engine) -> KVDoc | None:
        return engine.chunks.add(self.sink, tokens, self.tenant, doc)
