"""Holdings: where KV of a prompt's chunks lies, and how it comes into a document.

Knows: variants in memory, chunks on the shelf, KV that parts bring along, and how a chunk is
computed alone.
Does not know: which of these is worth taking; a planner does.

Source: PromptCache (Gim et al. 2024) for chunks with KV of their own. Deviation: a chunk is
computed behind a sink that is then left out, since the first tokens of any text draw attention
that has nothing to do with what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from kvloom.cost import MEMORY
from kvloom.engine.chunks import variant_id
from kvloom.engine.computing import call, compute, document_of
from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.shelf import LOADING_S
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import blocks_for
from kvloom.kv.span import assembled, cut
from kvloom.outputs import PartAction
from kvloom.reuse.actions import Action, Held, Load, Shift, Wanted
from kvloom.reuse.planner import Place, places
from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey

PREFIX = "prefix"
"""What the exact KV of a prompt's known beginning is called."""


@dataclass(frozen=True, slots=True)
class Brought:
    """KV of a part that is ready to be shown.

    Attributes:
        doc: shows the part and nothing else; protected until the receiver lets go of it.
        actions: what was done for it.
    """

    doc: KVDoc
    actions: tuple[PartAction, ...]


class Holdings:
    """KV of the chunks of one prompt.

    Args:
        loop: runs what is computed.
        sink: tokens that a chunk is computed behind where nobody holds it.
        tenant: whose chunks they are.

    Attributes:
        rows: that were run for chunks alone.
        loaded_bytes: KV that came from the shelf.
    """

    def __init__(self, loop: EngineLoop, sink: tuple[int, ...], tenant: str) -> None:
        self._loop = loop
        self._sink = sink
        self._tenant = tenant
        self._shelf, root = call(loop, lambda engine: (engine.memory.shelf, engine.memory.root))
        self._behind = root.extend(sink)
        self._alone = variant_id(self._behind)
        self._own: dict[str, KVDoc] = {}
        self._loads: dict[int, tuple[ChunkKey, str, Future[Chunk | None]]] = {}
        self._stack = ExitStack()
        self.rows = 0
        self.loaded_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _, _, future in self._loads.values():
            future.cancel()
        self._stack.close()

    def of(
        self, want: Wanted, own: Mapping[int, KVDoc], known: int, *, computes: bool
    ) -> dict[str, list[Held]]:
        """Return the variants of every chunk.

        Args:
            want: the prompt.
            own: KV that parts bring along, by number of the part.
            known: first tokens of the prompt whose exact KV is known.
            computes: offer chunks that nobody holds as well; `bring` computes them alone.
        """
        have: dict[str, list[Held]] = {}
        for place in places(want):
            name = place.part.chunk
            if name is None:
                continue
            if name not in have:
                have[name] = self._variants(place.part.tokens, computes=computes)
            if place.start + len(place.part.tokens) <= known:
                have[name].append(Held(PREFIX, place.expected, place.start))
            if place.number in own and (held := self._owned(place, own[place.number])):
                have[name].insert(0, held)
        return have

    def prefetch(self, want: Wanted, actions: Sequence[Action]) -> None:
        """Begin to read what a plan loads."""
        for load in actions:
            if isinstance(load, Load) and self._shelf is not None:
                tokens = want.parts[load.part].tokens
                key = self._shelf.key(tokens, self._behind, self._tenant)
                self._loads[load.part] = (key, load.tier, self._shelf.fetch(key))

    def bring(self, number: int, tokens: tuple[int, ...], shift: Shift, saved: int) -> Brought:
        """Return the KV that a plan shows for a part; where it is gone, the chunk is computed.

        Args:
            number: of the part.
            tokens: of the part.
            shift: says which variant.
            saved: rows that need not be computed thanks to it.
        """
        actions: list[PartAction] = []
        if number in self._loads and (loaded := self._loaded(number, tokens)) is not None:
            actions.append(loaded)
        doc = self._taken(tokens, shift.held, saved)
        variant = shift.held
        if doc is None:
            doc, rows = self._computed(tokens)
            variant = self._alone
            actions.append(PartAction(number, "compute", rows, "", variant))
        actions.append(PartAction(number, "shift", 0, MEMORY, variant))
        return Brought(doc, tuple(actions))

    def let_go(self, doc: KVDoc) -> None:
        """Let go of what was brought."""
        self._loop.abandon(doc)

    def _owned(self, place: Place, kv: KVDoc) -> Held | None:
        """Protect KV that a part brings along; None if it is not that of the part's tokens."""
        tokens = place.part.tokens
        own = document_of(self._loop, lambda engine: _ending_with(kv, tokens, engine))
        if own is None:
            return None
        self._stack.callback(self._loop.abandon, own)
        name = f"own {place.number}"
        self._own[name] = own
        exact = call(self._loop, lambda _: own.exact_length() == own.length)
        return Held(name, own.root if exact else None, own.start_pos)

    def _variants(self, tokens: tuple[int, ...], *, computes: bool) -> list[Held]:
        """Return what memory and shelf hold of a chunk; what was computed alone comes first."""
        found = [
            Held(one.id, one.origin, one.base, MEMORY, one.statistics)
            for one in call(self._loop, lambda engine: engine.chunks.variants(tokens, self._tenant))
        ]
        found.sort(key=lambda held: held.id != self._alone)
        if found and found[0].id == self._alone:
            return found
        tier = None
        if self._shelf is not None:
            key = self._shelf.key(tokens, self._behind, self._tenant)
            tier = self._shelf.store.tier_of(key.name)
        if tier is None and not computes:
            return found
        return [Held(self._alone, self._behind, len(self._sink), tier or MEMORY), *found]

    def _taken(self, tokens: tuple[int, ...], name: str, saved: int) -> KVDoc | None:
        def take(engine: Engine) -> KVDoc | None:
            if name in self._own:
                return engine.memory.fork_protected(self._own[name])
            return engine.chunks.take(tokens, self._tenant, name, saved)

        return document_of(self._loop, take)

    def _loaded(self, number: int, tokens: tuple[int, ...]) -> PartAction | None:
        """Bring a chunk from the shelf into memory; None if it did not come."""
        shelf, (key, tier, future) = self._shelf, self._loads.pop(number)
        assert shelf is not None
        if not future.cancelled():
            wait([future], LOADING_S)
        if not future.done():  # what comes behind it hangs as well
            for _, _, other in self._loads.values():
                other.cancel()
        base, tenant = len(self._sink), self._tenant

        def take(engine: Engine) -> int:
            engine.memory.make_room(blocks_for(len(tokens)))
            doc = shelf.take_chunk(key, base, future)
            if doc is None:
                return 0
            engine.chunks.add(doc.order, tenant)
            nbytes = doc.nbytes
            doc.close()
            return nbytes

        nbytes = call(self._loop, take)
        self.loaded_bytes += nbytes
        return PartAction(number, "load", 0, tier, self._alone) if nbytes else None

    def _computed(self, tokens: tuple[int, ...]) -> tuple[KVDoc, int]:
        """Compute a chunk alone; return a fork of its KV, and the rows that were run."""
        doc, rows = None, 0
        while doc is None:
            asked = [*self._sink, *tokens]
            computed = compute(self._loop, asked, tenant=self._tenant, storable=False)
            rows += computed.usage.computed_tokens
            doc = document_of(self._loop, partial(self._add, tokens, computed.doc))
        self.rows += rows
        return doc, rows

    def _add(self, tokens: tuple[int, ...], doc: KVDoc, engine: Engine) -> KVDoc | None:
        """Keep what was computed behind the sink, unless it is forgotten already."""
        chunks, sink, tenant = engine.chunks, len(self._sink), self._tenant
        name = None
        if doc.length == sink + len(tokens):
            doc.close_tail()
            name = chunks.add(cut(doc.order, sink, doc.length), tenant)
            engine.idle.later(partial(chunks.store, tokens, tenant, name))
        engine.release(doc)
        return None if name is None else chunks.take(tokens, tenant, name)


def _ending_with(kv: KVDoc, tokens: tuple[int, ...], engine: Engine) -> KVDoc | None:
    """Return a protected document of what stands at the end of another; None if it does not."""
    known = kv.tokens
    skipped = len(known) - len(tokens)
    if skipped < 0 or tuple(known[skipped:]) != tokens:
        return None
    if skipped == 0:
        return engine.memory.fork_protected(kv)
    kv.close_tail()
    pieces = assembled(cut(kv.order, skipped, len(known)))
    root = kv.root.extend(known[:skipped])
    ending = KVDoc(kv.pool, root, pieces, start_pos=kv.start_pos + skipped)
    engine.memory.protect(ending)
    return ending
