"""Registries: things that are asked for by name.

Knows: how a name is looked up, and how to say that there is none of it.
Does not know: what is registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from kvloom.errors import RequestError

T = TypeVar("T")


def named(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return what a registry holds under a name.

    Args:
        registry: by name.
        name: what is asked for.
        kind: what the names are of; also the parameter that an error is about.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in registry:
        names = ", ".join(registry)
        raise RequestError(f"There is no {kind} {name!r}; the names are {names}.", param=kind)
    return registry[name]
