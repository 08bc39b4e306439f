"""What every layer of a segment must do, whatever form its keys and values are kept in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.types import KV, LayerSegment, Partial, QueryInfo, Rope
from tests.contract.cases import LAYER_SEGMENTS, dense, plain_layer
from tests.oracles import HIDDEN, Attended, attend_rows, embedded, turned
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]
ROPES = [None, Rope((0.5, -0.125), 1.0, "half", 0), Rope((1.0,), 1.25, "interleaved", 1)]
every_form = pytest.mark.parametrize("make", LAYER_SEGMENTS.values(), ids=LAYER_SEGMENTS.keys())


@st.composite
def queries(draw: st.DrawFn) -> QueryInfo:
    pos = draw(st.lists(st.integers(0, 120), min_size=1, max_size=5))
    return QueryInfo(
        pos=torch.tensor(pos),
        scale=draw(st.sampled_from([0.3, 1.0])),
        shift=draw(st.integers(-40, 60)),
        rope=draw(st.sampled_from(ROPES)),
        window=draw(st.sampled_from([None, None, 1, 25])),
        softcap=draw(st.sampled_from([None, None, 2.0])),
    )


def raw_query(layer: LayerSegment, at: QueryInfo, seed: int = 3) -> np.ndarray:
    groups, _, dim = layer.dense().k.shape
    return np.random.default_rng(seed).standard_normal((2 * groups, len(at.pos), dim))


def rotated(q: np.ndarray, at: QueryInfo) -> Tensor:
    return torch.tensor(embedded(q, at.pos.numpy(), at.rope)).float()


def oracle(kv: KV, q: np.ndarray, at: QueryInfo) -> Attended:
    """Turn every key to where it stands now, and let every row see what its position may."""
    k = kv.k.double().numpy()
    if at.rope is not None:
        k = turned(k, float(at.shift), at.rope)
    distance = at.pos.numpy()[:, None] - (kv.pos.numpy() + at.shift)
    bias = np.zeros(len(kv.pos)) if kv.bias is None else kv.bias.double().numpy()
    hidden = distance < 0
    if at.window is not None:
        hidden |= distance >= at.window
    return attend_rows(
        embedded(q, at.pos.numpy(), at.rope),
        k,
        kv.v.double().numpy(),
        scale=at.scale,
        bias=np.where(hidden, 10 * HIDDEN, bias),
        softcap=at.softcap,
    )


def assert_near(found: Partial, expected: Partial | Attended) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), torch.as_tensor(y).double(), rtol=0, atol=NEAR)


@every_form
@given(kv=dense(), at=queries())
def test_partial_equals_attention_over_the_dense_form(make, kv, at):
    layer = make(kv)
    q = raw_query(layer, at)
    assert_near(layer.partial(rotated(q, at), at), oracle(layer.dense(), q, at))


@every_form
@given(kv=dense(), at=queries(), shift=st.integers(-500, 500))
def test_moving_segment_and_queries_together_changes_nothing(make, kv, at, shift):
    layer = make(kv)
    q = raw_query(layer, at)
    moved = QueryInfo(at.pos + shift, at.scale, at.shift + shift, at.rope, at.window, at.softcap)
    assert_near(layer.partial(rotated(q, moved), moved), layer.partial(rotated(q, at), at))


@every_form
@given(kv=dense(), at=queries())
def test_the_same_question_gets_the_same_bits(make, kv, at):
    layer = make(kv)
    q = rotated(raw_query(layer, at), at)
    before = q.clone()
    first, second = layer.partial(q, at), layer.partial(q, at)
    assert torch.equal(first.o, second.o)
    assert torch.equal(first.lse, second.lse)
    assert torch.equal(q, before), "the query was written to"


@every_form
@given(kv=dense())
def test_dense_keeps_shapes_positions_and_biases(make, kv):
    layer = make(kv)
    found = layer.dense()
    assert found.k.shape == kv.k.shape
    assert found.v.shape == kv.v.shape
    assert torch.equal(found.pos, kv.pos)
    assert found.base == kv.base
    if found.base is not None:
        assert found.pos.tolist() == list(range(found.base, found.base + len(found.pos)))
    assert (found.bias is None) == (kv.bias is None)
    if found.bias is not None:
        assert torch.equal(found.bias, kv.bias)
    assert len(range(*layer.heads.indices(1000))) == found.k.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@given(data=st.data())
def test_bytes_of_a_plain_layer_are_those_of_its_slots(dtype, data):
    kv = data.draw(dense())
    groups, slots, dim = kv.k.shape
    scales = 2 * 4 if dtype is torch.int8 else 0
    expected = groups * slots * ((dim + kv.v.shape[2]) * dtype.itemsize + scales)
    assert plain_layer(kv, dtype).nbytes == expected


@every_form
@given(kv=dense())
def test_a_layer_takes_some_bytes_and_no_more_than_dense(make, kv):
    layer = make(kv)
    extra = 8 * len(kv.pos) + 8 + 8 * kv.k.shape[0] * (kv.k.shape[2] + kv.v.shape[2])
    assert 0 < layer.nbytes <= kv.k.nbytes + kv.v.nbytes + extra


@every_form
@given(kv=dense())
def test_rows_that_see_nothing_are_blank(make, kv):
    layer = make(kv)
    at = QueryInfo(torch.tensor([-1, int(kv.pos.max())]), scale=1.0)
    o, lse = layer.partial(rotated(raw_query(layer, at), at), at)
    assert (o[:, 0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()
    sees = kv.bias is None or bool((kv.bias > HIDDEN).any())
    assert bool(lse[:, 1].isfinite().all()) == sees
