"""The longest stored beginning of a prompt, against trying all ways."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.lineage import Lineage
from kvloom.store.key import hash_tenant, hash_tokens
from kvloom.store.prefix import common_length, find_prefix
from kvloom.store.ram import RamStore
from tests.store.chunks import ALICE, FINGERPRINT, ROOT, make_chunk, place_of

FEW = st.lists(st.integers(0, 1), min_size=1, max_size=6)


def longest(chains: list[list[list[int]]], prompt: list[int]) -> int:
    """Walk every stored chunk from every place that a full or common stretch leads to."""
    chunks = set()
    for chain in chains:
        before: list[int] = []
        for tokens in chain:
            chunks.add((tuple(before), tuple(tokens)))
            before = before + tokens
    reached, grown = {0}, True
    while grown:
        grown = False
        for before, tokens in chunks:
            start = len(before)
            if start in reached and list(before) == prompt[:start]:
                length = 0
                while (
                    length < len(tokens)
                    and start + length < len(prompt)
                    and tokens[length] == prompt[start + length]
                ):
                    length += 1
                if start + length not in reached:
                    reached.add(start + length)
                    grown = True
    return max(reached)


@given(st.lists(st.lists(FEW, min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 1)))
def test_nothing_longer_is_stored(chains, prompt):
    store = RamStore(2**20)
    for chain in chains:
        lineage = ROOT
        for tokens in chain:
            store.put(make_chunk(tokens, lineage))
            lineage = lineage.extend(tokens)
    before = store.statistics()
    steps = find_prefix(store, FINGERPRINT, prompt, ALICE)
    assert store.statistics() == before
    assert sum(step.num_tokens for step in steps) == longest(chains, prompt)
    lineage, done = ROOT, 0
    for step in steps:
        chunk = store.get(step.key)
        assert chunk is not None
        assert chunk.origin == lineage
        assert 0 < step.num_tokens <= len(chunk.tokens)
        used = chunk.tokens[: step.num_tokens].tolist()
        assert used == prompt[done : done + step.num_tokens]
        lineage, done = lineage.extend(used), done + step.num_tokens


def test_a_long_step_into_a_dead_end_is_not_taken():
    store = RamStore(2**20)
    store.put(make_chunk([1, 2, 3, 4]))
    store.put(make_chunk([1, 2]))
    store.put(make_chunk([3, 4, 5, 6], ROOT.extend([1, 2])))
    steps = find_prefix(store, FINGERPRINT, [1, 2, 3, 4, 5, 6, 7], ALICE)
    assert [step.num_tokens for step in steps] == [2, 4]


def test_other_models_tenants_and_recipes_are_not_found():
    store = RamStore(2**20)
    token_hash = hash_tokens([1, 2])
    store.put(make_chunk([1, 2], key=place_of(recipe="int4").key(token_hash)))
    store.put(make_chunk([1, 2], key=place_of(None).key(token_hash)))
    store.put(make_chunk([1, 2], ROOT.extend([1])))
    assert find_prefix(store, FINGERPRINT, [1, 2], ALICE) == []
    store.put(make_chunk([1, 2]))
    assert len(find_prefix(store, FINGERPRINT, [1, 2], ALICE)) == 1
    assert find_prefix(store, FINGERPRINT, [1, 2], hash_tenant("bob")) == []
    assert find_prefix(store, b"g" * 32, [1, 2], ALICE) == []
    assert Lineage.root(b"g" * 32) != ROOT


@given(FEW, FEW)
def test_common_length(a, b):
    import numpy as np

    length = common_length(np.array(a), np.array(b))
    assert a[:length] == b[:length]
    assert length in (len(a), len(b)) or a[length] != b[length]
