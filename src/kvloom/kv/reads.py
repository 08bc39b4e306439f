"""The read plan: what the rows of a step read, cut into units of work for a compiled executor.

Knows: documents, packed rows, and how work is cut so that two threads share it evenly.
Does not know: queries, layers or how a unit is computed.

A unit of work is an item: a few rows that read the same pieces. A row whose pieces are spread over
several items gets a partial result from each, and the plan says which ones are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvloom.kv.doc import KVDoc
from kvloom.kv.gather import tiles_of
from kvloom.kv.pool import PAGE_SLOTS
from kvloom.kv.views import Reading, RowRange, View, join, read, share, views_of

FEW_ROWS = 8
"""Items of at most so many rows are bound by memory, and cut along the slots."""
CHUNK_SLOTS = 256
"""Slots of a cut item of few rows."""
TALL_CHUNK_SLOTS = 512
"""Slots of a cut item of many rows."""
ENOUGH_ITEMS = 8
"""With so many items there is work enough for all threads, and nothing is cut along the slots."""


@dataclass(frozen=True, slots=True)
class ReadItem:
    """Rows that read the same pieces.

    Attributes:
        rows: packed rows, int32.
        views: what they read.
        partial: first row of partial results; -1 if the item's result is final.
    """

    rows: np.ndarray
    views: tuple[View, ...]
    partial: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What the rows of a step read under one window.

    Attributes:
        items: units of work.
        num_partials: rows of partial results.
        merge_offsets: int32 (rows + 1,), where each packed row's partials start.
        merge_partials: int32, rows of partial results by packed row.
        by_tiles: there were so few items that they were cut between tiles, or may be.
    """

    items: tuple[ReadItem, ...]
    num_partials: int
    merge_offsets: np.ndarray
    merge_partials: np.ndarray
    by_tiles: bool


def plan_reads(
    docs: Sequence[KVDoc], ranges: Sequence[RowRange], window: int | None, rows_per_item: int
) -> ReadPlan:
    """Plan what the rows of a step read.

    Args:
        docs: one document per entry; its spans already show the rows about to be written.
        ranges: the rows of each document.
        window: positions a row sees, itself included; None sees all.
        rows_per_item: rows that an executor takes at once.
    """
    groups = _groups(docs, ranges, window)
    items: list[tuple[np.ndarray, tuple[View, ...]]] = []
    for rows, views in groups:
        packed = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in rows])
        items += [
            (packed[start : start + rows_per_item], views)
            for start in range(0, len(packed), rows_per_item)
        ]
    by_tiles = len(items) < ENOUGH_ITEMS
    if by_tiles:
        items = [part for item in items for part in _cut(*item)]
    return _numbered(items, ranges[-1].stop, by_tiles)


def _groups(
    docs: Sequence[KVDoc], ranges: Sequence[RowRange], window: int | None
) -> list[tuple[tuple[tuple[int, int], ...], tuple[View, ...]]]:
    """Return what is read, by the rows that read it."""
    if len(docs) == 1:
        views = [_clipped(view, ranges[0], window) for view in views_of(docs[0])]
        seen = tuple(view for view in views if view is not None)
        return [(((ranges[0].start, ranges[0].stop),), seen)] if seen else []
    readings: list[Reading] = []
    for doc, rows in zip(docs, ranges, strict=True):
        for view in views_of(doc):
            readings += read(view, rows, window)
    groups: dict[tuple[tuple[int, int], ...], list[View]] = {}
    for reading in share(readings):
        groups.setdefault(reading.rows, []).append(reading.view)
    return [(rows, _joined(views)) for rows, views in groups.items()]


def _clipped(view: View, rows: RowRange, window: int | None) -> View | None:
    """Return the part of a view that any row may see."""
    if view.arrays is not None:
        return view
    oldest = view.first_pos if window is None else rows.low - window + 1
    return view.between(oldest, rows.high + 1)


def _joined(views: list[View]) -> tuple[View, ...]:
    """Join neighbouring slots at neighbouring positions, so that a tile is read once."""
    if len(views) == 1:
        return (views[0],)
    joined: list[View] = []
    for view in sorted(views, key=lambda view: view.start):
        join(joined, view)
    return tuple(joined)


def _cut(rows: np.ndarray, views: tuple[View, ...]) -> list[tuple[np.ndarray, tuple[View, ...]]]:
    """Cut an item along its slots, between tiles."""
    chunk = (CHUNK_SLOTS if len(rows) <= FEW_ROWS else TALL_CHUNK_SLOTS) // PAGE_SLOTS
    tiles = sum(tiles_of(view.start, view.stop) for view in views)
    while tiles > ENOUGH_ITEMS * chunk:  # doubled, so that cuts seldom move while a text grows
        chunk *= 2
    if tiles <= chunk + 1:
        return [(rows, views)]
    parts: list[tuple[View, ...]] = []
    pending: list[View] = []
    room = chunk
    for view in views:
        start = view.start
        while start < view.stop:
            stop = min(view.stop, (start // PAGE_SLOTS + room) * PAGE_SLOTS)
            first_pos = view.first_pos + start - view.start
            pending.append(replace(view, start=start, stop=stop, first_pos=first_pos))
            room -= tiles_of(start, stop)
            start = stop
            if room == 0:
                parts.append(tuple(pending))
                pending, room = [], chunk
    if pending:
        parts.append(tuple(pending))
    return [(rows, part) for part in parts]


def _numbered(
    items: list[tuple[np.ndarray, tuple[View, ...]]], num_rows: int, by_tiles: bool
) -> ReadPlan:
    """Give partial results to the items whose rows read in several of them."""
    if num_rows == 1:  # a single request's decode step: the commonest, and the most hurried
        return _numbered_alone(items, by_tiles)
    readers = np.zeros(num_rows, dtype=np.int32)
    for rows, _ in items:
        readers[rows] += 1
    numbered, owners, num_partials = [], [], 0
    for rows, views in items:
        if bool((readers[rows] == 1).all()):
            numbered.append(ReadItem(rows, views, -1))
            continue
        numbered.append(ReadItem(rows, views, num_partials))
        owners.append(rows)
        num_partials += len(rows)
    offsets = np.zeros(num_rows + 1, dtype=np.int32)
    order = np.empty(0, dtype=np.int32)
    if owners:
        owner_of = np.concatenate(owners)
        order = np.argsort(owner_of, kind="stable").astype(np.int32)
        offsets[1:] = np.cumsum(np.bincount(owner_of, minlength=num_rows))
    return ReadPlan(tuple(numbered), num_partials, offsets, order, by_tiles)


def _numbered_alone(items: list[tuple[np.ndarray, tuple[View, ...]]], by_tiles: bool) -> ReadPlan:
    """Do what `_numbered` does for a step of one row."""
    count = len(items) if len(items) > 1 else 0
    numbered = [
        ReadItem(rows, views, number if count else -1) for number, (rows, views) in enumerate(items)
    ]
    offsets = np.array((0, count), dtype=np.int32)
    order = np.arange(count, dtype=np.int32)
    return ReadPlan(tuple(numbered), count, offsets, order, by_tiles)
