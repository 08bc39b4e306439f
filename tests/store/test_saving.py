"""What leaves first: the laws of expected saving, and of choosing by it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvloom.store.key import hash_tokens
from kvloom.store.saving import choose_victims, expected_saving
from kvloom.store.tier import Entry
from tests.store.chunks import place_of

AMOUNTS = st.integers(0, 1000)
VALUES = st.fixed_dictionaries(
    {
        "hits": AMOUNTS,
        "idle_s": st.floats(0, 1e9),
        "num_tokens": st.integers(1, 10_000),
        "nbytes": st.integers(1, 2**40),
    }
)


@given(VALUES, st.integers(1, 1000))
def test_it_grows_with_use_and_tokens_and_falls_with_idleness_and_size(values, more):
    saving = expected_saving(**values)
    assert saving > 0
    assert expected_saving(**values | {"hits": values["hits"] + more}) > saving
    assert expected_saving(**values | {"num_tokens": values["num_tokens"] + more}) > saving
    assert expected_saving(**values | {"idle_s": (values["idle_s"] + 1) * (more + 1)}) < saving
    assert expected_saving(**values | {"nbytes": values["nbytes"] * (more + 1)}) < saving


def test_a_clock_that_was_set_back_does_no_harm():
    values = {"hits": 1, "num_tokens": 5, "nbytes": 100}
    assert expected_saving(idle_s=-1e9, **values) == expected_saving(idle_s=0, **values)


@st.composite
def catalogues(draw: st.DrawFn) -> list[Entry]:
    number = draw(st.integers(0, 8))
    return [
        Entry(
            place_of().key(hash_tokens([index])),
            draw(st.integers(1, 100)),
            draw(st.integers(1, 100)),
            ("ram",),
            draw(st.integers(0, 5)),
            0.0,
            draw(st.floats(0, 1000)),
            draw(st.booleans()),
        )
        for index in range(number)
    ]


@given(catalogues(), st.integers(-10, 500))
def test_victims_free_what_is_needed_and_no_more(entries, need):
    def saving(entry: Entry) -> float:
        return expected_saving(
            hits=entry.hits,
            idle_s=1000 - entry.last_used,
            num_tokens=entry.num_tokens,
            nbytes=entry.nbytes,
        )

    victims = choose_victims(entries, need, 1000.0)
    free = [entry for entry in entries if not entry.pinned]
    if victims is None:
        assert sum(entry.nbytes for entry in free) < need
        return
    assert all(victim in free for victim in victims)
    assert sum(victim.nbytes for victim in victims) >= need
    assert sum(victim.nbytes for victim in victims[:-1]) < max(need, 1)
    kept = [entry for entry in free if entry not in victims]
    assert not victims or all(saving(k) >= max(map(saving, victims)) for k in kept)
    shuffled = choose_victims(entries[::-1], need, 1000.0)
    assert shuffled == victims
    assert choose_victims([replace(e, pinned=True) for e in entries], 1, 1000.0) is None
