"""The prefix tree against a dictionary of all prefixes that were ever put into it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool
from kvloom.kv.span import Span
from kvloom.reuse.prefix import PrefixTree, common_prefix
from kvloom.store.key import hash_tenant
from tests.fake_model import FakeRunner

WHO = hash_tenant("whoever")
ROOT = Lineage.root(b"one model")
BOOK = np.random.default_rng(5).integers(1, 32, 300).tolist()
# Few different tokens, so that random texts share prefixes.
texts = st.lists(st.integers(1, 2), min_size=1, max_size=12)
long_texts = st.builds(lambda length, own: [*BOOK[:length], *own], st.integers(1, 200), texts)


def new_pool(blocks: int = 256) -> Pool:
    layers = FakeRunner().spec.layers
    return Pool(layers, blocks * Pool(layers, 2**16).block_bytes)


def document(pool: Pool, tokens: list[int], root: Lineage = ROOT) -> KVDoc:
    doc = KVDoc(pool, root)
    doc.append(tokens)
    return doc


def found(spans: list[Span]) -> list[int]:
    return [token for span in spans for token in span.tokens]


def check_books(tree: PrefixTree, *docs: KVDoc) -> None:
    owners = tree.pool.owners()
    ranges = [*tree.owned_ranges(), *(pair for doc in docs for pair in doc.owned_ranges())]
    for start, stop in ranges:
        owners[start // 64 : -(-stop // 64)] -= 1
    assert not owners.any()


@given(
    inserted=st.lists(st.one_of(texts, long_texts), max_size=12), asked=st.one_of(texts, long_texts)
)
def test_a_match_is_the_longest_prefix_of_anything_inserted(
    inserted: list[list[int]], asked: list[int]
) -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    known: set[tuple[int, ...]] = {()}
    for tokens in inserted:
        doc = document(pool, tokens)
        tree.insert(doc, WHO)
        doc.close()
        known |= {tuple(tokens[:length]) for length in range(len(tokens) + 1)}
        check_books(tree)
    longest = max(length for length in range(len(asked) + 1) if tuple(asked[:length]) in known)
    spans = tree.match(asked, WHO)
    assert found(spans) == asked[:longest]
    reused = KVDoc(pool, ROOT, spans)
    assert reused.exact_length() == longest
    assert tree.refused == 0
    check_books(tree, reused)
    leaves = set(map(tuple, inserted))
    leaves = {t for t in leaves if not any(o != t and o[: len(t)] == t for o in leaves)}
    assert tree.num_leaves == len(leaves)
    reused.close()
    tree.clear()
    assert tree.num_leaves == 0
    assert pool.free_blocks == pool.num_blocks


@given(first=long_texts, second=long_texts, again=st.booleans())
def test_what_is_known_is_kept_once(first: list[int], second: list[int], again: bool) -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    for tokens in (first, second, *([first] if again else [])):
        doc = KVDoc(pool, ROOT, tree.match(tokens, WHO))
        doc.append(tokens[doc.length :])
        tree.insert(doc, WHO)
        doc.close()
    shared = common_prefix(first, second)
    covered = sum(stop - start for start, stop in tree.owned_ranges())
    assert covered == len(first) + len(second) - shared


@given(
    inserted=st.lists(st.tuples(st.sampled_from("ab"), long_texts), max_size=8), asked=long_texts
)
def test_a_match_is_of_the_same_tenant(
    inserted: list[tuple[str, list[int]]], asked: list[int]
) -> None:
    pool = new_pool()
    tree, apart = PrefixTree(pool, ROOT), {who: PrefixTree(pool, ROOT) for who in "abc"}
    for who, tokens in inserted:
        doc = document(pool, tokens)
        tree.insert(doc, who)
        apart[who].insert(doc, who)
        doc.close()
    for who, alone in apart.items():
        assert found(tree.match(asked, who)) == found(alone.match(asked, who))
    assert tree.num_leaves == sum(alone.num_leaves for alone in apart.values())
    for alone in apart.values():
        alone.clear()
    check_books(tree)
    assert tree.evict(pool.num_blocks) == 0 or tree.num_leaves == 0
    assert pool.free_blocks == pool.num_blocks
    assert not tree._tops, "a tenant without prefixes costs something"


def test_tenants_give_way_by_use_alone() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    for who in "abc":
        doc = document(pool, BOOK[:128])
        tree.insert(doc, who)
        doc.close()
    tree.match(BOOK, "a")
    assert tree.evict(1) == 2
    assert [len(tree.match(BOOK, who)) for who in "abc"] == [1, 0, 1]
    tree.insert(KVDoc(pool, ROOT), "d")
    assert set(tree._tops) == {"a", "c"}


def test_the_tree_keeps_kv_that_its_document_lets_go() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    doc = document(pool, BOOK)
    tree.insert(doc, WHO)
    doc.close()
    assert pool.num_blocks - pool.free_blocks == 5
    assert found(tree.match([*BOOK, 1], WHO)) == BOOK


def test_a_document_goes_on_behind_what_it_published() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    doc = document(pool, BOOK[:70])
    tree.insert(doc, WHO)
    doc.append(BOOK[70:100])
    assert found(tree.match(BOOK, WHO)) == BOOK[:70]
    tree.insert(doc, WHO)
    assert found(tree.match(BOOK, WHO)) == BOOK[:100]
    check_books(tree, doc)


def test_least_recently_used_ends_go_first_and_free_what_was_asked() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    texts = [[token, *BOOK[:127]] for token in (1, 2, 3)]
    for tokens in texts:
        doc = document(pool, tokens)
        tree.insert(doc, WHO)
        doc.close()
    tree.match(texts[0], WHO)
    assert tree.evict(1) == 2
    assert [len(tree.match(tokens, WHO)) for tokens in texts] == [1, 0, 1]
    assert tree.evict(3) == 4
    assert tree.num_leaves == 0
    assert tree.evict(1) == 0
    check_books(tree)


def test_what_was_used_since_a_moment_or_is_shown_by_others_may_be_left() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    docs = [document(pool, [number, *BOOK[:100]]) for number in range(1, 5)]
    for doc in docs:
        tree.insert(doc, WHO)
    shown, *rest = docs
    for doc in rest:
        doc.close()
    moment = tree.now
    tree.match(docs[0].tokens[:1] + BOOK[:10], WHO)
    tree.match([2, *BOOK[:5]], WHO)
    assert tree.evict(100, moment) == 4
    assert [len(found(tree.match([n, *BOOK[:100]], WHO))) for n in range(1, 5)] == [101, 101, 0, 0]
    assert tree.evict(100, tree.now) == 2, "of the one that is shown nothing would come back"
    check_books(tree, shown)
    assert len(found(tree.match([1, *BOOK[:100]], WHO))) == 101


def test_a_shared_beginning_outlives_its_ends() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    for own in (1, 2):
        doc = document(pool, [*BOOK[:64], *[own] * 64])
        tree.insert(doc, WHO)
        doc.close()
    tree.match([*BOOK[:64], 1], WHO)
    assert tree.evict(1) >= 1
    assert found(tree.match([*BOOK[:64], 1, 1], WHO)) == [*BOOK[:64], 1, 1]
    assert found(tree.match([*BOOK[:64], 2], WHO)) == BOOK[:64]


def test_evicting_frees_nothing_that_somebody_still_shows() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    doc = document(pool, BOOK)
    tree.insert(doc, WHO)
    assert tree.evict(1) == 0
    assert doc.tokens == BOOK
    check_books(tree, doc)


def test_only_the_exact_beginning_of_a_document_is_remembered() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    source = document(pool, BOOK[:100])
    source.close_tail()
    (span,) = source.spans
    moved = Span(span.segment, 50, 100, shift=7)
    doc = KVDoc(pool, ROOT, [span.sub(0, 40), moved])
    tree.insert(doc, WHO)
    assert found(tree.match(doc.tokens, WHO)) == BOOK[:40]
    skipped = KVDoc(pool, ROOT, [span.sub(0, 40), span.sub(50, 100)])
    tree.insert(skipped, WHO)
    assert found(tree.match(skipped.tokens, WHO)) == BOOK[:40]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 300])
def test_spans_of_another_lineage_are_refused_and_counted(length: int) -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    foreign = document(pool, BOOK[:length], Lineage.root(b"other weights"))
    tree.insert(foreign, WHO)
    assert tree.match(BOOK, WHO) == []
    assert tree.refused == 1
    (node,) = tree._tops[WHO].children.values()
    assert node.last_used == 1, "a refusal is no use"


def test_a_foreign_span_behind_a_good_one_ends_the_match() -> None:
    pool = new_pool()
    tree = PrefixTree(pool, ROOT)
    good = document(pool, BOOK[:70])
    tree.insert(good, WHO)
    foreign = document(pool, BOOK[:150], Lineage.root(b"other weights"))
    foreign.close_tail()
    (span,) = foreign.spans
    (node,) = tree._tops[WHO].children.values()
    tree._insert_span(node, span.sub(70, 150), now=9)
    assert found(tree.match(BOOK, WHO)) == BOOK[:70]
    assert tree.refused == 1


@given(a=texts, b=texts, start=st.integers(0, 12))
def test_common_prefix_counts_equal_tokens(a: list[int], b: list[int], start: int) -> None:
    start = min(start, len(b))
    expected = 0
    for left, right in zip(a, b[start:], strict=False):
        if left != right:
            break
        expected += 1
    assert common_prefix(a, b, start) == expected
