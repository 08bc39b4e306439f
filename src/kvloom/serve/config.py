"""The settings of the HTTP server, as frozen data.

Knows: names, defaults and ranges.
Does not know: environment variables or files; the command line reads those and passes values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvloom.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may ask, and how much one request may take.

    Attributes:
        host: address to bind; one that is not loopback needs an API key.
        port: TCP port; 0 takes a free one.
        api_keys: keys of which every request must carry one; empty asks for none.
        max_body_bytes: size of a request body that is still read.
        max_documents: documents that are kept per API key, or in all where there is no key.
        served_model_name: the model's name in the API; None takes the name of its folder.
        grace_s: seconds that running requests may take to finish after a stop signal.
        stall_timeout_s: seconds a client may take to accept one event before it is cut off.

    Raises:
        RequestError: a value is out of range; `param` names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 8 * 2**20
    max_documents: int = 256
    served_model_name: str | None = None
    grace_s: float = 30.0
    stall_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port is {self.port}; it must be from 0 to 65535.", param="port")
        if self.max_body_bytes < 1:
            raise RequestError(
                f"max_body_bytes is {self.max_body_bytes}; it must be at least 1.",
                param="max_body_bytes",
            )
        if self.max_documents < 0:
            raise RequestError(
                f"max_documents is {self.max_documents}; it must be 0 or more.",
                param="max_documents",
            )
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise RequestError(
                "served_model_name is empty; give a name.", param="served_model_name"
            )
        if not math.isfinite(self.grace_s) or self.grace_s < 0:
            raise RequestError(f"grace_s is {self.grace_s}; it must be 0 or more.", param="grace_s")
        if not math.isfinite(self.stall_timeout_s) or self.stall_timeout_s <= 0:
            raise RequestError(
                f"stall_timeout_s is {self.stall_timeout_s}; it must be above 0.",
                param="stall_timeout_s",
            )
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError(
                    "An API key is empty or holds a character that a header cannot carry; "
                    "use printable ASCII without spaces.",
                    param="api_keys",
                )
