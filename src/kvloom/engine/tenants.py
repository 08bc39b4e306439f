"""Tenants: whose KV is whose.

Knows: how the salt that a caller gives becomes the digest that KV is found under.
Does not know: API keys, or where KV is kept.
"""

from __future__ import annotations

from kvloom.errors import RequestError
from kvloom.store.key import ANYBODY, hash_tenant


def tenant_of(cache_salt: str | None) -> str:
    """Return the digest of whoever uses a salt; all who give none are one.

    Raises:
        RequestError: it is no text, or an empty one.
    """
    if cache_salt is None:
        return ANYBODY
    if not isinstance(cache_salt, str) or not cache_salt:
        raise RequestError(
            "cache_salt must be a text that is not empty; leave it out to share KV with all who "
            "give none.",
            param="cache_salt",
        )
    return hash_tenant(cache_salt)
