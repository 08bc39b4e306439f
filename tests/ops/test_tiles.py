"""Laws of tiles: what is put into a slot is read back from it, and no other slot changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.ops.tiles import TILE, put_keys, put_values, untile_keys, untile_values
from tests.ops.matrices import seeds

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
ORDERS = [(put_keys, untile_keys), (put_values, untile_values)]


@st.composite
def slots(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """Some slots, in any order, of an arena of one or more tiles."""
    size = TILE * draw(st.integers(1, 3))
    chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    return size, torch.tensor(chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("put", "untile"), ORDERS, ids=["keys", "values"])
@given(chosen=slots(), g=st.integers(1, 3), d=st.sampled_from([2, 16, 20]), seed=seeds)
def test_rows_come_back_from_their_slots(put, untile, dtype, chosen, g, d, seed):
    size, at = chosen
    generator = torch.Generator().manual_seed(seed)
    plain = (40 * torch.randn(g, size, d, generator=generator)).to(dtype)
    arena = torch.empty_like(plain)
    put(arena, torch.arange(size), plain)
    assert torch.equal(untile(arena), plain)
    assert untile(arena).stride(-1) == 1, "attention reads dimensions side by side"
    rows = 40 * torch.randn(g, len(at), d, generator=generator)
    put(arena, at, rows)
    plain[:, at] = rows.to(dtype)
    assert torch.equal(untile(arena), plain)


def test_the_order_is_the_one_that_is_described():
    plain = torch.arange(TILE * 4.0).reshape(1, TILE, 4)
    keys, values = torch.empty_like(plain), torch.empty_like(plain)
    put_keys(keys, torch.arange(TILE), plain)
    put_values(values, torch.arange(TILE), plain)
    assert torch.equal(keys.view(4, TILE), plain[0].T)
    assert torch.equal(values, plain)
    for dtype in (torch.bfloat16, torch.int8):
        pairs = plain.sub(100).to(dtype)
        keys, values = torch.empty_like(pairs), torch.empty_like(pairs)
        put_keys(keys, torch.arange(TILE), pairs)
        put_values(values, torch.arange(TILE), pairs)
        assert torch.equal(keys.view(2, TILE, 2)[1, 5], pairs[0, 5, 2:])
        assert torch.equal(values.view(TILE // 2, 4, 2)[7, 3], pairs[0, 14:16, 3])
