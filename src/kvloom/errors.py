"""The errors kvloom raises on purpose.

Knows: which part of a call was wrong and what the caller can do about it.
Does not know: HTTP, exit codes or logging; those rooms translate.
"""

from __future__ import annotations


class KvloomError(Exception):
    """Base of every error that kvloom raises on purpose; its text says what, why and what to do."""


class UnsupportedModelError(KvloomError):
    """The model cannot be run, or lacks the feature that was asked for."""


class ModelLoadError(KvloomError):
    """The model's files are missing, damaged or in a format that is refused."""


class CapacityError(KvloomError):
    """There is not enough KV memory or queue room for the request.

    Attributes:
        retry_after_s: seconds after which the same request may succeed; None if it never will.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FidelityError(KvloomError):
    """The fidelity that was asked for cannot be given."""


class StoreError(KvloomError):
    """A stored chunk could not be written or managed; failed reads are misses, never this error."""


class RequestError(KvloomError):
    """The request itself is wrong and will fail again unchanged.

    Attributes:
        param: the name of the offending field, if one can be named.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def as_kvloom_error(error: Exception, what: str) -> KvloomError:
    """Return an error that may be shown to users; of others it says what failed, and why."""
    if isinstance(error, KvloomError):
        return error
    wrapped = KvloomError(f"{what} failed ({type(error).__name__}: {error}).")
    wrapped.__cause__ = error
    return wrapped
