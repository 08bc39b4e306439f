"""What is computed for a document and generates nothing, waited for by whoever asked.

Knows: the loop that owns the engine, and how an interrupted wait leaves nothing behind.
Does not know: texts, or what the KV is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.request import Computed, Event, Failed, Repaired
from kvloom.kv.baseline import Baseline
from kvloom.kv.doc import KVDoc
from kvloom.kv.execute import add_part
from kvloom.kv.plan import Compute, EditPlan, Keep, Mix, Take
from kvloom.reuse.select import Selector

T = TypeVar("T")


def call(loop: EngineLoop, task: Callable[[Engine], T]) -> T:
    """Run a function on the engine between two steps, and return what it returns."""
    return loop.call(task).result()


def compute(
    loop: EngineLoop,
    tokens: list[int],
    base: KVDoc,
    *,
    exact_only: bool = False,
    score_from: int | None = None,
    keep_logits: bool = False,
) -> Computed:
    """Return a document of these tokens, which may start with the KV of another one.

    Args:
        loop: runs it.
        tokens: at least one.
        base: a document whose KV may be taken.
        exact_only: take of it what equals a fresh prefill, and no more.
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
            score_from=score_from,
            keep_logits=keep_logits,
        ),
    )
    assert isinstance(event, Computed)
    return event


def repair(
    loop: EngineLoop, doc: KVDoc, share: float, rule: Selector, marked: np.ndarray | None = None
) -> Repaired:
    """Return a copy of a document in which a share of the stale rows is computed again.

    Raises:
        CapacityError: the KV memory has no room for the rows.
    """
    event = _wait(loop, lambda engine: engine.repair(doc, share, rule, marked))
    assert isinstance(event, Repaired)
    return event


def carry_out(
    loop: EngineLoop, doc: KVDoc, plan: EditPlan, baseline: Baseline | None = None
) -> tuple[KVDoc, int]:
    """Return the document that a plan makes of another one, and how many rows were run.

    The other one stays as it is.

    Parts are added from left to right, so that computed rows see what stands before them.

    Raises:
        RequestError: the new document is too long.
        CapacityError: the KV memory cannot hold it.
    """
    built = call(loop, Engine.new_document)
    tokens: list[int] = []
    rows = 0
    try:
        with kept(loop, doc):
            for part in plan.parts:
                if not isinstance(part, Compute):
                    with kept(loop, built):
                        tokens = call(loop, partial(_add, built, doc, part, baseline))
                    continue
                tokens += part.tokens
                with kept(loop, built):
                    computed = compute(loop, tokens, built)
                call(loop, partial(Engine.release, doc=built))
                built, rows = computed.doc, rows + computed.usage.computed_tokens
    except BaseException:
        call(loop, partial(Engine.release, doc=built))
        raise
    return built, rows


def _add(
    built: KVDoc, doc: KVDoc, part: Keep | Take | Mix, baseline: Baseline | None, _: Engine
) -> list[int]:
    add_part(built, doc, part, baseline)
    return built.tokens


@contextmanager
def kept(loop: EngineLoop, doc: KVDoc) -> Iterator[None]:
    """Keep the KV of an idle document from being forgotten for a while."""
    call(loop, lambda engine: engine.memory.protect(doc))
    try:
        yield
    finally:
        call(loop, lambda engine: engine.memory.unprotect(doc))


def _wait(loop: EngineLoop, submit: Callable[[Engine], str]) -> Event:
    inbox: SimpleQueue[Event] = SimpleQueue()
    (request_id,) = loop.submit_and_wait([submit], inbox.put)
    try:
        event = inbox.get()
    except BaseException:
        loop.call(lambda engine: _discard(engine, request_id, inbox))
        raise
    if isinstance(event, Failed):
        raise event.error
    return event


def _discard(engine: Engine, request_id: str, inbox: SimpleQueue[Event]) -> None:
    """Cancel a request, or let go of the document that nobody took."""
    engine.cancel(request_id)
    while not inbox.empty():
        event = inbox.get()
        if isinstance(event, Computed | Repaired):
            engine.release(event.doc)
