"""What is known of stretches from before is what judging them again would say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.exactness import Judged, judge
from kvloom.kv.lineage import Lineage
from kvloom.types import Taint
from tests.kv.edits import Edited, deeds
from tests.kv.worlds import PLAIN, ROOT, World, written


def judged_anew(doc: KVDoc) -> list[Judged]:
    return judge(doc.order, doc.root, doc.start_pos)


def check(doc: KVDoc) -> None:
    anew = judged_anew(doc)
    assert [(each.span, each.taint) for each in anew] == list(doc.taints())
    assert doc.lineage() == (anew[-1].actual if anew else doc.root)


@given(length=st.integers(1, 90), done=deeds)
def test_after_any_edits(length, done):
    made = Edited.new(0, length, 2)
    for name, numbers in done:
        made.do(name, numbers)
        check(made.doc)


@given(seed=st.integers(0, 2**16), made=written)
def test_after_any_writing_forking_and_cutting(seed, made):
    world = World(seed, PLAIN)
    for deed in made:
        deed.do(world)
        for doc in world.docs:
            check(doc)


@given(length=st.integers(1, 90), done=deeds, kept=st.integers(0, 99))
def test_what_another_document_is_known_by_holds_for_the_same_beginning_only(length, done, kept):
    made = Edited.new(0, length, 2, done=done)
    source = made.doc.fork()
    spans = [span for span in source.spans if not span.segment.placed][: kept % 9]
    same = KVDoc(source.pool, source.root, spans, start_pos=2)
    same.learn_from(source)
    check(same)
    for root, start_pos in ((Lineage.root(b"another"), 2), (ROOT, 3)):
        other = KVDoc(source.pool, root, spans, start_pos=start_pos)
        other.learn_from(source)
        check(other)


def test_an_exact_stretch_behind_a_moved_one_is_not_what_its_rows_attend_to() -> None:
    made = Edited.new(0, 60)
    made.do("delete", (10, 20, 0))
    first, moved = judged_anew(made.doc)
    assert (first.taint, first.stop_pos) == (Taint.EXACT, 10)
    assert first.actual == first.expected == ROOT.extend(made.doc.tokens[:10])
    assert Taint.MOVED in moved.taint
    assert moved.expected == ROOT.extend(made.doc.tokens)
    assert moved.actual != moved.expected
