"""Laws of coded rows: half a step of error, each row by itself, and what is broken stays broken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.ops.codes import LEAST, Coded, decode, encode
from tests.ops.matrices import KINDS, rows_of_kinds, seeds

EPSILON = torch.finfo(torch.float32).eps
kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)
widths = st.sampled_from([1, 2, 15, 16, 24, 64, 256])


@given(kinds=kinds, width=widths, seed=seeds)
def test_a_value_errs_by_half_a_step(kinds, width, seed):
    rows = rows_of_kinds(kinds, width, seed)[None]
    coded = encode(rows)
    assert coded.codes.dtype == torch.int8
    assert coded.scales.dtype == torch.float32
    most = rows.double().abs().amax(-1)
    steps = coded.scales.double()
    assert ((steps == 0) == (most < LEAST)).all()
    error = (coded.codes.double() * steps[..., None] - rows.double()).abs()
    bound = steps[..., None] / 2 + (steps[..., None] == 0) * LEAST + rows.abs() * EPSILON
    assert (error <= bound).all()
    assert torch.equal(decode(coded), coded.codes.float() * coded.scales[..., None])


@given(kinds=kinds, width=widths, seed=seeds)
def test_the_largest_magnitude_becomes_127(kinds, width, seed):
    coded = encode(rows_of_kinds(kinds, width, seed)[None])
    most = coded.codes.int().abs().amax(-1)
    assert torch.equal(most, torch.where(coded.scales > 0, 127, 0).int())


@given(kinds=kinds, width=widths, seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.half]))
def test_a_row_depends_on_nothing_but_itself(kinds, width, seed, dtype):
    rows = rows_of_kinds(kinds, width, seed, huge=1e4)[None].to(dtype)
    together = encode(rows)
    for place in range(rows.shape[1]):
        alone = encode(rows[:, place : place + 1])
        assert torch.equal(alone.codes[:, 0], together.codes[:, place])
        assert torch.equal(alone.scales[:, 0], together.scales[:, place])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_finite_number_comes_back_as_nan(broken):
    rows = torch.ones(1, 2, 4)
    rows[0, 0, 2] = broken
    found = decode(encode(rows))
    assert found[0, 0].isnan().all()
    assert torch.equal(found[0, 1], rows[0, 1])


def test_no_rows_are_no_codes():
    coded = encode(torch.empty(2, 0, 8))
    assert isinstance(coded, Coded)
    assert decode(coded).shape == (2, 0, 8)
