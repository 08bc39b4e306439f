"""The settings of an engine and of a server, as frozen data.

Knows: names, defaults and ranges.
Does not know: environment variables or files; the command line reads those and passes values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kvloom.errors import RequestError

DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["auto", "int8", "int4"]
KVDType = Literal["auto", "float32", "bfloat16", "int8"]

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}


def parse_bytes(size: int | str, param: str = "kv_memory") -> int:
    """Return a size such as `"2GiB"`, `"512MiB"` or a number in bytes.

    Raises:
        RequestError: the text is no size, or it is not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
        if match is None or match[2].upper() not in _UNITS:
            raise RequestError(
                f"{param} is {size!r}; write bytes or a size such as 2GiB or 512MiB.", param=param
            )
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value <= 0:
        raise RequestError(f"{param} is {size!r}; it must be above 0.", param=param)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine uses memory and fills its steps.

    Attributes:
        kv_memory_bytes: bytes of KV that may be held, idle documents included.
        max_model_len: tokens a document may grow to; None takes the model's own limit.
        step_tokens: rows that one step runs at most; longer prefills are cut into chunks.
        max_running: sequences that run at once.
        max_waiting: requests that may wait; more are refused with a time to retry.
        enable_prefix_caching: reuse the KV of equal token prefixes.
        repair_when_idle: make documents exact while there is nothing else to do.
    """

    kv_memory_bytes: int = 2 * 2**30
    max_model_len: int | None = None
    step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 1024
    enable_prefix_caching: bool = True
    repair_when_idle: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_memory_bytes", "max_model_len", "step_tokens", "max_running"):
            value = getattr(self, name)
            if value is not None or name != "max_model_len":
                _check_integer(name, value, 1)
        _check_integer("max_waiting", self.max_waiting, 0)


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RequestError(f"{name} is {value!r}; it must be an integer from {low}.", param=name)
