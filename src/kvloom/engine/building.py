"""Building: a document that grows from left to right while other requests run between its parts.

Knows: what it shows so far, and what is computed where something was forgotten meanwhile.
Does not know: planners, or where the KV that it shows came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvloom.engine.computing import call, compute, document_of, forked, kept, repair_planned
from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.request import Computed
from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import placed_at
from kvloom.kv.span import cut
from kvloom.reuse.craft import ChunkStatistics
from kvloom.reuse.mass import RowMass, chunk_statistics
from kvloom.reuse.planned import PlannedRows
from kvloom.reuse.repair import RepairReceipt
from kvloom.types import SlotRange


@dataclass(frozen=True, slots=True)
class Watched:
    """Which stretch of a prompt is watched, and what it is watched for.

    Attributes:
        names: of the chunks before it, and its own.
        stretches: their positions, in order.
        tenant: whose the chunk is.
    """

    names: tuple[str, ...]
    stretches: tuple[SlotRange, ...]
    tenant: str


class Building:
    """The beginning of a prompt, as a document that nobody else sees.

    Tokens that nothing was shown for are computed when something must stand behind them.

    Args:
        loop: runs what is computed.
        tokens: of the whole prompt.
        tenant: whose stored KV may answer.

    Attributes:
        doc: what stands so far; held, so that it may be forgotten, and is computed again then.
        rows: that were run.
    """

    def __init__(self, loop: EngineLoop, tokens: list[int], tenant: str) -> None:
        self._loop = loop
        self._tokens = tokens
        self._tenant = tenant
        self.doc = document_of(loop, Engine.new_document)
        self.rows = 0

    def show(self, variant: KVDoc, place: int) -> None:
        """Show a document's tokens from a place on; what is missing before them is computed."""
        self.reach(place)
        if not call(self._loop, partial(_show, self.doc, variant, place)):
            self.reach(place + call(self._loop, lambda _: variant.length))

    def reach(self, stop: int) -> None:
        """Compute what is missing of the first tokens."""
        if stop and call(self._loop, lambda _: self.doc.length) < stop:
            self._compute(stop)

    def repair(self, rule: PlannedRows, within: SlotRange) -> RepairReceipt | None:
        """Compute rows again; None where all was forgotten and has been computed instead."""
        if call(self._loop, lambda _: self.doc.length) < within.stop:
            self.reach(within.stop)
            return None
        repaired = repair_planned(self._loop, self.doc, rule, within)
        self.doc = repaired.doc
        self.rows += repaired.receipt.repaired
        return repaired.receipt

    def watch(self, place: int, watched: Watched) -> str:
        """Compute a chunk from a place on, and keep it with what it attended to; return its name.

        Raises:
            UnsupportedModelError: the model's attention cannot be watched.
        """
        stop = watched.stretches[-1].stop
        step_rows = call(self._loop, lambda engine: engine.config.step_tokens)
        while True:
            self.reach(place)
            with forked(self._loop, self.doc) as grown:
                if call(self._loop, lambda _: grown.length) < place:
                    continue  # forgotten in between
                found: list[RowMass] = []
                for start in range(place, stop, step_rows):
                    tokens = self._tokens[start : min(start + step_rows, stop)]
                    found.append(call(self._loop, partial(_run, grown, tokens, watched.stretches)))
                    self.rows += len(tokens)
                number = len(watched.names) - 1
                learned = chunk_statistics(found, watched.stretches, watched.names, number)
                whole = document_of(self._loop, partial(_held_fork, grown))
                self._become(whole)
                pieces = SlotRange(place, stop)
                return call(self._loop, partial(_keep, grown, pieces, learned, watched.tenant))

    def finish(self) -> Computed:
        """Compute the rest of the prompt; the receiver owns the whole of it."""
        return self._compute(len(self._tokens))

    def close(self) -> None:
        """Let go of the document."""
        self._loop.abandon(self.doc)

    def _compute(self, stop: int) -> Computed:
        with kept(self._loop, self.doc):
            computed = compute(self._loop, self._tokens[:stop], self.doc, tenant=self._tenant)
        self._become(computed.doc)
        self.rows += computed.usage.computed_tokens
        return computed

    def _become(self, doc: KVDoc) -> None:
        self._loop.abandon(self.doc)
        self.doc = doc


def _show(built: KVDoc, variant: KVDoc, place: int, _: Engine) -> bool:
    """Show a variant at a document's end; say whether all was there that stands before it."""
    if built.length < place:
        return False
    built.extend(placed_at(variant.order, built.end_pos))
    return True


def _run(
    doc: KVDoc, tokens: Sequence[int], stretches: Sequence[SlotRange], engine: Engine
) -> RowMass:
    return engine.watcher.run(doc, tokens, stretches)


def _held_fork(doc: KVDoc, engine: Engine) -> KVDoc:
    fork = doc.fork()
    engine.hold(fork)
    return fork


def _keep(
    doc: KVDoc, pieces: SlotRange, learned: ChunkStatistics, tenant: str, engine: Engine
) -> str:
    doc.close_tail()
    return engine.chunks.add(cut(doc.order, *pieces), tenant, learned)
