"""What every runner must do: the same numbers however rows are cut, packed, moved or watched.

The oracle is transformers where a document is one text, and the seam where spans have moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.errors import CapacityError
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool
from kvloom.types import Rows, StepOutput
from tests.conftest import loadable
from tests.kv.worlds import littered
from tests.model.lean.decoders import Side, family, native_side, torch_side
from tests.model.running import ROOT, assert_same, cached, plain_logits, rows_of, some_tokens
from tests.model.texts import Texts
from tests.tolerances import TOLERANCE

# Plain, a window beside full layers with norms of q and k, softcaps, interleaved and parallel.
NAMES = ["llama", "gemma3_text", "gemma2", "cohere"]
GARBAGE = 1e30
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8 KV"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `which` on every runner here; one about lean runners on those."""
    if "which" in metafunc.fixturenames:
        levels = [lib.level for lib in loadable(metafunc.config.getoption("--native-libraries"))]
        kinds = ["torch plain", "torch tiled", *(f"native {level}" for level in levels)]
        if "lean" not in metafunc.function.__name__:
            kinds.insert(0, "seam")
        metafunc.parametrize("which", kinds)


@pytest.fixture
def side(which: str, name: str, request: pytest.FixtureRequest) -> Side:
    return side_of(which, name, request.config)


def side_of(which: str, name: str, config: pytest.Config) -> Side:
    if which == "seam":
        return Side("seam", family(name)[1], "plain")
    if which.startswith("torch"):
        return torch_side(name, "tiled" if which.endswith("tiled") else "plain")
    libraries = loadable(config.getoption("--native-libraries"))
    (library,) = (library for library in libraries if which == f"native {library.level}")
    return native_side(name, library)


lengths = st.tuples(*[st.integers(1, 60)] * 3)
steps = st.lists(
    st.dictionaries(st.integers(0, 2), st.integers(1, 40), min_size=1, max_size=3), max_size=6
)


@pytest.mark.parametrize("name", NAMES)
def test_cuts_and_packing_change_nothing(side: Side, name: str) -> None:
    plain = family(name)[0]

    @settings(max_examples=4)
    @given(lengths, steps, st.integers(0, 99), st.data())
    def law(
        lengths: tuple[int, ...], steps: list[dict[int, int]], seed: int, data: st.DataObject
    ) -> None:
        texts = Texts(plain, side.runner, lengths, seed, littered(side.pool(), GARBAGE))
        for step in steps:
            texts.go_on(step)
            whole = {n: doc.length for n, doc in enumerate(texts.docs) if doc.length}
            if whole and data.draw(st.booleans()):
                n = data.draw(st.sampled_from(sorted(whole)))
                pos = st.lists(st.integers(0, whole[n] - 1), min_size=1, unique=True)
                texts.scatter({n: data.draw(pos)})
        texts.finish()
        texts.close()

    law()


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_equals_the_whole(side: Side, name: str) -> None:
    tokens = some_tokens(75)
    truth = plain_logits(family(name)[0], tokens)
    doc = KVDoc(littered(side.pool(), GARBAGE), ROOT)
    for place in range(len(tokens)):
        (found,) = side.runner.forward([rows_of(doc, tokens[place : place + 1])]).logits
        assert_same(found, truth[place : place + 1])


