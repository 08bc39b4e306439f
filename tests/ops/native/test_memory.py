from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.ops.native import memory
from kvloom.ops.native.memory import ALIGNMENT, ReusedMemory, aligned_bytes

SIZES = st.sampled_from([0, 1, 63, 64, 4095, 4096, 4097, 20_000, 100_000])


@given(st.lists(st.tuples(SIZES, st.booleans()), min_size=1, max_size=12))
def test_what_is_held_is_never_handed_out_again(takes: list[tuple[int, bool]]) -> None:
    reused = ReusedMemory()
    held = []
    for mark, (size, hold) in enumerate(takes):
        taken = reused.take(size)
        assert taken.shape == (size,)
        taken.fill_(mark)
        if hold:
            # A view is enough to hold it: engines keep rows of logits.
            held.append((mark, taken[size // 2 :].view(torch.int8)))
        del taken
    assert all(bool((rest == mark).all()) for mark, rest in held)


def test_pages_are_used_again_once_they_are_let_go() -> None:
    reused = ReusedMemory()
    first = reused.take(10_000)
    place = first.data_ptr()
    del first
    assert reused.take(9_000).data_ptr() == place
    assert reused.take(10_000).data_ptr() == place


def test_large_pieces_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", 8_000)
    reused = ReusedMemory()
    small = reused.take(8_000)
    large = reused.take(8_001)
    large.fill_(1)
    small.fill_(2)
    assert bool((large == 1).all())
    place = small.data_ptr()
    del small
    assert reused.take(8_000).data_ptr() == place


@pytest.mark.parametrize("count", [0, 1, 64, 100_000])
def test_streamed_memory_is_aligned(count: int) -> None:
    assert aligned_bytes(count).data_ptr() % ALIGNMENT == 0
    assert ReusedMemory().take(count).data_ptr() % ALIGNMENT == 0
