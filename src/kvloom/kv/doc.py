"""Documents: named series of immutable versions over shared segments.

Knows: which spans a document shows, who owns which blocks, and what is exact.
Does not know: models, requests or how KV is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from kvloom.kv.exactness import Judged, judge
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, blocks_for
from kvloom.kv.segment import Segment
from kvloom.kv.span import Span, assembled, cut, reading_order
from kvloom.outputs import Provenance
from kvloom.types import Edit, Taint

if TYPE_CHECKING:
    from kvloom.kv.plan import EditPlan


@dataclass(frozen=True, slots=True)
class DocVersion:
    """One state of a document.

    Attributes:
        number: counts the document's versions.
        spans: the stretches; plain ones in order, overlays behind what they lie over.
        length: tokens in all; a slot and the one that replaces it are one.
    """

    number: int
    spans: tuple[Span, ...]
    length: int


class KVDoc:
    """A document; owns the blocks of its spans, and an open tail while it is written.

    Attributes:
        pool: where the slots come from.
        root: lineage of the empty document.
        start_pos: position of the first token.
        expected_length: tokens it will probably grow to; its tail takes room for them in one run
            while the pool is less than half full.
        version: the present state; earlier ones stay valid data but own nothing.
    """

    def __init__(
        self, pool: Pool, root: Lineage, spans: Iterable[Span] = (), *, start_pos: int = 0
    ) -> None:
        self.pool = pool
        self.root = root
        self.start_pos = start_pos
        self.expected_length = 0
        spans = tuple(spans)
        order = reading_order(spans)
        self.version = DocVersion(0, spans, sum(piece.length for piece in order))
        self._order: tuple[DocVersion, tuple[Span, ...]] = (self.version, order)
        self._judged: list[Judged] = []
        self._tail: Segment | None = None
        self._closed = False
        for span in spans:
            assert span.segment.closed, "shared a segment that is still written"
            pool.retain(*span.pool_slots)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The stretches: plain ones in order, overlays behind what they lie over."""
        return self.version.spans

    @property
    def order(self) -> tuple[Span, ...]:
        """The stretches cut where overlays replace slots, in the order of their tokens."""
        version, order = self._order
        if version is not self.version:
            order = reading_order(self.spans)
            self._order = (self.version, order)
        return order

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.version.length

    @property
    def end_pos(self) -> int:
        """Position behind the last token's, where the next one is appended."""
        last = self.spans[-1] if self.spans else None
        if last is not None and last.segment is self._tail:
            return last.stop_pos
        plain = next((x for x in reversed(self.spans) if not x.segment.placed), None)
        end = self.start_pos if plain is None else plain.stop_pos
        return max((end, *(x.stop_pos for x in self.spans if x.segment.placed)))

    @property
    def tokens(self) -> list[int]:
        """Token ids in all."""
        return [token for piece in self.order for token in piece.tokens]

    def blocks_needed(self, num_tokens: int) -> int:
        """Return how many free blocks an append of this many tokens needs at most."""
        room = self._tail.room if self._tail is not None else 0
        return blocks_for(max(num_tokens - room, 0))

    def append(self, tokens: Sequence[int]) -> np.ndarray:
        """Add tokens whose KV is about to be written; return their slots in the pool, int64.

        Raises:
            CapacityError: the pool has too few free blocks; the document is unchanged.
        """
        tail, count = self._tail, len(tokens)
        if tail is None or tail.room < count:
            return self._extend(tokens, None)
        first = tail.append(tokens)
        self._show(tail, count)
        return np.arange(first, first + count, dtype=np.int64)

    def overlay(self, tokens: Sequence[int], pos: np.ndarray) -> np.ndarray:
        """Put tokens at positions of their own, in place of whatever the document shows there.

        They are not exact.

        Args:
            tokens: token ids whose KV is about to be written.
            pos: int64 positions, in any order, each once.

        Raises:
            CapacityError: the pool has too few free blocks; the document is unchanged.
        """
        assert len(np.unique(pos)) == len(pos), "two rows of an overlay at one position"
        self.close_tail()
        covered = len(self.spans)
        order = np.argsort(pos)
        slots = np.empty(len(pos), dtype=np.int64)
        slots[order] = self._extend([tokens[row] for row in order.tolist()], pos[order])
        under, over = self.spans[:covered], self.spans[covered:]
        self._commit((*(span.without(pos) for span in under), *over))
        return slots

    def extend(self, pieces: Sequence[Span]) -> None:
        """Show pieces at the end, joined with what is there where they go on.

        They are in reading order and stand behind the last token; their segments are closed.
        """
        assert not self._closed, "extended a closed document"
        assert all(piece.segment.closed for piece in pieces), "shared a segment still written"
        self.close_tail()
        order = (*self.order, *pieces)
        self._show_instead(assembled(order), sum(piece.length for piece in order))

    def replace_beginning(self, pieces: Sequence[Span]) -> None:
        """Show pieces, which hold the same tokens, in place of as many first ones.

        They are in reading order, and their segments are closed.
        """
        assert not self._closed, "changed a closed document"
        self.close_tail()
        length = sum(piece.length for piece in pieces)
        rest = cut(self.order, length, self.length)
        self._show_instead(assembled((*pieces, *rest)), self.length)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and let go of the rest at once."""
        assert 0 <= length <= self.length, "truncated to more than there is"
        if any(span.segment.placed for span in self.spans):
            self.close_tail()
            self._show_instead(assembled(cut(self.order, 0, length)), length)
            return
        if self._tail is not None and self._tail.length == 0 and length < self.length:
            self._drop_tail()
        spans, kept = [], 0
        for span in self.spans:
            keep = min(span.length, length - kept)
            kept += keep
            if span.segment is self._tail:
                self._tail.cut(span.start + keep)
                if keep == 0:
                    self._drop_tail()
            else:
                if keep:
                    self.pool.retain(*span.sub(0, keep).pool_slots)
                self.pool.release(*span.pool_slots)
            if keep:
                spans.append(span.sub(0, keep))
        self._commit(tuple(spans), length)

    def apply(self, edit: Edit) -> EditPlan:
        """Say what an edit comes to; the document stays as it is."""
        return edit.plan(self)

    def fork(self) -> KVDoc:
        """Return a second document with the same content; both may go on separately."""
        self.close_tail()
        copy = KVDoc(self.pool, self.root, self.spans, start_pos=self.start_pos)
        copy._order = (copy.version, self.order)
        copy.learn_from(self)
        return copy

    def learn_from(self, other: KVDoc) -> None:
        """Take over what is known of the other one's stretches, to judge none of them again."""
        if (other.root, other.start_pos) == (self.root, self.start_pos):
            self._judged = other._judge()

    def close_tail(self) -> None:
        """Close the open segment, as anything that is shared must be."""
        if self._tail is None:
            return
        if self._tail.length:
            self.pool.retain(*self.spans[-1].pool_slots)
        self._drop_tail()

    def seal(self) -> None:
        """Close what is written, so that it may be shared, and keep the room behind it."""
        tail = self._tail
        if tail is None or tail.length == 0:
            return
        if tail.room == 0:
            self.close_tail()
            return
        self.pool.retain(*self.spans[-1].pool_slots)
        self._tail = tail.split(self.lineage())

    def shrink(self) -> None:
        """Give back reserved blocks that hold nothing yet."""
        if self._tail is not None:
            self._tail.shrink()

    def close(self) -> None:
        """Let go of everything; the document may not be used afterwards."""
        if not self._closed:
            self.truncate(0)
            self._closed = True

    def exact_length(self) -> int:
        """Return how many leading tokens equal a fresh prefill."""
        length = 0
        for span, taint in self.taints():
            if taint is not Taint.EXACT:
                break
            length += span.length
        return length

    def lineage(self) -> Lineage:
        """Return the lineage that a row appended now attends to."""
        judged = self._judge()
        return judged[-1].actual if judged else self.root

    def taints(self) -> Iterator[tuple[Span, Taint]]:
        """Yield every stretch, in the order of tokens, with the reasons why it is not exact."""
        for judged in self._judge():
            yield judged.span, judged.taint

    def provenance(self) -> Provenance:
        """Return tokens by state, and bytes of the blocks shown by codec."""
        lengths: Counter[Taint] = Counter()
        for span, taint in self.taints():
            lengths[taint] += span.length
        tokens: Counter[str] = Counter()
        for taint, length in lengths.items():
            for name in [flag.name.lower() for flag in taint if flag.name] or ["exact"]:
                tokens[name] += length
        return Provenance(tokens=dict(tokens), nbytes={"plain": self.nbytes})

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks the document owns, shared ones and the tail's reserve included."""
        blocks: set[int] = set()
        for first, stop in self.owned_ranges():
            blocks.update(range(first // PAGE_SLOTS, blocks_for(stop)))
        return len(blocks) * self.pool.block_bytes

    def owned_ranges(self) -> list[tuple[int, int]]:
        """Return the slot ranges whose blocks the document owns once each, for integrity checks."""
        ranges = [span.pool_slots for span in self.spans if span.segment is not self._tail]
        if self._tail is not None:
            first = self._tail.first_slot
            ranges.append((first, first + self._tail.capacity))
        return ranges

    def _judge(self) -> list[Judged]:
        self._judged = judge(self.order, self.root, self.start_pos, self._judged)
        return self._judged

    def _extend(self, tokens: Sequence[int], pos: np.ndarray | None) -> np.ndarray:
        """Add tokens at the end, or at positions of their own."""
        assert not self._closed, "appended to a closed document"
        # Asked for first, so that nothing has to be undone: every free block is within reach.
        self.pool.require(blocks_for(max(len(tokens) - self._room(), 0)))
        slots: list[np.ndarray] = []
        done = 0
        while done < len(tokens):
            tail = self._tail_with_room(len(tokens) - done)
            part = tokens[done : done + tail.room]
            first = tail.append(part)
            if pos is not None:
                tail.place(pos[done : done + len(part)])
            slots.append(np.arange(first, first + len(part), dtype=np.int64))
            self._show(tail, len(part))
            done += len(part)
            if pos is not None:
                self.close_tail()
        return np.concatenate(slots) if slots else np.empty(0, dtype=np.int64)

    def _room(self) -> int:
        """Return how many tokens can be appended without a further block."""
        if self._tail is not None:
            return self._tail.room
        return self.pool.rest(self.spans[-1].pool_slots[1]) if self.spans else 0

    def _tail_with_room(self, num_tokens: int) -> Segment:
        tail = self._tail
        if tail is not None:
            if tail.room or tail.grow(blocks_for(num_tokens)):
                return tail
            self.close_tail()
        self._tail = self._open_tail(num_tokens)
        return self._tail

    def _open_tail(self, num_tokens: int) -> Segment:
        """Open a segment behind the last span where that is free, so that both read as one run."""
        lineage, base = self.lineage(), self.end_pos
        wanted = max(num_tokens, self.expected_length - self.length)
        if blocks_for(wanted) > self.pool.free_blocks // 2:
            wanted = num_tokens
        if self.spans:
            end = self.spans[-1].pool_slots[1]
            rest = self.pool.claim_rest(end)
            if rest == 0 and end % PAGE_SLOTS == 0:
                rest = self.pool.extend(end // PAGE_SLOTS, blocks_for(num_tokens)) * PAGE_SLOTS
            if rest:
                tail = Segment(self.pool, end, rest, base=base, origin=lineage)
                if wanted > rest:
                    tail.grow(blocks_for(wanted - rest))
                return tail
        # Where the pool has no such run, the largest is filled first; the next call takes another.
        run = self.pool.allocate(blocks_for(wanted))
        first, capacity = run.first_block * PAGE_SLOTS, run.num_blocks * PAGE_SLOTS
        return Segment(self.pool, first, capacity, base=base, origin=lineage)

    def _show(self, tail: Segment, num_tokens: int) -> None:
        number, spans, length = self.version.number + 1, self.spans, self.length + num_tokens
        last = spans[-1] if spans else None
        if last is not None and last.segment is tail:
            grown = Span(tail, last.start, last.stop + num_tokens, last.shift, last.hidden)
            spans = (*spans[:-1], grown)
        else:
            spans = (*spans, Span(tail, 0, num_tokens))
        self.version = DocVersion(number, spans, length)

    def _drop_tail(self) -> None:
        assert self._tail is not None
        self._tail.close()
        self._tail = None

    def _show_instead(self, spans: tuple[Span, ...], length: int) -> None:
        """Own and show these spans, and let go of those shown before; the tail is closed."""
        pairs = zip(spans, self.spans, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
        for span in spans[same:]:
            self.pool.retain(*span.pool_slots)
        for span in self.spans[same:]:
            self.pool.release(*span.pool_slots)
        self._commit(spans, length)

    def _commit(self, spans: tuple[Span, ...], length: int | None = None) -> None:
        """Make spans the document's state; the length is counted where it is not given."""
        number = self.version.number + 1
        if length is not None:
            self.version = DocVersion(number, spans, length)
            return
        order = reading_order(spans)
        self.version = DocVersion(number, spans, sum(piece.length for piece in order))
        self._order = (self.version, order)
