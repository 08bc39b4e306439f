"""Gathering: short views that share tiles are read as one, with a shift for every slot.

Knows: tiles, and what one more reading of a tile costs beside turning its keys.
Does not know: documents' spans, or how keys are turned.

After many edits every few slots of a document have a shift of their own. One query turned for each
of them would read each tile as often; keys are turned where they are read, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.segment import SlotArrays
from kvloom.kv.views import View, views_of
from kvloom.ops.tiles import TILE as TILE_SLOTS

MANY_VIEWS = 16
"""Fewer views are read one by one."""
SHORT_SLOTS = 2 * TILE_SLOTS
"""Longer views are read one by one as well."""
VISITS_PER_TILE = 2
"""A tile that would be read so often or more is read once instead, its keys turned slot by slot."""
NOWHERE = np.iinfo(np.int32).max
"""The position of slots between views, which no row sees."""


def views_read(doc: KVDoc) -> list[View]:
    """Return what a step reads of a document: its views, short ones in the same tiles as one.

    The last view stays what it is, for it grows.
    """
    views = views_of(doc)
    if len(views) < MANY_VIEWS:
        return views
    *earlier, last = views
    read = [view for view in earlier if view.stop - view.start > SHORT_SLOTS]
    short = [view for view in earlier if view.stop - view.start <= SHORT_SLOTS]
    for group in _neighbours(sorted(short, key=lambda view: view.start)):
        visits = sum(tiles_of(view.start, view.stop) for view in group)
        worth = visits >= VISITS_PER_TILE * tiles_of(group[0].start, group[-1].stop)
        read += [_one_of(group)] if worth and len(group) > 1 else group
    return [*read, last]


def tiles_of(start: int, stop: int) -> int:
    """Return how many tiles a stretch of slots touches."""
    return -(-stop // TILE_SLOTS) - start // TILE_SLOTS


def _neighbours(views: Sequence[View]) -> Iterator[list[View]]:
    """Yield runs of views that are in the same or neighbouring tiles, and share no slot."""
    group: list[View] = []
    for view in views:
        if group and not 0 <= view.start - group[-1].stop < TILE_SLOTS:
            yield group
            group = []
        group.append(view)
    if group:
        yield group


def _one_of(views: Sequence[View]) -> View:
    """Return a view of all slots from the first view's to the last one's."""
    first, stop = views[0].start, views[-1].stop
    pos = np.full(stop - first, NOWHERE, dtype=np.int32)
    shifts = np.zeros(stop - first, dtype=np.int32)
    bias = np.zeros(stop - first, dtype=np.float32)
    for view in views:
        slots = slice(view.start - first, view.stop - first)
        pos[slots], shifts[slots], bias[slots] = view.slot_pos, view.shift, view.slot_bias
    arrays = SlotArrays(pos=torch.from_numpy(pos))
    if bias.any():
        arrays.bias = torch.from_numpy(bias)
    return View(first, stop, views[0].first_pos, 0, (arrays, first), shifts)
