"""Gives memory that was freed back to the system.

Knows: the C library's own call for it, where there is one.
Does not know: who used the memory.
"""

from __future__ import annotations

import ctypes


def release_freed_memory() -> bool:
    """Give freed memory back to the system; return whether this platform can be asked to.

    Loading a model needs much for a moment, and the C library keeps it for later.
    Source: malloc_trim of the GNU C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True
