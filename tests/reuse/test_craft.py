"""Cache-Craft's formulas: the sheet's examples, bounds, and a slower obvious Kendall distance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.reuse.craft import (
    ChunkStatistics,
    Context,
    best_variant,
    context_impact,
    fix_overhead,
    order_distance,
    prefix_overlap,
    rows_to_fix,
    unseen_share,
)
from kvloom.reuse.planner import LEAST_SHARE


def context(names: str, length: int = 10) -> Context:
    return Context(tuple(names), (length,) * len(names))


@st.composite
def chunks(draw: st.DrawFn, names: str | None = None) -> ChunkStatistics:
    """Attention sums as rows that sum to one would give them."""
    behind = names if names is not None else "".join(draw(st.permutations("ABCDE")))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    layers, rows, parts = 3, draw(st.integers(1, 30)), len(behind)
    mass = generator.dirichlet(np.ones(parts + 2), (layers, rows)).astype(np.float32)
    return ChunkStatistics(
        behind=context(behind, draw(st.integers(1, 40))),
        inter=mass[..., :parts].sum(axis=1),
        intra=mass[..., parts].sum(axis=1),
        row_inter=mass[..., :parts].sum(axis=2).mean(axis=0),
    )


orders = st.lists(st.sampled_from("ABCDEFG"), max_size=7, unique=True).map("".join)


def test_kendall_example_of_the_sheet() -> None:
    assert order_distance(context("ABC"), context("CAB")) == pytest.approx(2 / 3)


@given(old=orders, now=orders)
def test_order_distance_counts_bubbles(old: str, now: str) -> None:
    common = [name for name in old if name in now]
    wanted = [name for name in now if name in old]
    swaps, line = 0, list(common)
    for place, name in enumerate(wanted):  # a selection sort by neighbouring swaps
        found = line.index(name)
        line.insert(place, line.pop(found))
        swaps += found - place
    pairs = math.comb(len(common), 2)
    assert order_distance(context(old), context(now)) == (swaps / pairs if pairs else 0.0)


@given(chunk=chunks())
def test_the_same_prefix_needs_no_fix(chunk: ChunkStatistics) -> None:
    assert prefix_overlap(chunk, chunk.behind) == pytest.approx(1.0)
    assert fix_overhead(chunk, chunk.behind) == pytest.approx(0.0)


@given(chunk=chunks(), alpha=st.floats(0, 1))
def test_a_reversed_prefix_needs_the_whole_impact(chunk: ChunkStatistics, alpha: float) -> None:
    now = Context(chunk.behind.names[::-1], chunk.behind.lengths[::-1])
    assert order_distance(chunk.behind, now) == 1.0
    expected = alpha * context_impact(chunk)
    assert fix_overhead(chunk, now, alpha=alpha) == pytest.approx(expected)


@given(chunk=chunks())
def test_a_disjoint_prefix_keeps_nothing(chunk: ChunkStatistics) -> None:
    assert prefix_overlap(chunk, context("XYZ")) == 0.0
    assert fix_overhead(chunk, context("XYZ"), alpha=1.0) == pytest.approx(context_impact(chunk))


@given(chunk=chunks("ABC"), kept=st.sampled_from("ABC"))
def test_overlap_is_weighted_by_attention(chunk: ChunkStatistics, kept: str) -> None:
    sums = chunk.inter.sum(axis=0)
    share = sums["ABC".index(kept)] / sums.sum()
    assert prefix_overlap(chunk, context(kept)) == pytest.approx(float(share), rel=1e-5)


@given(chunk=chunks(), now=orders, alpha=st.floats(0, 5), floor=st.floats(0, 1))
def test_bounds(chunk: ChunkStatistics, now: str, alpha: float, floor: float) -> None:
    overhead = fix_overhead(chunk, context(now), alpha=alpha, floor=floor)
    assert 0 <= overhead <= 1
    assert 0.5 <= context_impact(chunk) <= 1
    assert overhead >= fix_overhead(chunk, context(now), alpha=alpha, floor=0.0)
    rows = rows_to_fix(chunk, overhead)
    assert len(rows) == math.ceil(overhead * chunk.length)
    assert list(rows) == sorted(set(rows))
    left = set(range(chunk.length)) - set(rows)
    if rows and left:
        assert min(chunk.row_inter[list(rows)]) >= max(chunk.row_inter[list(left)])


def test_a_chunk_cached_alone_is_not_taken_for_fixed() -> None:
    alone = ChunkStatistics(Context(), np.zeros((2, 0)), np.full(2, 7.0), np.zeros(8))
    assert fix_overhead(alone, Context()) == 0.0
    assert fix_overhead(alone, context("AB"), floor=0.0) == 0.0  # the paper's formula
    assert fix_overhead(alone, context("AB"), alpha=1.0) == 0.5
    assert fix_overhead(alone, context("AB")) == LEAST_SHARE
    assert context_impact(alone) == 0.5


def test_gained_context_counts_by_its_length() -> None:
    now = Context(("A", "B"), (30, 10))
    assert unseen_share(context("A"), now) == 0.25
    assert unseen_share(context("AB"), context("BA")) == 0.0


def test_a_text_that_occurs_twice_is_two_chunks() -> None:
    assert unseen_share(context("AB"), context("ABA")) == pytest.approx(1 / 3)
    assert order_distance(context("AAB"), context("ABA")) == pytest.approx(1 / 3)


@given(first=chunks("ABC"), second=chunks("CBA"), third=chunks("XYZ"))
def test_the_variant_with_the_right_past_is_taken(first, second, third) -> None:
    assert best_variant([third, first, second], context("ABC")) == (1, pytest.approx(0.0))
    assert best_variant([third, first, second], context("CBA")) == (2, pytest.approx(0.0))
    assert best_variant([first, first], context("ABC"))[0] == 0
