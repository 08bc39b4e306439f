"""Lineage: what a stretch of KV attended to when it was computed, as one hash.

Knows: how a lineage grows by tokens and by what was done to them.
Does not know: tensors, spans or documents.

Two stretches of KV are interchangeable if and only if their lineages are equal, so exactness is a
comparison. A collision would serve one user's cache to another: the hash is cryptographic.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

BLOCK_TOKENS = 64
"""Tokens per link of the chain: any sub-range can be judged by hashing fewer than this many."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """A prefix of tokens under one fingerprint, with everything that was done to its KV.

    Attributes:
        digest: hash of the whole blocks so far.
        pending: tokens behind the last whole block.
    """

    digest: bytes
    pending: tuple[int, ...] = ()

    @classmethod
    def root(cls, fingerprint: bytes) -> Lineage:
        """Return the lineage of an empty prefix under a passport's fingerprint."""
        return cls(blake2b(b"root" + fingerprint, digest_size=32).digest())

    def extend(self, tokens: Sequence[int]) -> Lineage:
        """Return the lineage after tokens that were computed plainly behind this prefix."""
        run = (*self.pending, *tokens)
        digest = self.digest
        whole = len(run) - len(run) % BLOCK_TOKENS
        for start in range(0, whole, BLOCK_TOKENS):
            block = array("q", run[start : start + BLOCK_TOKENS]).tobytes()
            digest = blake2b(b"tokens" + digest + block, digest_size=32).digest()
        return Lineage(digest, run[whole:])

    def alter(self, recipe: str, source: Lineage) -> Lineage:
        """Return the lineage after KV that is not what a fresh prefill would hold here.

        Args:
            recipe: what was done, for example `shift=5`.
            source: lineage at the end of the stretch where it was computed.
        """
        seal = blake2b(b"altered" + self.digest, digest_size=32)
        for part in (self.pending, source.pending):
            seal.update(array("q", (len(part), *part)).tobytes())
        seal.update(source.digest + recipe.encode())
        return Lineage(seal.digest())
