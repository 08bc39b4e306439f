"""Finds the longest stored beginning of a prompt, token by token.

Knows: lineages, and what continues them.
Does not know: KV; nothing is loaded here and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvloom.kv.lineage import Lineage
from kvloom.store.key import ChunkKey, Place, context_of
from kvloom.store.tier import Continuation


@dataclass(frozen=True, slots=True)
class Step:
    """One chunk on the way through a prompt.

    Attributes:
        key: with which the chunk can be read.
        num_tokens: tokens of it that the prompt shares; causal KV of a chunk's beginning does not
            depend on its end, so fewer than it holds are as good.
    """

    key: ChunkKey
    num_tokens: int


class Findable(Protocol):
    """Where chunks can be looked for."""

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place."""
        ...


def find_prefix(
    store: Findable, fingerprint: bytes, tokens: Sequence[int] | np.ndarray, tenant: str
) -> list[Step]:
    """Return the chunks that cover the longest stored beginning of a prompt, in order.

    Only KV without a recipe is found: what a fresh prefill would hold. Chunks may go while they
    are read; the walk then ends at the one before.

    Args:
        store: where to look.
        fingerprint: of the model and the formats it computes with.
        tokens: token ids of the prompt, shape (s,).
        tenant: `hash_tenant` of whoever asks.
    """
    prompt = np.asarray(tokens, dtype=np.int64)
    # Positions that can be reached, with the last step to each and the lineage there. What is
    # stored may cover a place in several ways, and the longest first step can be a dead end.
    reached: dict[int, tuple[int, Step | None, Lineage]] = {0: (0, None, Lineage.root(fingerprint))}
    waiting = [0]
    while waiting:
        start = min(waiting)
        waiting.remove(start)
        if start == len(prompt):
            break
        lineage = reached[start][2]
        place = Place(fingerprint, "", context_of(lineage), tenant)
        for found in store.continuations(place, int(prompt[start])):
            length = common_length(found.tokens, prompt[start:])
            stop = start + length
            if length and stop not in reached:
                after = lineage.extend(prompt[start:stop].tolist())
                reached[stop] = (start, Step(found.key, length), after)
                waiting.append(stop)
    return _way(reached)


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many elements two arrays have in common at their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _way(reached: dict[int, tuple[int, Step | None, Lineage]]) -> list[Step]:
    steps: list[Step] = []
    position = max(reached)
    while (step := reached[position][1]) is not None:
        steps.append(step)
        position = reached[position][0]
    return steps[::-1]
