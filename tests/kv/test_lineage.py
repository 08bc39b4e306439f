"""Laws of lineage: it grows by tokens alone, and whatever else was done leaves a mark."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from kvloom.kv.lineage import BLOCK_TOKENS, Lineage

ROOT = Lineage.root(b"a model")
texts = st.lists(st.integers(0, 3), max_size=3 * BLOCK_TOKENS)
long_texts = st.integers(0, 4 * BLOCK_TOKENS).map(lambda n: [i * i % 7 for i in range(n)])
any_text = st.one_of(texts, long_texts)


@given(tokens=any_text, data=st.data())
def test_extending_in_parts_equals_extending_at_once(tokens, data):
    lineage = ROOT
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=5).map(sorted))
    for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        lineage = lineage.extend(tokens[a:b])
    assert lineage == ROOT.extend(tokens)


@given(a=any_text, b=any_text)
def test_only_equal_texts_have_equal_lineages(a, b):
    assert (ROOT.extend(a) == ROOT.extend(b)) == (a == b)


@given(tokens=long_texts, data=st.data())
def test_any_changed_token_changes_everything_behind_it(tokens, data):
    assume(tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = list(tokens)
    changed[place] += 1
    for length in range(place + 1, len(tokens) + 1, 17):
        assert ROOT.extend(tokens[:length]) != ROOT.extend(changed[:length])
    assert ROOT.extend(tokens[:place]) == ROOT.extend(changed[:place])


@given(tokens=any_text, data=st.data())
def test_order_matters(tokens, data):
    shuffled = data.draw(st.permutations(tokens))
    assert (ROOT.extend(tokens) == ROOT.extend(shuffled)) == (tokens == shuffled)


@given(tokens=any_text, fingerprint=st.binary(max_size=40))
def test_the_fingerprint_matters(tokens, fingerprint):
    assume(fingerprint != b"a model")
    assert Lineage.root(fingerprint).extend(tokens) != ROOT.extend(tokens)


@given(tokens=any_text, other=any_text, recipe=st.text(max_size=8))
def test_altered_is_never_what_plain_computing_gives(tokens, other, recipe):
    altered = ROOT.extend(tokens).alter(recipe, ROOT.extend(other))
    assert altered != ROOT.extend(tokens)
    assert altered != ROOT.extend(other)
    assert altered != ROOT.extend(tokens + other)
    assert altered.extend(other) != ROOT.extend(tokens + other)


@given(first=any_text, second=any_text, recipe=st.text(max_size=8), other=st.text(max_size=8))
def test_altered_depends_on_recipe_prefix_and_source(first, second, recipe, other):
    assume(recipe != other)
    prefix, source = ROOT.extend(first), ROOT.extend(second)
    altered = prefix.alter(recipe, source)
    assert altered == prefix.alter(recipe, source)
    assert altered != prefix.alter(other, source)
    assert altered != prefix.extend([0]).alter(recipe, source)
    assert altered != prefix.alter(recipe, source.extend([0]))
    assert (altered == source.alter(recipe, prefix)) == (first == second)


@given(tokens=st.lists(st.integers(0, 2**62), max_size=150))
def test_integers_of_numpy_and_python_are_the_same_tokens(tokens):
    as_array = ROOT.extend(np.array(tokens, dtype=np.int64))
    assert as_array == ROOT.extend(tokens)
    assert hash(as_array) == hash(ROOT.extend(tokens))


@given(tokens=any_text)
def test_only_the_rest_of_a_block_is_kept(tokens):
    assert ROOT.extend(tokens).pending == tuple(tokens[len(tokens) // 64 * 64 :])
