"""Mentions: the tokens of an edited text that name what the edit changed.

Knows: that identifiers are runs of letters, digits and underscores, and that tokens spell bytes.
Does not know: languages, models, or what is done to the tokens.

A row that named something before it was renamed holds the old name in its values, however little
these changed at an early layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from kvloom.reuse.retokenize import TokenEdit

_WORD = re.compile(rb"[A-Za-z_\x80-\xff][0-9A-Za-z_\x80-\xff]*")


def mentions(
    tokens: Sequence[int], edit: TokenEdit, bytes_of: Callable[[int], bytes]
) -> np.ndarray:
    """Return which tokens of the new text spell part of an identifier that the edit changed.

    Changed are identifiers that stand in what the edit takes out and not in what it puts in, or
    the other way round, whole words even where only a part of one was replaced.

    Args:
        tokens: of the old text.
        edit: of them.
        bytes_of: the bytes of a token; none for control tokens.

    Returns:
        Bool, one per token of the new text.
    """
    old_ranges, new_ranges, growth = [], [], 0
    for part in edit.replaced:
        first = part.start + growth
        old_ranges.append((part.start, part.stop))
        new_ranges.append((first, first + len(part.tokens)))
        growth += len(part.tokens) - (part.stop - part.start)
    new = edit.applied(tokens)
    data, edges = _spelled(new, bytes_of)
    before = set(_touched(*_spelled(tokens, bytes_of), old_ranges))
    changed = before.symmetric_difference(_touched(data, edges, new_ranges))
    marked = np.zeros(len(new), dtype=bool)
    for found in _WORD.finditer(data):
        if found.group() in changed:
            first = int(np.searchsorted(edges, found.start(), side="right")) - 1
            marked[first : np.searchsorted(edges, found.end(), side="left")] = True
    return marked


def _spelled(tokens: Sequence[int], bytes_of: Callable[[int], bytes]) -> tuple[bytes, np.ndarray]:
    """Return the bytes of tokens, and where each token starts in them, and the end."""
    # A control token stands between words.
    pieces = [bytes_of(token) or b"\0" for token in tokens]
    edges = np.fromiter(accumulate(map(len, pieces), initial=0), dtype=np.int64)
    return b"".join(pieces), edges


def _touched(data: bytes, edges: np.ndarray, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the words that ranges of tokens lie in or hold, in part or whole."""
    cuts = [(int(edges[start]), int(edges[stop])) for start, stop in ranges]
    for found in _WORD.finditer(data):
        if any(found.start() < stop and start < found.end() for start, stop in cuts):
            yield found.group()
