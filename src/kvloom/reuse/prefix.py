"""The prefix tree: every exact prefix that was computed, found again token by token.

Knows: tokens, spans, whose they are, and when each was last used.
Does not know: requests or models; spans of another lineage never enter it.

Source: RadixAttention (Zheng et al., SGLang, 2024), section 3; deviation: nodes are spans of
shared segments, so that a split is two integers and no page alignment is lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool
from kvloom.kv.span import Span


@dataclass(slots=True, eq=False)
class _Node:
    """A stretch of tokens behind its parent's; owns its span's blocks."""

    span: Span | None
    parent: _Node | None
    tokens: list[int]
    last_used: int = 0
    children: dict[int, _Node] = field(default_factory=dict)


class PrefixTree:
    """Exact prefixes under one fingerprint, with a top of its own for every tenant.

    Tenants share room and nothing else: what was used least recently goes first, whosever it is.

    Attributes:
        root: lineage of the empty prefix; the tree answers only for spans that continue it.
        refused: spans that were found under the right tokens with another lineage.
    """

    def __init__(self, pool: Pool, root: Lineage) -> None:
        self.pool = pool
        self.root = root
        self.refused = 0
        self._tops: dict[str, _Node] = {}
        self._clock = count(1)

    def match(self, tokens: Sequence[int], tenant: str) -> list[Span]:
        """Return the spans of the longest prefix of these tokens that a tenant's requests computed.

        A span whose lineage is not that of a fresh prefill ends the match and is counted.
        """
        spans: list[Span] = []
        lineage, now = self.root, next(self._clock)
        node, done = self._tops.get(tenant), 0
        while node and done < len(tokens) and (child := node.children.get(tokens[done])):
            length = common_prefix(child.tokens, tokens, done)
            assert child.span is not None
            span = child.span.sub(0, length)
            if span.segment.lineage_at(span.start) != lineage:
                self.refused += 1
                break
            lineage = span.segment.lineage_at(span.stop)
            spans.append(span)
            child.last_used = now
            done += length
            node = child
            if length < len(child.tokens):
                break
        return spans

    def insert(self, doc: KVDoc, tenant: str) -> None:
        """Remember the exact prefix of a document for a tenant.

        What the document has written is closed first.
        """
        doc.seal()
        exact = doc.exact_length()
        if exact == 0:
            return
        now = next(self._clock)
        node = self._tops.setdefault(tenant, _Node(None, None, []))
        for span in doc.spans:
            if exact <= 0:
                break
            part = span.sub(0, min(span.length, exact))
            exact -= part.length
            node = self._insert_span(node, part, now)

    @property
    def now(self) -> int:
        """A moment behind all uses so far."""
        return next(self._clock)

    def evict(self, num_blocks: int, moment: int | None = None) -> int:
        """Forget least recently used ends of prefixes until blocks are free; return how many.

        Args:
            num_blocks: how many are wanted.
            moment: forget only what was not used since, and gives blocks back; None takes all.
        """
        before = self.pool.free_blocks
        leaves = [
            (leaf.last_used, id(leaf), leaf) for leaf in self._leaves() if self._goes(leaf, moment)
        ]
        heapq.heapify(leaves)
        while leaves and self.pool.free_blocks - before < num_blocks:
            _, _, leaf = heapq.heappop(leaves)
            assert leaf.span is not None
            assert leaf.parent is not None
            self.pool.release(*leaf.span.pool_slots)
            parent = leaf.parent
            del parent.children[leaf.tokens[0]]
            if not parent.children and parent.span is not None and self._goes(parent, moment):
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))
        self._tops = {tenant: top for tenant, top in self._tops.items() if top.children}
        return self.pool.free_blocks - before

    def clear(self) -> None:
        """Forget everything."""
        for node in self._nodes():
            assert node.span is not None
            self.pool.release(*node.span.pool_slots)
        self._tops.clear()

    @property
    def num_leaves(self) -> int:
        """Ends of known prefixes."""
        return sum(1 for _ in self._leaves())

    def owned_ranges(self) -> list[tuple[int, int]]:
        """Return the slot ranges whose blocks the tree owns once each, for integrity checks."""
        return [node.span.pool_slots for node in self._nodes() if node.span is not None]

    def _insert_span(self, node: _Node, span: Span, now: int) -> _Node:
        """Add the part of a span that is not known yet; return the node it ends in."""
        tokens, done = span.tokens, 0
        while done < len(tokens):
            child = node.children.get(tokens[done])
            if child is None:
                rest = span.sub(done, span.length)
                self.pool.retain(*rest.pool_slots)
                child = _Node(rest, node, tokens[done:], now)
                node.children[tokens[done]] = child
                return child
            length = common_prefix(child.tokens, tokens, done)
            if length < len(child.tokens):
                child = self._split(child, length)
            child.last_used = now
            done += length
            node = child
        return node

    def _goes(self, node: _Node, moment: int | None) -> bool:
        """Whether an end may be forgotten: always, or if it is old and nobody else shows it."""
        if moment is None:
            return True
        assert node.span is not None
        return node.last_used < moment and self.pool.would_free(*node.span.pool_slots)

    def _split(self, node: _Node, length: int) -> _Node:
        """Cut a node in two; return the first part."""
        span, parent = node.span, node.parent
        assert span is not None
        assert parent is not None
        first, second = span.sub(0, length), span.sub(length, span.length)
        self.pool.retain(*first.pool_slots)
        self.pool.retain(*second.pool_slots)
        self.pool.release(*span.pool_slots)
        head = _Node(first, parent, node.tokens[:length], node.last_used)
        parent.children[head.tokens[0]] = head
        node.span, node.parent, node.tokens = second, head, node.tokens[length:]
        head.children[node.tokens[0]] = node
        return head

    def _nodes(self) -> Iterator[_Node]:
        stack = [child for top in self._tops.values() for child in top.children.values()]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _leaves(self) -> Iterator[_Node]:
        return (node for node in self._nodes() if not node.children)


def common_prefix(a: Sequence[int], b: Sequence[int], b_start: int = 0) -> int:
    """Return how many tokens of `a` equal those of `b` from `b_start` on."""
    limit = min(len(a), len(b) - b_start)
    if list(a[:limit]) == list(b[b_start : b_start + limit]):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        same = list(a[low:middle]) == list(b[b_start + low : b_start + middle])
        low, high = (middle, high) if same else (low, middle)
    return low
