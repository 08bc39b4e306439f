"""The pool: exact bytes, runs of blocks, reference counts, and who may continue a block."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvloom.errors import CapacityError
from kvloom.kv.pool import PAGE_SLOTS, Pool, Run, block_bytes, blocks_for
from kvloom.ops.codes import decode, encode
from tests.kv.worlds import MIXED, PLAIN, arena_bytes, layer_spec, littered, small_pool

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
seeds = st.integers(0, 2**16)


@given(slots=st.integers(0, 1000))
def test_blocks_for_slots(slots):
    assert (blocks_for(slots) - 1) * PAGE_SLOTS < slots <= blocks_for(slots) * PAGE_SLOTS


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(budget_blocks=st.integers(1, 5), rest=st.integers(0, 500))
def test_reported_bytes_are_the_tensors_bytes_and_within_the_budget(
    dtype, layout, budget_blocks, rest
):
    block = block_bytes(MIXED, dtype)
    budget = budget_blocks * block + rest % block
    pool = Pool(MIXED, budget, dtype, layout=layout)
    assert pool.nbytes == arena_bytes(pool)
    assert budget - block < pool.nbytes <= budget
    assert pool.num_pages == budget_blocks * sum(layer.kv_heads for layer in MIXED)
    assert (pool.used_bytes, pool.free_pages) == (0, pool.num_pages)


def test_shapes_follow_the_layers():
    pool = small_pool(3, MIXED)
    for layer, k, v in zip(MIXED, pool.keys, pool.values, strict=True):
        assert k.shape == (layer.kv_heads, 3 * PAGE_SLOTS, layer.k_dim)
        assert v.shape == (layer.kv_heads, 3 * PAGE_SLOTS, layer.v_dim)


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(count=st.integers(1, 90), edges=st.sets(st.integers(0, 90), max_size=4), seed=seeds)
def test_rows_come_back_however_they_were_cut(dtype, layout, count, edges, seed):
    layer = layer_spec(0, dims=(8, 6))
    pool = littered(
        Pool((layer,), 3 * block_bytes((layer,), dtype), dtype, layout=layout), torch.nan
    )
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, count, dim, generator=generator) for dim in (8, 6))
    cuts = sorted({0, count, *(edge for edge in edges if edge < count)})
    for a, b in pairwise(cuts):  # some as a slice, some out of order
        order = torch.randperm(b - a, generator=generator) + a
        slots, at = (slice(7 + a, 7 + b), slice(a, b)) if a % 2 else (7 + order, order)
        pool.write(0, slots, k[:, at], v[:, at])
    for found, rows in zip(pool.read(0, 7, 7 + count), (k, v), strict=True):
        assert found.dtype == pool.row_dtype
        expected = decode(encode(rows)) if dtype is torch.int8 else rows.to(dtype)
        assert torch.equal(found, expected)


def test_a_budget_below_one_block_is_refused_in_words():
    budget = block_bytes(PLAIN, torch.float32) - 1
    with pytest.raises(CapacityError, match=rf"{budget} bytes.*raise kv_memory"):
        Pool(PLAIN, budget)


def test_the_first_run_that_fits_is_taken_else_the_longest():
    pool = small_pool(8)
    pool.allocate(8)
    pool.release(0, 2 * PAGE_SLOTS)
    pool.release(4 * PAGE_SLOTS, 7 * PAGE_SLOTS)
    assert pool.allocate(1) == Run(0, 1)
    assert pool.allocate(3) == Run(4, 3)
    pool.release(4 * PAGE_SLOTS, 7 * PAGE_SLOTS)
    assert pool.allocate(4) == Run(4, 3)
    with pytest.raises(CapacityError, match="2 blocks of 64 tokens are needed and 1 of 8 are free"):
        pool.allocate(2)
    assert pool.free_blocks == 1


def test_the_rest_of_a_block_goes_to_the_first_who_continues():
    pool = small_pool(2)
    pool.allocate(1)
    assert pool.claim_rest(10) == 0, "its writer has not given it back"
    pool.give_rest_back(10)
    assert pool.claim_rest(9) == 0
    assert pool.claim_rest(10) == 54
    assert pool.owners().tolist() == [2, 0]
    assert pool.claim_rest(10) == 0
    assert pool.claim_rest(64) == 0, "a whole block has no rest"


def test_nobodys_blocks_cannot_be_retained_or_released():
    pool = small_pool(2)
    with pytest.raises(AssertionError):
        pool.retain(0, 1)
    with pytest.raises(AssertionError):
        pool.release(0, 1)
    assert pool.free_blocks == 2


class PoolMachine(RuleBasedStateMachine):
    """Blocks are taken, shared and given back; a list of owners is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = small_pool(7, (layer_spec(0, dims=(4, 4)),))
        self.held: list[tuple[int, int]] = []

    @rule(count=st.integers(1, 9))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        if count > free:
            with pytest.raises(CapacityError):
                self.pool.allocate(count)
            assert self.pool.free_blocks == free
            return
        run = self.pool.allocate(count)
        assert 1 <= run.num_blocks <= count
        self.held.append((run.first_block, run.first_block + run.num_blocks))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 50), count=st.integers(1, 4))
    def extend(self, number: int, count: int) -> None:
        _, stop = self.held[number % len(self.held)]
        free = self.owners()[stop : stop + count] == 0
        expected = len(free) if free.all() else int(np.argmin(free))
        assert self.pool.extend(stop, count) == expected
        if expected:
            self.held.append((stop, stop + expected))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 50), inside=st.integers(0, 31))
    def share(self, number: int, inside: int) -> None:
        start, stop = self.held[number % len(self.held)]
        self.pool.retain(start * PAGE_SLOTS + inside, stop * PAGE_SLOTS - inside)
        self.held.append((start, stop))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 50))
    def release(self, number: int) -> None:
        start, stop = self.held.pop(number % len(self.held))
        slots, free = (start * PAGE_SLOTS, stop * PAGE_SLOTS), self.pool.free_blocks
        frees = self.pool.would_free(*slots)
        self.pool.release(*slots)
        assert frees == (self.pool.free_blocks > free)

    def owners(self) -> np.ndarray:
        owners = np.zeros(self.pool.num_blocks, dtype=np.int64)
        for start, stop in self.held:
            owners[start:stop] += 1
        return owners

    @invariant()
    def counts_agree(self) -> None:
        owners = self.owners()
        assert self.pool.owners().tolist() == owners.tolist()
        assert self.pool.free_blocks == int((owners == 0).sum())
        assert self.pool.used_bytes == int((owners > 0).sum()) * self.pool.block_bytes

    def teardown(self) -> None:
        while self.held:
            self.release(0)
        assert self.pool.free_blocks == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
