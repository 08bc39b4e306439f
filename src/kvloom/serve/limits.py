"""Who may ask and how much: addresses, API keys, host names and body sizes.

Knows: HTTP headers and byte counts.
Does not know: what a request asks for.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from hashlib import sha256
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.errors import RequestError
from kvloom.serve.config import ServerConfig
from kvloom.serve.errors import ErrorReply

OPEN_PATHS = ("/health", "/docs", "/redoc", "/openapi.json", "/static-offline-docs")
DISCARD_TIMEOUT_S = 5.0


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine; names other than localhost may."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_address(config: ServerConfig) -> None:
    """Refuse to be reachable from other machines without an API key.

    Raises:
        RequestError: the address is public and no key is set.
    """
    if not config.api_keys and not is_loopback(config.host):
        raise RequestError(
            f"Host {config.host!r} can be reached from other machines and no API key is set, so "
            "anyone could use the model. Set an API key, or bind 127.0.0.1.",
            param="host",
        )


def digests_of(api_keys: Sequence[str]) -> tuple[bytes, ...]:
    """Return digests of one length, so that a comparison tells nothing about a key's length."""
    return tuple(sha256(key.encode()).digest() for key in api_keys)


def known_key(authorization: str | None, digests: Sequence[bytes]) -> bytes | None:
    """Return the digest of the known key in an `Authorization` header; None if there is none.

    Keys are compared in constant time.
    """
    scheme, _, key = (authorization or "").partition(" ")
    given = sha256(key.strip().encode()).digest()
    known = False
    for digest in digests:  # every key is compared, so that time does not tell which one matched
        known |= hmac.compare_digest(given, digest)
    return given if known and scheme.lower() == "bearer" else None


def host_is_local(header: str | None) -> bool:
    """Whether a `Host` header names this machine; without one there is nothing to mistrust."""
    if not header:
        return True
    name = header[: header.index("]") + 1] if "]" in header else header.partition(":")[0]
    return is_loopback(name)


class Gate:
    """ASGI middleware that turns away strangers and oversized bodies.

    Without API keys the `Host` header must name this machine: a web page whose name was rebound
    to 127.0.0.1 could otherwise use the model through its visitor's browser.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._max_body_bytes = config.max_body_bytes
        self._digests = digests_of(config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn the request away, or pass it on with a limit on its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = known_key(headers.get("authorization"), self._digests)
        # Whose documents and KV a request may use; without keys all who may ask are one owner.
        scope.setdefault("state", {})["owner"] = "" if key is None else key.hex()
        refusal = self._refusal(scope["path"], headers, key)
        if refusal is None:
            limited = LimitedBody(receive, headers, self._max_body_bytes)
            await self._app(scope, limited.receive, send)
        else:
            await discard(receive, headers, self._max_body_bytes)
            await refusal.response()(scope, receive, send)

    def _refusal(self, path: str, headers: Headers, key: bytes | None) -> ErrorReply | None:
        if not self._digests:
            if host_is_local(headers.get("host")):
                return None
            return ErrorReply(
                403,
                "Without an API key this server answers only to localhost, and the Host header "
                "names something else. Ask 127.0.0.1, or start the server with an API key.",
                code="host_not_allowed",
            )
        is_open = any(path == known or path.startswith(f"{known}/") for known in OPEN_PATHS)
        if is_open or key is not None:
            return None
        return ErrorReply(
            401,
            "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class LimitedBody:
    """Receives a request's body and stops where it grows over the limit."""

    def __init__(self, receive: Receive, headers: Headers, max_bytes: int) -> None:
        self._receive = receive
        self._headers = headers
        self._max_bytes = max_bytes
        self._num_bytes = 0
        declared = headers.get("content-length", "")
        self._declared = int(declared) if declared.isdecimal() else 0

    async def receive(self) -> Message:
        """Return the next message of the request.

        Raises:
            HTTPException: 413, the body is over the limit.
        """
        if self._declared <= self._max_bytes:
            message = await self._receive()
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes <= self._max_bytes:
                return message
            if not message.get("more_body", False):
                raise self._too_large()
        await discard(self._receive, self._headers, self._max_bytes)
        raise self._too_large()

    def _too_large(self) -> HTTPException:
        # Reading goes on when the client's disconnect is awaited; the limit is said only once.
        self._declared = self._num_bytes = 0
        return HTTPException(
            413, f"The body is over the limit of {self._max_bytes} bytes; send less text."
        )


async def discard(receive: Receive, headers: Headers, max_bytes: int) -> None:
    """Read and drop a refused body, within bounds, so that the client lives to read the reply."""
    has_body = "content-length" in headers or "transfer-encoding" in headers
    if not has_body or "expect" in headers:
        return
    num_bytes = 0
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while num_bytes <= 4 * max_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
