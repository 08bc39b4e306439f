"""A client on a bare socket, which may leave or stall at any byte.

Knows: enough HTTP to ask, and how to hang up politely or not.
Does not know: what comes back.
"""

from __future__ import annotations

import json
import socket
import struct
from types import TracebackType
from typing import Any


class RawClient:
    """One connection with one request on it."""

    def __init__(self, port: int, path: str, body: Any, *, receive_buffer: int | None = None):
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + data)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def read_until(self, text: bytes) -> bytes:
        """Return what came, up to a piece of text."""
        received = b""
        while text not in received:
            data = self.socket.recv(65536)
            assert data, f"the connection ended after {received[-300:]!r}"
            received += data
        return received

    def read_all(self) -> bytes:
        """Return what came until the server closed the connection."""
        received = b""
        while data := self.socket.recv(65536):
            received += data
        return received

    def reset(self) -> None:
        """Hang up with a reset instead of a farewell."""
        linger = struct.pack("ii", 1, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()