def check_long_texts(side: Side, name: str, dtype: torch.dtype) -> None:
    kind = KINDS[dtype]
    pool = littered(side.pool(30, dtype), GARBAGE)
    texts = Texts(family(name)[0], side.runner, (480, 300), seed=5, pool=pool, kind=kind)
    texts.go_on({0: 400, 1: 130})
    for _ in range(3):
        texts.go_on({1: 1, 0: 1})
    texts.scatter({0: [399, 3, 77, 250], 1: list(range(60, 128))})
    texts.finish()
    texts.close()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_long_texts(side: Side, name: str) -> None:
    check_long_texts(side, name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_long_texts_in_coarser_slots(side: Side, name: str, dtype: torch.dtype) -> None:
    check_long_texts(side, name, dtype)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_forks_share_what_they_have_in_common(side: Side, name: str) -> None:
    plain, pool, stem = family(name)[0], side.pool(), some_tokens(70)
    first = cached(side.runner, pool, stem)
    docs = [first, *(first.fork() for _ in range(4))]
    ends = [some_tokens(count, seed=count) for count in (9, 1, 30, 1, 1)]
    found = side.runner.forward([rows_of(d, e) for d, e in zip(docs, ends, strict=True)])
    for logits, end in zip(found.logits, ends, strict=True):
        assert_same(logits, plain_logits(plain, np.concatenate([stem, end]))[len(stem) :])


# Moved spans: the same documents are made on the seam and on the runner under test.


@dataclass(frozen=True)
class Plot:
    """How documents are made of one text: cut, moved, hidden and overlaid."""

    cut: int
    shifts: tuple[int, ...]
    hole: bool
    overlay: bool
    question: int

    def run(self, side: Side) -> StepOutput:
        """Make one document per shift, and run rows of all of them in one step."""
        runner, pool = side.runner, littered(side.pool(24), GARBAGE)
        text = some_tokens(150, seed=1)
        source = cached(runner, pool, text, chunk=41)
        source.close_tail()
        docs = [self.document(source, shift) for shift in self.shifts]
        rows: list[Rows] = []
        for number, doc in enumerate(docs):
            if self.overlay and number % 2:
                pos = np.array([9, 4, 100, 30], dtype=np.int64)
                rows.append(rows_of(doc, some_tokens(4, seed=number), pos, write="none"))
            count = 1 if number % 3 == 0 else self.question
            rows.append(rows_of(doc, some_tokens(count, seed=number + 9)))
        return runner.forward(rows)

    def document(self, source: KVDoc, shift: int) -> KVDoc:
        """Return the text with everything behind the cut moved, and a hole where one is wanted."""
        spans, end = [], 0
        for span in source.spans:
            for low, high, moved in ((0, self.cut, 0), (self.cut, source.length, shift)):
                start, stop = max(low, end) - end, min(high, end + span.length) - end
                if start < stop:
                    spans.append(replace(span.sub(start, stop), shift=moved))
            end += span.length
        if self.hole:
            spans[0] = spans[0].without(np.arange(5, 12))
        return KVDoc(source.pool, source.root, tuple(spans))


plots = st.builds(
    Plot,
    st.integers(1, 149),
    st.lists(st.sampled_from([0, 7, 7, 40, 300]), min_size=1, max_size=5).map(tuple),
    st.booleans(),
    st.booleans(),
    st.integers(1, 30),
)


@pytest.mark.parametrize("name", NAMES)
def test_moved_documents_read_on_lean_as_on_the_seam(side: Side, name: str) -> None:
    seam = Side("seam", family(name)[1], "plain")

    @settings(max_examples=3)
    @given(plots)
    def law(plot: Plot) -> None:
        expected = plot.run(seam).logits
        for found, wanted in zip(plot.run(side).logits, expected, strict=True):
            assert wanted is not None
            assert_same(found, wanted)

    law()


# Steps that are watched, end early, or fail.


@dataclass
class Witness:
    """An observer that keeps what it sees, and may object."""

    objects_at: int | None = None
    seen: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.seen.append((layer, q.clone(), k.clone(), v.clone()))
        if layer == self.objects_at:
            raise ValueError("seen enough")


def stored(pool: Pool, doc: KVDoc, layers: int) -> list[Tensor]:
    """Return copies of a document's K and V in the first layers."""
    found = []
    for start, stop in (span.pool_slots for span in doc.spans):
        for layer in range(layers):
            found += [part.clone() for part in pool.read(layer, start, stop)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_observers_see_what_the_seam_shows(side: Side, name: str) -> None:
    seam, tokens = family(name)[1], some_tokens(70)
    expected, found = Witness(), Witness()
    for runner, pool, witness in (
        (seam, Side("seam", seam, "plain").pool(), expected),
        (side.runner, side.pool(), found),
    ):
        docs = [cached(runner, pool, tokens[:40]), KVDoc(pool, ROOT)]
        rows = [rows_of(docs[0], tokens[40:]), rows_of(docs[1], tokens[:9])]
        runner.forward(rows, observe=witness)
    assert [layer for layer, *_ in found.seen] == list(range(len(seam.spec.layers)))
    for (_, *mine), (_, *theirs) in zip(found.seen, expected.seen, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x.shape == y.shape
            share = float((x - y).abs().max() / y.abs().max().clamp_min(1))
            assert share <= TOLERANCE["float32"]["observed rows"]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_watching_changes_no_bit(side: Side, name: str) -> None:
    tokens, layers = some_tokens(90), len(side.runner.spec.layers)
    results = []
    for observe in (None, Witness()):
        pool = side.pool()
        docs = [cached(side.runner, pool, tokens[:70]), KVDoc(pool, ROOT)]
        rows = [rows_of(docs[0], tokens[70:], logits="last"), rows_of(docs[1], tokens[:33])]
        logits = side.runner.forward(rows, observe=observe).logits
        results.append([*logits, *(x for doc in docs for x in stored(pool, doc, layers))])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("last", [0, 2, 3])
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_that_ends_early(side: Side, name: str, last: int, watched: bool) -> None:
    tokens = some_tokens(50)
    kept = []
    for stop in (None, last):
        pool = side.pool()
        doc = cached(side.runner, pool, tokens[:10])
        witness = Witness()
        output = side.runner.forward(
            [rows_of(doc, tokens[10:])], observe=witness if watched else None, stop_after=stop
        )
        kept.append(stored(pool, doc, last + 1))
    assert output.logits == (None,)
    assert doc.length == 50
    assert [layer for layer, *_ in witness.seen] == (list(range(last + 1)) if watched else [])
    for x, y in zip(*kept, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["llama"])
def test_logits_come_as_asked_for(side: Side, name: str) -> None:
    tokens = some_tokens(15)
    truth, pool = plain_logits(family(name)[0], tokens), side.pool()
    counts, modes = (15, 6, 9, 1), ("last", "none", "all", "last")
    rows = [
        rows_of(KVDoc(pool, ROOT), tokens[:count], logits=mode)
        for count, mode in zip(counts, modes, strict=True)
    ]
    first, second, third, fourth = side.runner.forward(rows).logits
    assert second is None
    assert first is not None
    assert first.dtype == torch.float32
    assert_same(first, truth[14:])
    assert_same(third, truth[:9])
    assert_same(fourth, truth[:1])
    alone = [rows_of(KVDoc(pool, ROOT), tokens[:4], logits="none")]
    assert side.runner.forward(alone).logits == (None,)


def states(docs: list[KVDoc], pool: Pool) -> list[Any]:
    for doc in docs:
        doc.shrink()  # room that was taken for more is no trace
    kept = [(doc.tokens, doc.end_pos, doc.exact_length(), doc.lineage()) for doc in docs]
    return [kept, pool.free_blocks]


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("write", ["append", "none"])
@pytest.mark.parametrize("reason", ["no room", "an objection"])
def test_a_step_that_fails_leaves_no_trace(side: Side, name: str, write: Any, reason: str) -> None:
    plain, tokens, pool = family(name)[0], some_tokens(100), side.pool(num_blocks=3)
    docs = [cached(side.runner, pool, tokens[:count]) for count in (70, 30)]
    docs.append(KVDoc(pool, ROOT))
    before = states(docs, pool)
    place = np.arange(69, -1, -1) if write == "none" else 70 + np.arange(30)
    short = reason == "no room"
    rows = [
        rows_of(docs[1], tokens[30:60]),
        rows_of(docs[0], tokens[: len(place)], place, write=write)
        if short or write == "append"
        else rows_of(docs[0], tokens[:5], np.arange(5)[::-1], write=write),
        *([rows_of(docs[2], tokens[:90])] if short else []),
    ]
    expected: Any = CapacityError if short else ValueError
    with pytest.raises(expected):
        side.runner.forward(rows, observe=None if short else Witness(objects_at=2))
    assert states(docs, pool) == before
    found = side.runner.forward([rows_of(docs[1], tokens[30:60])]).logits[0]
    assert_same(found, plain_logits(plain, tokens[:60])[30:])
    for doc in docs:
        doc.close()
    assert pool.free_blocks == pool.num_blocks


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_closed_documents_left_behind_is_not_read(side: Side, name: str) -> None:
    plain, pool = family(name)[0], side.pool(num_blocks=6)
    rng = np.random.default_rng(3)
    for seed in range(4):
        littered(pool, GARBAGE)
        texts = Texts(plain, side.runner, rng.integers(1, 120, 2).tolist(), seed, pool)
        texts.go_on({0: 30, 1: 64})
        texts.finish()
        texts.close()
