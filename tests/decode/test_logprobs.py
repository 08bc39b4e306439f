from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.decode.logprobs import BLOCK_ROWS, describe, token_logprobs
from kvloom.errors import KvloomError
from tests.tolerances import TOLERANCE

from .texts import LibraryText

CLOSE = {"rel": 0, "abs": TOLERANCE["float32"]["logprobs"]}


def random_logits(rows: int, size: int, seed: int = 2) -> torch.Tensor:
    return 4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(
    chosen=st.lists(st.integers(0, 99), min_size=1, max_size=2 * BLOCK_ROWS + 3),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_values_and_ranks_equal_log_softmax_and_a_sort(
    metaspace: LibraryText, chosen: list[int], seed: int, data: st.DataObject
) -> None:
    logits = random_logits(len(chosen), 100, seed)
    counts = data.draw(st.lists(st.integers(0, 20), min_size=len(chosen), max_size=len(chosen)))
    found = token_logprobs(logits, chosen, counts, metaspace)
    expected = logits.double().log_softmax(dim=-1).tolist()
    assert len(found) == len(chosen)
    for row, entries in enumerate(found):
        ranked = sorted(range(100), key=lambda token: -expected[row][token])
        top = ranked[: counts[row]]
        assert list(entries) == list(dict.fromkeys([chosen[row], *top]))
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(expected[row][token], **CLOSE)
            assert entry.rank == ranked.index(token) + 1


def test_equal_logits_share_their_best_rank(metaspace: LibraryText) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 2.0, 0.5]])
    (entries,) = token_logprobs(logits, [3], [4], metaspace)
    assert {token: entry.rank for token, entry in entries.items()} == {3: 3, 2: 1, 4: 1, 1: 3}


def test_more_alternatives_than_tokens_give_all_tokens(metaspace: LibraryText) -> None:
    (entries,) = token_logprobs(random_logits(1, 6), [0], [20], metaspace)
    assert sorted(entries) == list(range(6))


def test_impossible_tokens_have_minus_infinity(metaspace: LibraryText) -> None:
    logits = torch.tensor([[-math.inf, 1.0, 1.0]])
    (entries,) = token_logprobs(logits, [0], [0], metaspace)
    assert (entries[0].logprob, entries[0].rank) == (-math.inf, 3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_are_refused(metaspace: LibraryText, broken: float) -> None:
    logits = random_logits(3, 10)
    logits[1, 4] = broken
    with pytest.raises(KvloomError, match=str(broken)):
        token_logprobs(logits, [0, 1, 2], [1, 1, 1], metaspace)


def test_no_rows_give_no_entries(metaspace: LibraryText) -> None:
    assert token_logprobs(torch.empty(0, 5), [], [], metaspace) == []


def test_tokens_are_described_by_their_bytes(smollm: LibraryText) -> None:
    (word,) = smollm.encode(" the")
    half, *_ = smollm.encode("🙂")
    (end,) = smollm.eos_token_ids
    described = [describe(smollm, token, -1.0, 1) for token in (word, half, end)]
    assert [entry.decoded_token for entry in described] == [" the", None, "<|im_end|>"]
    assert [entry.token_bytes for entry in described] == [b" the", "🙂".encode()[:2], b""]
