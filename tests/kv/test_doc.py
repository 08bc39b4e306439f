"""Documents: what each shows stays its own, whatever others do, and exactness is never lost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from kvloom.errors import CapacityError
from kvloom.kv.doc import DocVersion, KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS
from kvloom.kv.span import Span
from kvloom.types import SlotRange, Taint
from tests.kv.worlds import ROOT, check_books, layer_spec, small_pool

BLOCKS = 7
TINY = (layer_spec(0, heads=1, kv_heads=1, dims=(1, 1)),)


@dataclass(eq=False)
class Model:
    """A document beside plain lists of what it must hold."""

    doc: KVDoc
    tokens: list[int] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    exact: bool = True


@dataclass
class Photograph:
    """A version with copies of what it was made of."""

    version: DocVersion
    number: int
    length: int
    spans: list[tuple[int, int, int, int]]

    @classmethod
    def take(cls, version: DocVersion) -> Photograph:
        return cls(version, version.number, version.length, cls.shape(version))

    @staticmethod
    def shape(version: DocVersion) -> list[tuple[int, int, int, int]]:
        return [(id(x.segment), x.start, x.stop, x.shift) for x in version.spans]


class DocMachine(RuleBasedStateMachine):
    """Documents over a pool that is always nearly full; every slot is marked by its writer."""

    docs = Bundle("docs")

    def __init__(self) -> None:
        super().__init__()
        self.pool = small_pool(BLOCKS, TINY)
        self.models: list[Model] = []
        self.photographs: list[Photograph] = []
        self.next_mark = 0.0

    def read(self, doc: KVDoc) -> list[float]:
        stretches = [self.pool.keys[0][0, slice(*x.pool_slots), 0] for x in doc.spans]
        return torch.cat(stretches).tolist() if stretches else []

    @rule(target=docs, start_pos=st.sampled_from([0, 0, 5]))
    def make(self, start_pos: int) -> Model:
        self.models.append(Model(KVDoc(self.pool, ROOT, start_pos=start_pos)))
        return self.models[-1]

    @rule(model=docs, count=st.integers(0, 200), expected=st.sampled_from([0, 0, 100, 400]))
    def append(self, model: Model, count: int, expected: int) -> None:
        doc = model.doc
        doc.expected_length = expected
        tokens = [(len(model.tokens) + i) % 5 for i in range(count)]
        before, owners = doc.version, self.pool.owners()
        promised = doc.blocks_needed(count) <= self.pool.free_blocks
        probes = [doc.blocks_needed(n) for n in (1, 30, 64, 200)]
        try:
            slots = doc.append(tokens)
        except CapacityError:
            assert not promised, "there was room for what blocks_needed asked"
            assert doc.version is before
            assert self.pool.owners().tolist() == owners.tolist()
            assert [doc.blocks_needed(n) for n in (1, 30, 64, 200)] == probes
            return
        marks = [self.next_mark + i for i in range(count)]
        self.next_mark += count
        self.pool.keys[0][0, slots, 0] = torch.tensor(marks)
        model.tokens += tokens
        model.marks += marks

    @rule(target=docs, model=docs)
    def fork(self, model: Model) -> Model:
        fork = Model(model.doc.fork(), list(model.tokens), list(model.marks), model.exact)
        self.models.append(fork)
        return fork

    @rule(
        target=docs,
        model=docs,
        low=st.integers(0, 300),
        high=st.integers(0, 300),
        shift=st.integers(-9, 9),
    )
    def show_a_stretch(self, model: Model, low: int, high: int, shift: int) -> Model:
        model.doc.close_tail()
        length = len(model.tokens)
        low, high = sorted((low % (length + 1), high % (length + 1)))
        spans, done = [], 0
        for span in model.doc.spans:
            a, b = max(low - done, 0), min(high - done, span.length)
            done += span.length
            if a < b:
                part = span.sub(a, b)
                spans.append(Span(part.segment, part.start, part.stop, part.shift + shift))
        doc = KVDoc(self.pool, ROOT, spans)
        self.models.append(Model(doc, model.tokens[low:high], model.marks[low:high], exact=False))
        return self.models[-1]

    @rule(model=docs, numerator=st.integers(0, 16))
    def truncate(self, model: Model, numerator: int) -> None:
        length = len(model.tokens) * numerator // 16
        model.doc.truncate(length)
        del model.tokens[length:], model.marks[length:]

    @rule(model=docs, numerator=st.integers(0, 16))
    def replace_beginning(self, model: Model, numerator: int) -> None:
        length = len(model.tokens) * numerator // 16
        fresh = Model(KVDoc(self.pool, ROOT, start_pos=model.doc.start_pos))
        if fresh.doc.blocks_needed(length) <= self.pool.free_blocks:
            slots = fresh.doc.append(model.tokens[:length])
            marks = [self.next_mark + i for i in range(length)]
            self.next_mark += length
            self.pool.keys[0][0, slots, 0] = torch.tensor(marks)
            fresh.doc.close_tail()
            model.doc.replace_beginning(fresh.doc.order)
            model.marks[:length] = marks
            assert model.doc.exact_length() >= length
        fresh.doc.close()

    @rule(model=docs)
    def close_tail(self, model: Model) -> None:
        before = model.doc.version
        model.doc.close_tail()
        assert model.doc.version is before

    @rule(model=docs)
    def seal(self, model: Model) -> None:
        before, room = model.doc.version, model.doc.blocks_needed(200)
        model.doc.seal()
        assert model.doc.version is before
        assert model.doc.blocks_needed(200) == room, "sealing gave room away"
        assert all(span.segment.closed for span in model.doc.spans)

    @rule(model=docs)
    def shrink(self, model: Model) -> None:
        model.doc.shrink()
        owned = -(-len(model.tokens) // PAGE_SLOTS) + 2 * len(model.doc.spans)
        assert model.doc.nbytes <= owned * self.pool.block_bytes

    @rule(target=docs, model=consumes(docs))
    def close(self, model: Model):
        self.models.remove(model)
        model.doc.close()
        model.doc.close()
        return multiple()

    @rule(model=docs)
    def photograph(self, model: Model) -> None:
        self.photographs.append(Photograph.take(model.doc.version))

    @invariant()
    def books_are_right(self) -> None:
        check_books(self.pool, [model.doc for model in self.models])

    @invariant()
    def every_document_reads_what_was_written_for_it(self) -> None:
        for model in self.models:
            assert model.doc.tokens == model.tokens
            assert model.doc.length == len(model.tokens)
            assert self.read(model.doc) == model.marks

    @invariant()
    def reported_bytes_are_those_of_the_blocks_held(self) -> None:
        for model in self.models:
            blocks = {
                block
                for start, stop in model.doc.owned_ranges()
                for block in range(start // PAGE_SLOTS, -(-stop // PAGE_SLOTS))
            }
            assert model.doc.nbytes == len(blocks) * self.pool.block_bytes

    @invariant()
    def plainly_written_documents_are_exact(self) -> None:
        for model in self.models:
            if model.exact:
                assert model.doc.exact_length() == len(model.tokens)
                assert model.doc.lineage() == ROOT.extend(model.tokens)

    @invariant()
    def old_versions_stay_as_they_were(self) -> None:
        for old in self.photographs:
            assert (old.version.number, old.version.length) == (old.number, old.length)
            assert Photograph.shape(old.version) == old.spans

    def teardown(self) -> None:
        for model in self.models:
            model.doc.close()
        assert self.pool.free_blocks == BLOCKS
        assert not self.pool.owners().any()


DocMachine.TestCase.settings = settings(stateful_step_count=30)
TestDocMachine = DocMachine.TestCase

texts = st.lists(st.integers(0, 4), min_size=1, max_size=150)


def document(*parts: list[int], start_pos: int = 0) -> KVDoc:
    """A document of these stretches, each in a segment of its own."""
    doc = KVDoc(small_pool(40, TINY), ROOT, start_pos=start_pos)
    for part in parts:
        doc.append(part)
        doc.close_tail()
    return doc


def show(doc: KVDoc, *spans: Span) -> KVDoc:
    return KVDoc(doc.pool, doc.root, spans, start_pos=doc.start_pos)


def moved(span: Span, shift: int) -> Span:
    return Span(span.segment, span.start, span.stop, span.shift + shift, span.hidden)


@given(first=texts, second=texts, third=texts)
def test_forked_and_appended_documents_are_exact(first, second, third):
    doc = document(first, second)
    fork = doc.fork()
    fork.append(third)
    doc.append(third[::-1])
    assert fork.exact_length() == fork.length
    assert doc.exact_length() == doc.length
    assert fork.lineage() == ROOT.extend(first + second + third)
    assert doc.lineage() == ROOT.extend(first + second + third[::-1])


@given(first=texts, second=texts, shift=st.integers(1, 50), behind=texts)
def test_what_moved_and_what_stands_behind_it_is_not_exact(first, second, shift, behind):
    doc = document(first, second)
    one, two = doc.spans
    grown = show(doc, one, moved(two, shift))
    grown.append(behind)
    taints = [taint for _, taint in grown.taints()]
    assert taints == [Taint.EXACT, Taint.MOVED, Taint.FOREIGN]
    assert grown.exact_length() == len(first)
    assert grown.lineage() != ROOT.extend(grown.tokens)
    assert grown.provenance().tokens == {
        "exact": len(first),
        "moved": len(second),
        "foreign": len(behind),
    }


@given(
    first=texts,
    second=st.lists(st.integers(0, 4), min_size=5, max_size=99),
    shifts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    holes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_lineage_tells_apart_what_was_done(first, second, shifts, holes):
    doc = document(first, second)
    one, two = doc.spans
    ways = []
    for shift, hole in zip(shifts, holes, strict=True):
        hidden = (SlotRange(two.start, two.start + hole),)
        ways.append(show(doc, one, Span(two.segment, two.start, two.stop, shift, hidden)))
    same = (shifts[0], holes[0]) == (shifts[1], holes[1])
    assert (ways[0].lineage() == ways[1].lineage()) == same


@given(first=texts, second=st.lists(st.integers(0, 4), min_size=3, max_size=99), behind=texts)
def test_what_is_pruned_and_what_stands_behind_it_is_not_exact(first, second, behind):
    doc = document(first, second)
    one, two = doc.spans
    cut = SlotRange(two.start + 1, two.start + 2)
    grown = show(doc, one, Span(two.segment, two.start, two.stop, 0, (cut,)))
    grown.append(behind)
    assert [taint for _, taint in grown.taints()] == [Taint.EXACT, Taint.PRUNED, Taint.FOREIGN]


@given(first=texts, second=texts, third=texts, behind=texts, shift=st.integers(0, 3))
def test_kv_that_was_computed_exactly_stays_exact_behind_what_was_not(
    first, second, third, behind, shift
):
    doc = document(first, second, third)
    one, two, three = doc.spans
    hidden = () if shift else (SlotRange(two.start, two.start + 1),)
    grown = show(doc, one, Span(two.segment, two.start, two.stop, shift, hidden), three)
    grown.append(behind)
    grown.close_tail()
    inexact = Taint.MOVED if shift else Taint.PRUNED
    expected = [Taint.EXACT, inexact, Taint.EXACT, Taint.FOREIGN]
    assert [taint for _, taint in grown.taints()] == expected
    assert grown.exact_length() == len(first)
    assert grown.lineage() != ROOT.extend(grown.tokens)
    healed = show(doc, one, two, three, grown.spans[-1])
    assert healed.exact_length() == len(first + second + third)


@given(first=texts, second=texts, other=texts)
def test_kv_that_attended_to_something_else_is_foreign(first, second, other):
    doc, elsewhere = document(first), document(other, second)
    foreign = elsewhere.spans[-1]
    shown = show(elsewhere, *elsewhere.spans[:-1], foreign)
    assert shown.exact_length() == shown.length
    own = KVDoc(elsewhere.pool, ROOT)
    own.append(first)
    own.close_tail()
    mixed = show(own, *own.spans, moved(foreign, len(first) - len(other)))
    expected = Taint.EXACT if first == other else Taint.FOREIGN
    expected |= Taint.MOVED if len(first) != len(other) else Taint.EXACT
    assert [taint for _, taint in mixed.taints()] == [Taint.EXACT, expected]
    assert doc.exact_length() == len(first)


@given(first=texts, middle=texts, last=texts, other=texts)
def test_the_same_text_again_at_the_same_place_makes_the_suffix_exact(first, middle, last, other):
    doc = document(first, middle, last)
    one, _, three = doc.spans
    edited = show(doc, one)
    edited.append(other)
    edited.close_tail()
    replaced = show(doc, *edited.spans, moved(three, len(other) - len(middle)))
    assert (replaced.exact_length() == replaced.length) == (other == middle)
    undone = show(doc, one)
    undone.append(middle)
    undone.close_tail()
    again = show(doc, *undone.spans, three)
    assert again.exact_length() == again.length
    assert again.lineage() == ROOT.extend(first + middle + last)
    assert edited.spans[-1].segment is not undone.spans[-1].segment


@given(first=texts, middle=texts, last=texts)
def test_kv_computed_behind_an_inexact_span_stays_inexact_where_that_span_is_gone(
    first, middle, last
):
    doc = document(first, middle)
    one, two = doc.spans
    inexact = show(doc, one, moved(two, 1))
    inexact.append(last)
    inexact.close_tail()
    tail = inexact.spans[-1]
    healed = show(doc, one, two, moved(tail, -1))
    assert healed.tokens == first + middle + last
    assert healed.exact_length() == len(first + middle)


@given(tokens=texts, fingerprint=st.binary(min_size=1, max_size=8))
def test_kv_of_another_model_is_foreign(tokens, fingerprint):
    doc = document(tokens)
    other = KVDoc(doc.pool, Lineage.root(b"another " + fingerprint), doc.spans)
    assert other.exact_length() == 0
    assert {taint for _, taint in other.taints()} == {Taint.FOREIGN}


@given(tokens=texts, start_pos=st.integers(1, 20))
def test_kv_that_stands_at_other_positions_is_not_exact(tokens, start_pos):
    doc = document(tokens, start_pos=start_pos)
    assert doc.exact_length() == len(tokens)
    elsewhere = KVDoc(doc.pool, ROOT, doc.spans)
    assert elsewhere.exact_length() == 0


@given(
    parts=st.lists(texts, min_size=1, max_size=4), low=st.integers(0, 99), high=st.integers(0, 99)
)
def test_a_part_of_a_span_shows_its_tokens_and_holes(parts, low, high):
    doc = document(*parts)
    span = doc.spans[-1]
    low, high = sorted((low % (span.length + 1), high % (span.length + 1)))
    holed = Span(span.segment, span.start, span.stop, 3, (SlotRange(span.start, span.start + 1),))
    part = holed.sub(low, high)
    assert part.tokens == span.tokens[low:high]
    assert part.shift == 3
    hidden = [slot for cut in part.hidden for slot in range(*cut)]
    assert hidden == ([span.start] if low == 0 < high else [])
    assert all(cut.length > 0 for cut in part.hidden)


@given(
    parts=st.lists(texts, min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    count=st.integers(1, 60),
    shift=st.integers(0, 4),
)
def test_an_overlay_covers_the_positions_it_takes_and_no_other(parts, seed, count, shift):
    source = document(*parts, [0])
    doc = show(source, *(moved(span, shift) for span in source.spans))
    length = doc.length
    pos = np.random.default_rng(seed).permutation(length + count)[:count].astype(np.int64)
    tokens = list(range(100, 100 + count))
    before = {shift + place: token for place, token in enumerate(doc.tokens)}
    slots = doc.overlay(tokens, pos)
    assert len(slots) == count
    shown = {}
    for span in doc.spans:
        where = span.segment.rotated_at(span.start, span.stop).tolist()
        for slot, at, token in zip(range(span.start, span.stop), where, span.tokens, strict=True):
            if not any(cut.start <= slot < cut.stop for cut in span.hidden):
                assert at + span.shift not in shown, "one position shown twice"
                shown[at + span.shift] = token
    assert shown == before | dict(zip(pos.tolist(), tokens, strict=True))
    assert doc.exact_length() < doc.length
    check_books(doc.pool, [source, doc])


def test_an_overlay_that_does_not_fit_leaves_the_document_unchanged():
    doc = KVDoc(small_pool(2, TINY), ROOT)
    doc.append([1] * 70)
    owners = doc.pool.owners().tolist()
    shown = doc.spans
    with pytest.raises(CapacityError):
        doc.overlay([2] * 100, np.arange(100))
    assert doc.spans == shown
    assert doc.pool.owners().tolist() == owners
    doc.close()
    assert doc.pool.free_blocks == 2


@given(length=st.integers(1, 63), others=st.integers(1, 3))
def test_an_overlay_takes_whatever_blocks_are_free(length, others):
    pool = small_pool(2 * others + 2, TINY)
    fillers = [KVDoc(pool, ROOT) for _ in range(2 * others + 1)]
    for filler in fillers:
        filler.append([0] * 64)
    doc = KVDoc(pool, ROOT)
    doc.append([3] * length)
    for filler in fillers[::2]:
        filler.close()
    count = 64 * (others + 1)
    slots = doc.overlay([4] * count, np.arange(count))
    assert len(set(slots.tolist())) == count
    check_books(pool, [doc, *fillers[1::2]])


def test_what_is_closed_takes_nothing_more():
    doc = document([1, 2, 3])
    doc.close()
    assert doc.pool.free_blocks == doc.pool.num_blocks
    with pytest.raises(AssertionError):
        doc.append([4])


def test_a_span_of_an_open_segment_cannot_be_shared():
    doc = KVDoc(small_pool(2, TINY), ROOT)
    doc.append([1, 2, 3])
    with pytest.raises(AssertionError):
        KVDoc(doc.pool, ROOT, doc.spans)


def test_truncating_beyond_the_end_is_refused():
    doc = document([1, 2, 3])
    for length in (-1, 4):
        with pytest.raises(AssertionError):
            doc.truncate(length)
    assert doc.tokens == [1, 2, 3]


def test_a_document_grows_in_one_run_where_it_can():
    doc = KVDoc(small_pool(8, TINY), ROOT)
    doc.expected_length = 130
    slots = np.concatenate([doc.append([0] * 10) for _ in range(13)])
    assert slots.tolist() == list(range(slots[0], slots[0] + 130))
    assert len(doc.spans) == 1
