"""A chunk holds what its key says, or cannot be made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from kvloom.errors import StoreError
from kvloom.store.key import hash_tokens
from tests.store.chunks import ROOT, assert_same, chunks, make_chunk, place_of


@given(chunks())
def test_a_copy_is_equal_and_shares_nothing(chunk):
    copy = chunk.copied()
    assert_same(copy, chunk)
    assert copy.nbytes == chunk.nbytes
    groups = zip(
        (*chunk.tensors.values(), *chunk.statistics.values()),
        (*copy.tensors.values(), *copy.statistics.values()),
        strict=True,
    )
    assert all(a.data_ptr() != b.data_ptr() for a, b in groups if a.numel())


def test_bytes_are_those_of_all_arrays():
    statistics = {"s": torch.zeros(5, dtype=torch.float64)}
    chunk = make_chunk([1, 2, 3], statistics=statistics)
    assert chunk.nbytes == 3 * 8 + 2 * (2 * 3 * 4 * 4) + 5 * 8


def test_contradictions_are_refused():
    other = place_of().key(hash_tokens([1]))
    elsewhere = place_of(ROOT.extend([7])).key(hash_tokens([1, 2]))
    with pytest.raises(StoreError, match="other tokens"):
        make_chunk([1, 2], key=other)
    with pytest.raises(StoreError, match="another context"):
        make_chunk([1, 2], key=elsewhere)
    with pytest.raises(StoreError, match="2 tokens, but 1 slots"):
        make_chunk([1, 2], num_slots=1)
    with pytest.raises(StoreError, match="no keys"):
        make_chunk([1], tensors={})
    with pytest.raises(StoreError, match="CPU"):
        make_chunk([1], tensors={"k": torch.zeros(1, device="meta")})
    with pytest.raises(StoreError, match="tokens must be"):
        make_chunk([])


def test_tokens_must_be_int64():
    chunk = make_chunk([1, 2])
    with pytest.raises(StoreError, match="int64"):
        type(chunk)(
            chunk.key, np.array([1.0, 2.0]), 0, "plain", "float32", 2, chunk.tensors, chunk.origin
        )
