"""Which chunks to let go of when room is needed: those that are expected to save the least.

Knows: use, size and what a chunk spares.
Does not know: tiers.

Source: Cache-Craft (Agarwal et al., SIGMOD 2025, arXiv 2502.15734): evict the variant with the
least frequency times saved tokens per byte. Deviation: the frequency is hits over the time since
the last use, so that no clock has to run; what a repair will cost is not known here and left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvloom.store.tier import Entry

GRACE_S = 60.0
"""Seconds of idleness below which recency hardly counts, so that new chunks get their chance."""


def expected_saving(*, hits: int, idle_s: float, num_tokens: int, nbytes: int) -> float:
    """Return tokens per second and byte that keeping a chunk is expected to spare."""
    rate = (hits + 1) / (max(idle_s, 0.0) + GRACE_S)
    return rate * num_tokens / max(nbytes, 1)


def choose_victims(entries: Iterable[Entry], need_bytes: int, now: float) -> list[Entry] | None:
    """Return the entries to remove to free some bytes, least saving first; None if it cannot be.

    Pinned entries stay. Nothing is removed in vain: either all that is needed, or None.
    """

    def saving(entry: Entry) -> tuple[float, str]:
        idle_s = now - entry.last_used
        value = expected_saving(
            hits=entry.hits, idle_s=idle_s, num_tokens=entry.num_tokens, nbytes=entry.nbytes
        )
        return value, entry.key.name

    victims: list[Entry] = []
    for entry in sorted((e for e in entries if not e.pinned), key=saving):
        if need_bytes <= 0:
            break
        victims.append(entry)
        need_bytes -= entry.nbytes
    return victims if need_bytes <= 0 else None
