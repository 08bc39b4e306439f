"""Keys: every part tells chunks apart, and no part can be mistaken for another."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import StoreError
from kvloom.kv.lineage import Lineage
from kvloom.store.key import ChunkKey, context_of, hash_tenant, hash_tokens, is_name

KEYS = st.builds(
    ChunkKey,
    fingerprint=st.binary(max_size=4),
    recipe=st.text("ab", max_size=3),
    token_hash=st.lists(st.integers(0, 2), max_size=3).map(hash_tokens),
    context=st.none() | st.lists(st.integers(0, 2)).map(lambda x: context_of(Lineage(b"", (*x,)))),
    tenant=st.text("ab", max_size=2).map(hash_tenant),
)


@given(KEYS, KEYS)
def test_names_are_equal_exactly_where_keys_are(a, b):
    assert (a.name == b.name) == (a == b)
    assert (a.place.digest == b.place.digest) == (a.place == b.place)
    assert a.place.key(a.token_hash) == a


@given(st.binary(max_size=6), st.integers(0, 6))
def test_borders_between_parts_count(parts, cut):
    def key(fingerprint: bytes, recipe: bytes) -> ChunkKey:
        return ChunkKey(
            fingerprint, recipe.decode("latin-1"), hash_tokens([1]), None, hash_tenant("")
        )

    text = parts.hex().encode()
    others = {key(text[:i], text[i:]).name for i in range(len(text) + 1)}
    assert len(others) == len(text) + 1


@given(st.text(st.characters()), st.text(st.characters()))
def test_names_hold_nothing_that_was_given(recipe, tenant):
    key = ChunkKey(b"x", recipe, hash_tokens([1]), None, hash_tenant(tenant))
    assert re.fullmatch("[0-9a-f]{64}", key.name)
    assert is_name(key.name)


def test_contexts_tell_pending_tokens_apart():
    root = Lineage.root(b"x")
    contexts = [context_of(root.extend(range(n))) for n in range(150)]
    assert len(set(contexts)) == 150
    assert context_of(root.extend([1]).extend([2])) == context_of(root.extend([1, 2]))


def test_what_is_no_digest_is_refused():
    good = hash_tokens([1])
    with pytest.raises(StoreError, match="hash_tenant"):
        ChunkKey(b"", "", good, None, "alice")
    with pytest.raises(StoreError, match="context_of"):
        ChunkKey(b"", "", good, b"left", hash_tenant("alice"))
    with pytest.raises(StoreError, match="hash_tokens"):
        ChunkKey(b"", "", b"\1\2", None, hash_tenant("alice"))
    for text in ("", "../x", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        assert not is_name(text)
