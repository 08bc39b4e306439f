"""The tier in memory: within its budget at all times, and what saves most stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvloom.store.ram import RamStore
from tests.store.chunks import make_chunk

CHUNKS = [make_chunk(list(range(1, 2 + index)), width=1 + index % 3) for index in range(8)]
COMMANDS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "delete", "pin", "unpin"]), st.sampled_from(CHUNKS)),
    max_size=40,
)


@given(st.integers(0, 2000), COMMANDS)
def test_the_budget_holds_and_bytes_are_counted(budget, commands):
    store = RamStore(budget)
    pinned = set()
    for command, chunk in commands:
        match command:
            case "put":
                kept = store.put(chunk)
                assert kept == store.has(chunk.name)
            case "get":
                assert store.get(chunk.key) in (None, chunk)
            case "delete":
                store.delete(chunk.name)
                pinned.discard(chunk.name)
            case _:
                if store.pin(chunk.name, pinned=command == "pin"):
                    (pinned.add if command == "pin" else pinned.discard)(chunk.name)
        entries = store.entries()
        assert sum(entry.nbytes for entry in entries) == store.statistics().nbytes <= budget
        names = {entry.key.name for entry in entries}
        assert pinned <= names
        found = {c.key.name for c in store.continuations(CHUNKS[0].key.place)}
        assert found == names


def test_what_was_used_stays():
    now = [0.0]
    small = [make_chunk([index]) for index in range(3)]
    store = RamStore(2 * small[0].nbytes, clock=lambda: now[0])
    store.put(small[0])
    store.put(small[1])
    store.get(small[0].key)
    now[0] = 10.0
    assert store.put(small[2])
    assert store.has(small[0].name)
    assert not store.has(small[1].name)
    assert store.statistics().evicted == 1


def test_a_chunk_that_cannot_fit_throws_nothing_out():
    chunk, large = make_chunk([1]), make_chunk([1, 2, 3, 4])
    store = RamStore(chunk.nbytes)
    store.put(chunk)
    assert not store.put(large)
    assert store.has(chunk.name)
    store.pin(chunk.name)
    assert not store.put(make_chunk([2]))
    assert store.statistics().refused == 2
    store.close()
    assert store.statistics().nbytes == 0
