"""What is computed for a document and generates nothing, waited for by whoever asked.

Knows: the loop that owns the engine, and how an interrupted wait leaves nothing behind.
Does not know: texts, or what the KV is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.request import Computed, Event, Failed, Repaired
from kvloom.errors import KvloomError
from kvloom.kv.baseline import Baseline
from kvloom.kv.doc import KVDoc
from kvloom.kv.execute import add_part
from kvloom.kv.plan import Compute, EditPlan, Keep, Mix, Take
from kvloom.kv.pool import blocks_for
from kvloom.reuse.planned import PlannedRows
from kvloom.reuse.repair import stale_rows
from kvloom.reuse.select import Selector
from kvloom.types import SlotRange

T = TypeVar("T")
D = TypeVar("D", bound=KVDoc | None)


def call(loop: EngineLoop, task: Callable[[Engine], T]) -> T:
    """Run a function on the engine between two steps, and return what it returns."""
    return loop.call(task).result()


def document_of(loop: EngineLoop, task: Callable[[Engine], D]) -> D:
    """Run a function on the engine that gives a document; an interrupted wait lets go of it."""
    future = loop.call(task)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        future.add_done_callback(partial(_abandon, loop))
        raise


@contextmanager
def forked(loop: EngineLoop, doc: KVDoc) -> Iterator[KVDoc]:
    """Give a fork of a document that is neither forgotten nor let go of by anybody else."""
    fork = document_of(loop, lambda engine: engine.memory.fork_protected(doc))
    try:
        yield fork
    finally:
        loop.abandon(fork)


def compute(
    loop: EngineLoop,
    tokens: list[int],
    base: KVDoc | None = None,
    *,
    tenant: str,
    exact_only: bool = False,
    storable: bool = True,
    score_from: int | None = None,
    keep_logits: bool = False,
) -> Computed:
    """Return a document of these tokens, which may start with the KV of another one.

    Args:
        loop: runs it.
        tokens: at least one.
        base: a document whose KV may be taken; None for none.
        tenant: whose KV may answer besides, and whose this becomes.
        exact_only: take of it what equals a fresh prefill, and no more.
        storable: store the KV when there is time.
        score_from: score the tokens behind this row.
        keep_logits: give the logits of the scored rows as well.

    Raises:
        RequestError: the tokens are outside of the vocabulary or too many.
        CapacityError: the KV memory cannot hold them.
    """
    event = _wait(
        loop,
        lambda engine: engine.submit(
            tokens,
            None,
            base=base,
            exact_only=exact_only,
            tenant=tenant,
            storable=storable,
            score_from=score_from,
            keep_logits=keep_logits,
        ),
    )
    assert isinstance(event, Computed)
    return event


def repair(
    loop: EngineLoop, doc: KVDoc, share: float, rule: Selector, marked: np.ndarray | None = None
) -> Repaired:
    """Let go of a document for a copy in which a share of the stale rows is computed again.

    Raises:
        CapacityError: the KV memory has no room for the rows.
    """
    return _repair(loop, doc, lambda engine: engine.repair(doc, share, rule, marked))


def repair_planned(loop: EngineLoop, doc: KVDoc, rule: PlannedRows, within: SlotRange) -> Repaired:
    """Let go of a document for a copy in which the rows of a plan are computed again.

    Args:
        loop: runs it.
        doc: is let go of.
        rule: says which rows.
        within: places of the document between which all of them are.

    Raises:
        CapacityError: the KV memory has no room for the rows.
    """

    def begin(engine: Engine) -> str:
        stale = len(stale_rows(doc).within(within).place)
        return engine.repair(doc, min(rule.count / max(stale, 1), 1.0), rule, within=within)

    return _repair(loop, doc, begin)


def _repair(loop: EngineLoop, doc: KVDoc, begin: Callable[[Engine], str]) -> Repaired:
    try:
        event = _wait(loop, begin)
    finally:
        loop.abandon(doc)
    assert isinstance(event, Repaired)
    return event


def carry_out(
    loop: EngineLoop, doc: KVDoc, plan: EditPlan, baseline: Baseline | None = None, *, tenant: str
) -> tuple[KVDoc, int]:
    """Return a tenant's document that a plan makes of another one, and how many rows were run.

    The other one stays as it is, and may not be forgotten meanwhile, nor may what the plan takes.
    Parts are added from left to right, so that computed rows see what stands before them. What is
    forgotten of the new document in between is computed as any other tokens.

    Raises:
        RequestError: the new document is too long.
        CapacityError: the KV memory cannot hold it.
    """
    built = document_of(loop, Engine.new_document)
    rows = 0
    try:
        tokens = call(loop, lambda _: plan.tokens(doc))
        for place, part in plan.placed():
            if not isinstance(part, Compute) and call(
                loop, partial(_add, built, doc, part, place, baseline)
            ):
                continue
            with kept(loop, built):
                stop = place + part.length
                computed = compute(loop, tokens[:stop], built, tenant=tenant)
            loop.abandon(built)
            built, rows = computed.doc, rows + computed.usage.computed_tokens
    except BaseException:
        loop.abandon(built)
        raise
    return built, rows


def _add(
    built: KVDoc,
    doc: KVDoc,
    part: Keep | Take | Mix,
    place: int,
    baseline: Baseline | None,
    engine: Engine,
) -> bool:
    """Show a part at a document's end; say whether all was there that stands before it."""
    if isinstance(part, Mix) or baseline is not None:  # is copied, where nothing else is
        pieces = len(doc.order) + (len(part.spans) if isinstance(part, Mix) else 0)
        engine.memory.make_room(blocks_for(part.length) + pieces)
    if built.length < place:
        return False
    add_part(built, doc, part, baseline)
    return True


@contextmanager
def kept(loop: EngineLoop, doc: KVDoc) -> Iterator[None]:
    """Keep the KV of an idle document from being forgotten for a while."""
    protected = loop.call(lambda engine: engine.memory.protect(doc))
    try:
        protected.result()
        yield
    finally:
        if not protected.cancel():
            loop.call(lambda engine: engine.memory.unprotect(doc))


def _wait(loop: EngineLoop, submit: Callable[[Engine], str]) -> Event:
    inbox: SimpleQueue[Event] = SimpleQueue()
    submitted = loop.submit([submit], inbox.put)
    try:
        submitted.result()
        event = inbox.get()
    except BaseException:
        loop.cancel_submitted(submitted)
        with suppress(KvloomError):  # a closed engine has nothing to give
            loop.call(lambda engine: _discard(engine, inbox))
        raise
    if isinstance(event, Failed):
        raise event.error
    return event


def _abandon(loop: EngineLoop, done: Future[D]) -> None:
    doc = None if done.cancelled() or done.exception() is not None else done.result()
    if doc is not None:
        loop.abandon(doc)


def _discard(engine: Engine, inbox: SimpleQueue[Event]) -> None:
    """Let go of the document that nobody took."""
    while not inbox.empty():
        event = inbox.get()
        if isinstance(event, Computed | Repaired):
            engine.release(event.doc)
