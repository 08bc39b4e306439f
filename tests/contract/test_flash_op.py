"""What `kvloom.ops.partial` assumes of torch's private flash kernel, held against plain products.

Knows: the kernel's name, arguments and the layouts in which we call it.
Does not know: why we call it so.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvloom.ops.partial import FLASH_OP, MIN_LOGIT, attend_plain, flash_available
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.skipif(not flash_available(), reason="this torch has no such kernel")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.4
SHAPES = [
    # groups, query heads per group, rows, slots, dim
    (1, 1, 1, 1, 8),
    (2, 3, 5, 5, 16),
    (3, 3, 1, 700, 64),
    (1, 2, 70, 70, 40),
    (2, 1, 33, 1100, 8),
]


def flash(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.aten, FLASH_OP)(q, k, v, scale=SCALE, **options)


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    g, repeat, s, t, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(g * repeat, s, d, generator=generator).to(dtype)
    # Stretches of a larger arena, as the pool hands them out.
    arena = torch.randn(2, g, t + 100, d, generator=generator).to(dtype)
    return q, arena[0][:, 37 : 37 + t], arena[1][:, 37 : 37 + t]


def assert_equal(found: tuple[Tensor, Tensor], expected, dtype: torch.dtype) -> None:
    o, lse = found
    near = TOLERANCE[str(dtype).removeprefix("torch.")]["attention"]
    assert o.dtype == dtype
    assert lse.dtype == torch.float32, "the lse must keep fp32 for every dtype"
    torch.testing.assert_close(
        o.reshape(expected.o.shape).float(), expected.o.float(), rtol=0, atol=near
    )
    torch.testing.assert_close(lse.reshape(expected.lse.shape), expected.lse, rtol=0, atol=near)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch of KV heads, query heads of a group behind them; K and V repeated by stride 0."""
    groups, slots, dim = k.shape
    repeat = q.shape[0] // groups
    repeated = (x[:, None].expand(groups, repeat, slots, dim) for x in (k, v))
    return q.reshape(groups, repeat, q.shape[1], dim), *repeated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_is_normalised_and_lse_is_the_natural_logarithm(shape, dtype):
    q, k, v = inputs(shape, dtype)
    groups, dim = k.shape[0], k.shape[2]
    found = flash(q.reshape(1, groups, -1, dim), k[None], v[None])
    assert_equal(found, attend_plain(q, k, v, scale=SCALE), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_fp32_mask_is_added_for_every_dtype(shape, dtype):
    q, k, v = inputs(shape, dtype)
    rows, slots = q.shape[1], k.shape[1]
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(rows, slots, generator=generator)
    mask[torch.rand(rows, slots, generator=generator) < 0.4] = MIN_LOGIT
    mask[:, 0] = 1.9459
    mask[0, :-1] = MIN_LOGIT  # whole blocks of slots are hidden before the first that is seen
    mask[0, -1] = 0.5
    found = flash(*expanded(q, k, v), attn_mask=mask[None, None])
    assert_equal(found, attend_plain(q, k, v, scale=SCALE, mask=mask), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] == shape[3]])
def test_is_causal_lets_row_i_see_slots_up_to_i(shape, dtype):
    q, k, v = inputs(shape, dtype)
    found = flash(*expanded(q, k, v), is_causal=True)
    assert_equal(found, attend_plain(q, k, v, scale=SCALE, causal=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_that_sees_nothing_spoils_no_other_row(shape, dtype):
    q, k, v = inputs(shape, dtype)
    q = torch.cat([q, q], dim=1)
    mask = torch.zeros(q.shape[1], k.shape[1])
    mask[::2] = MIN_LOGIT
    o, lse = (
        x.reshape(q.shape[0], q.shape[1], *x.shape[3:])
        for x in flash(*expanded(q, k, v), attn_mask=mask[None, None])
    )
    expected = attend_plain(q, k, v, scale=SCALE, mask=mask)
    seen = type(expected)(expected.o[:, 1::2], expected.lse[:, 1::2])
    assert_equal((o[:, 1::2], lse[:, 1::2]), seen, dtype)


def test_values_outside_of_a_stretch_are_never_read():
    arena = torch.full((2, 1, 300, 8), torch.nan)
    arena[:, :, 64:128] = torch.randn(2, 1, 64, 8)
    q, k, v = torch.randn(1, 1, 3, 8), arena[0][:, 64:128], arena[1][:, 64:128]
    o, lse = flash(q, k[None], v[None])
    assert o.isfinite().all()
    assert lse.isfinite().all()
