"""Keys: what must be equal for stored KV to be the KV that is wanted.

Knows: the parts of a key, and the digests that stand for it in names and indexes.
Does not know: tensors, files or tiers.

Nothing that a user wrote becomes a part of a name: names are hexadecimal digests. The hash is
cryptographic, because a collision would hand one user's KV to another.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from kvloom.errors import StoreError
from kvloom.kv.lineage import Lineage

DIGEST_BYTES = 32
_TENANT = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk was computed: under which model and recipe, behind what, and for whom.

    Attributes:
        fingerprint: of the model and the formats it computes with.
        recipe: codecs, policies and repairs that touched the KV; empty for none.
        context: `context_of` the lineage to the left; None for a chunk that was computed alone.
        tenant: `hash_tenant` of whoever it belongs to.
    """

    fingerprint: bytes
    recipe: str
    context: bytes | None
    tenant: str

    def __post_init__(self) -> None:
        if self.context is not None and len(self.context) != DIGEST_BYTES:
            raise StoreError("a chunk's context is no digest; make it with context_of().")
        if not _TENANT.fullmatch(self.tenant):
            raise StoreError("a chunk's tenant is no digest; make it with hash_tenant().")

    @property
    def digest(self) -> bytes:
        """Hash of all parts, (32 bytes)."""
        context = b"" if self.context is None else b"+" + self.context
        parts = (self.fingerprint, _encoded(self.recipe), context, self.tenant.encode())
        return _digest(b"kvloom.place", *parts)

    def key(self, token_hash: bytes) -> ChunkKey:
        """Return the key of the chunk with these tokens at this place."""
        return ChunkKey(self.fingerprint, self.recipe, token_hash, self.context, self.tenant)


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """What a stored chunk is; see `Place` for the other attributes.

    Attributes:
        token_hash: `hash_tokens` of the chunk's tokens.
    """

    fingerprint: bytes
    recipe: str
    token_hash: bytes
    context: bytes | None
    tenant: str

    def __post_init__(self) -> None:
        if len(self.token_hash) != DIGEST_BYTES:
            raise StoreError("a chunk's token hash is no digest; make it with hash_tokens().")
        _ = self.place

    @property
    def place(self) -> Place:
        """Where the chunk was computed."""
        return Place(self.fingerprint, self.recipe, self.context, self.tenant)

    @property
    def name(self) -> str:
        """The chunk's name: a digest in hexadecimal."""
        return _digest(b"kvloom.chunk", self.place.digest, self.token_hash).hex()


def hash_tokens(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Return the digest of token ids, (32 bytes)."""
    return _digest(b"kvloom.tokens", np.asarray(tokens, dtype="<i8").tobytes())


def hash_tenant(tenant: str) -> str:
    """Return what stands for a tenant's name in keys; the name itself is never stored."""
    return _digest(b"kvloom.tenant", _encoded(tenant))[:16].hex()


def context_of(lineage: Lineage) -> bytes:
    """Return the digest of a lineage, with its tokens behind the last whole block."""
    return _digest(b"kvloom.context", lineage.digest, array("q", lineage.pending).tobytes())


def is_name(text: str) -> bool:
    """Whether a text could be a chunk's name."""
    return _NAME.fullmatch(text) is not None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(purpose: bytes, *parts: bytes) -> bytes:
    """Return a hash in which neither order nor borders of the parts can be confused."""
    state = blake2b(digest_size=DIGEST_BYTES, person=purpose)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


ANYBODY = hash_tenant("")
"""The tenant of all who name none."""
