"""Laws of the fold: partials merge in any order to what one softmax over everything gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from kvloom.ops import partial as partial_module
from kvloom.ops.partial import (
    MIN_LOGIT,
    add_sink,
    attend,
    attend_plain,
    blind_rows,
    flash_available,
    merge,
    merge_into,
)
from kvloom.types import Partial
from tests.oracles import Attended, attend_rows
from tests.tolerances import TOLERANCE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Random attention inputs and where to cut the slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    cuts: list[int]
    scale: float
    softcap: float | None

    def pieces(self, attention=attend) -> list[Partial]:
        edges = [0, *self.cuts, self.k.shape[1]]
        return [
            attention(
                self.q,
                self.k[:, a:b],
                self.v[:, a:b],
                scale=self.scale,
                mask=self.mask[:, a:b],
                softcap=self.softcap,
            )
            for a, b in pairwise(edges)
        ]

    def oracle(self, sink: np.ndarray | None = None) -> Attended:
        return attend_rows(
            self.q.numpy(),
            self.k.numpy(),
            self.v.numpy(),
            scale=self.scale,
            bias=self.mask.numpy(),
            softcap=self.softcap,
            sink=sink,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shapes, any cuts; rows that see nothing of a piece, or nothing at all, are common."""
    g, repeat = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    s, t = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    d = draw(st.sampled_from([1, 4, 8, 20]))
    dv = draw(st.sampled_from([d, d, 6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    bits = draw(st.lists(st.integers(0, 2**t - 1), min_size=s, max_size=s))
    hidden = torch.tensor([[bool(row >> slot & 1) for slot in range(t)] for row in bits])
    bias = torch.randn(t, generator=generator) * draw(st.sampled_from([0.0, 1.0]))
    return Case(
        q=torch.randn(g * repeat, s, d, generator=generator),
        k=torch.randn(g, t, d, generator=generator),
        v=torch.randn(g, t, dv, generator=generator),
        mask=bias.expand(s, t).masked_fill(hidden, MIN_LOGIT),
        cuts=sorted(draw(st.sets(st.integers(1, t - 1), max_size=4))) if t > 1 else [],
        scale=d**-0.5,
        softcap=draw(st.sampled_from([None, None, 2.0])),
    )


def assert_near(partial: Partial, expected: Partial | Attended, dtype: str = "float32") -> None:
    near = TOLERANCE[dtype]["attention"]
    o, lse = torch.as_tensor(expected.o), torch.as_tensor(expected.lse)
    torch.testing.assert_close(partial.o.double(), o.double(), rtol=0, atol=near)
    torch.testing.assert_close(partial.lse.double(), lse.double(), rtol=0, atol=near)


@given(case=cases())
def test_merged_pieces_equal_one_softmax_over_everything(case):
    assert_near(merge(case.pieces()), case.oracle())


@given(case=cases())
def test_flash_and_plain_attention_agree_piece_by_piece(case):
    for fast, plain in zip(case.pieces(), case.pieces(attend_plain), strict=True):
        assert_near(fast, plain)


@given(case=cases(), order=st.randoms(use_true_random=False))
def test_merge_is_commutative(case, order):
    pieces = case.pieces()
    shuffled = list(pieces)
    order.shuffle(shuffled)
    assert_near(merge(shuffled), merge(pieces))


@given(case=cases(), cut=st.integers(1, 4))
def test_merge_is_associative(case, cut):
    pieces = case.pieces()
    cut = min(cut, len(pieces))
    groups = [group for group in (pieces[:cut], pieces[cut:]) if group]
    assert_near(merge([merge(group) for group in groups]), merge(pieces))


@given(case=cases())
def test_merge_into_equals_merge(case):
    pieces = case.pieces()
    nothing = Partial(torch.zeros_like(pieces[0].o), torch.full_like(pieces[0].lse, -torch.inf))
    assert_near(reduce(merge_into, pieces), merge(pieces))
    assert_near(reduce(merge_into, pieces, nothing), merge(pieces))
    assert_near(merge([nothing, *pieces, nothing]), merge(pieces))


@given(case=cases(), seed=st.integers(0, 2**16))
def test_a_sink_is_one_more_logit_without_a_value(case, seed):
    heads = case.q.shape[0]
    sink = torch.randn(heads, generator=torch.Generator().manual_seed(seed)) * 3
    o = add_sink(merge(case.pieces()), sink)
    expected = torch.as_tensor(case.oracle(sink.numpy()).o)
    near = TOLERANCE["float32"]["attention"]
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=near)


@given(case=cases())
def test_rows_that_see_nothing_give_zero_and_minus_infinity(case):
    blind = (case.mask <= MIN_LOGIT / 2).all(dim=-1)
    assert torch.equal(blind_rows(case.mask), blind)
    merged = merge(case.pieces())
    assert (merged.o[:, blind] == 0).all()
    assert (merged.lse[:, blind] == -torch.inf).all()
    assert merged.lse[:, ~blind].isfinite().all()
    assert merged.o.isfinite().all()


@given(case=cases())
def test_causal_equals_a_triangular_mask(case):
    slots = case.k.shape[1]
    q = case.q[:, :1].expand(-1, slots, -1) * torch.linspace(-1, 1, slots)[None, :, None]
    triangle = torch.full((slots, slots), MIN_LOGIT).triu(1)
    options = {"scale": case.scale, "softcap": case.softcap}
    causal = attend(q, case.k, case.v, causal=True, **options)
    assert_near(causal, attend(q, case.k, case.v, mask=triangle, **options))
    assert_near(causal, attend_plain(q, case.k, case.v, causal=True, **options))


@given(case=cases())
def test_no_mask_equals_a_mask_of_zeros(case):
    options = {"scale": case.scale, "softcap": case.softcap}
    masked = attend(case.q, case.k, case.v, mask=torch.zeros_like(case.mask), **options)
    assert_near(attend(case.q, case.k, case.v, **options), masked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(case=cases())
def test_half_precision_keeps_its_dtype_and_an_fp32_lse(dtype, case):
    half = Case(
        case.q.to(DTYPES[dtype]),
        case.k.to(DTYPES[dtype]),
        case.v.to(DTYPES[dtype]),
        case.mask,
        case.cuts,
        case.scale,
        case.softcap,
    )
    merged = merge(half.pieces())
    assert merged.o.dtype == DTYPES[dtype]
    assert merged.lse.dtype == torch.float32
    rounded = Case(
        half.q.float(),
        half.k.float(),
        half.v.float(),
        case.mask,
        case.cuts,
        case.scale,
        case.softcap,
    )
    assert_near(merged, rounded.oracle(), dtype)


@given(case=cases())
def test_without_the_flash_kernel_attention_is_the_same(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_module, "FLASH_OP", "_an_op_that_no_torch_has")
        assert not flash_available()
        without = case.pieces()
        slots = min(case.q.shape[1], case.k.shape[1])
        square = (case.q[:, :slots], case.k[:, :slots], case.v[:, :slots])
        causal = attend(*square, scale=case.scale, causal=True)
    for plain, fast in zip(without, case.pieces(), strict=True):
        assert_near(plain, fast)
    assert_near(causal, attend(*square, scale=case.scale, causal=True))


def test_inputs_are_left_as_they_were():
    q, k, v = torch.randn(2, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    mask = torch.zeros(3, 5).masked_fill(torch.tensor([True, False, True, False, True]), MIN_LOGIT)
    before = [x.clone() for x in (q, k, v, mask)]
    pieces = [attend(q, k, v, scale=0.5, mask=mask), attend_plain(q, k, v, scale=0.5, mask=mask)]
    kept = [Partial(piece.o.clone(), piece.lse.clone()) for piece in pieces]
    merge(pieces)
    merge_into(*pieces)
    add_sink(pieces[0], torch.zeros(2))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, mask), before, strict=True))
    assert all(torch.equal(a.o, b.o) for a, b in zip(pieces, kept, strict=True))
    assert all(torch.equal(a.lse, b.lse) for a, b in zip(pieces, kept, strict=True))


def test_wrong_shapes_are_caught_while_testing():
    with pytest.raises(TypeCheckError):
        attend(torch.randn(2, 3, 4), torch.randn(1, 5, 8), torch.randn(1, 5, 8), scale=1.0)
