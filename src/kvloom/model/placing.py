"""Places rows into their documents, for every runner alike.

Knows: where rows go, that a failed step leaves documents as they were, and which logits are wanted.
Does not know: how rows are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.types import Rows, StepOutput


@contextmanager
def placed(rows: Sequence[Rows]) -> Iterator[tuple[list[KVDoc], list[np.ndarray]]]:
    """Give the documents that show a step's rows, and the rows' slots.

    Rows that leave no trace stand in forks, which are closed behind the step; where the step
    fails, every document is cut back to the length it had. What an overlay replaced is gone then:
    whoever repairs a document keeps a fork of it.

    Raises:
        CapacityError: the pool is too small for the rows.
    """
    lengths = [entry.doc.length for entry in rows]
    scratch: list[KVDoc] = []
    try:
        docs = [entry.doc for entry in rows]
        for index, entry in enumerate(rows):
            if entry.write == "none":
                docs[index] = entry.doc.fork()
                scratch.append(docs[index])
        yield docs, [_take_slots(doc, entry) for doc, entry in zip(docs, rows, strict=True)]
    except BaseException:
        for entry, length in zip(rows, lengths, strict=True):
            entry.doc.truncate(min(length, entry.doc.length))
        raise
    finally:
        for doc in scratch:
            doc.close()


def wanted_rows(rows: Sequence[Rows]) -> tuple[list[int], np.ndarray]:
    """Return how many logits each entry wants, and the packed rows that give them, int64."""
    counts: list[int] = []
    places: list[int] = []
    stop = 0
    for entry in rows:
        length = len(entry.tokens)
        count = length if entry.logits == "all" else int(entry.logits == "last")
        counts.append(count)
        stop += length
        places.extend(range(stop - count, stop))
    return counts, np.array(places, dtype=np.int64)


def split_logits(
    logits: Tensor, counts: Sequence[int], likeliest: np.ndarray | None = None
) -> StepOutput:
    """Give every entry its rows of the logits (rows, v), and of the largest logits' tokens."""
    parts = torch.split(logits, list(counts))  # in one call: slices would add up
    wanted = tuple(part if count else None for part, count in zip(parts, counts, strict=True))
    if likeliest is None:
        return StepOutput(wanted)
    tokens, stop = likeliest.tolist(), 0
    last: list[int | None] = []
    for count in counts:
        stop += count
        last.append(tokens[stop - 1] if count else None)
    return StepOutput(wanted, tuple(last))


def _take_slots(doc: KVDoc, entry: Rows) -> np.ndarray:
    """Return the slots of an entry's rows: behind the document, or over what stands there."""
    tokens = entry.tokens.tolist()
    if entry.write != "overlay" and _continues(entry.pos, doc.end_pos):
        return doc.append(tokens)
    assert entry.write != "append", "rows that are appended must continue their document"
    return doc.overlay(tokens, entry.pos)


def _continues(pos: np.ndarray, end: int) -> bool:
    """Whether rows stand one behind the other from a document's end on."""
    if int(pos[0]) != end or int(pos[-1]) - end + 1 != len(pos):
        return False
    return len(pos) == 1 or bool((np.diff(pos) == 1).all())
