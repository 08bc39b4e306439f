"""Sends server-sent events to one client.

Knows: HTTP streaming, disconnects, stalled readers, and how a stream ends with an error.
Does not know: what the events say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvloom.errors import KvloomError
from kvloom.serve.errors import ClientGoneError, reply_to
from kvloom.serve.replies import event
from kvloom.serve.service import Service

FAREWELL_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class EventStream(Response):
    """A response that pulls the next event only when the client took the last one."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, first: bytes, events: AsyncGenerator[bytes, None], reply_id: str
    ) -> None:
        self.status_code = 200
        self.background = None
        self._service = service
        self._first = first
        self._events = events
        self._started = False
        self.init_headers(
            {
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": reply_id,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, the client leaves or the server stops."""
        async with aclosing(self._events):
            try:
                await self._service.guard.run(self._send_all(send), receive)
            except (ClientGoneError, TimeoutError, OSError):
                self._service.metrics.disconnects.inc()
            except Exception as error:
                if not isinstance(error, KvloomError):
                    logger.exception("server failed during a stream")
                await self._send_error(error, send)

    async def _send_all(self, send: Send) -> None:
        await self._send_start(send)
        await self._send_event(self._first, send)
        async for data in self._events:
            await self._send_event(data, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_event(self, data: bytes, send: Send) -> None:
        # A client that stopped reading without closing would hold its pages for ever.
        async with asyncio.timeout(self._service.config.stall_timeout_s):
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _send_error(self, error: Exception, send: Send) -> None:
        message = {
            "type": "http.response.body",
            "body": event(reply_to(error).body()),
            "more_body": False,
        }
        try:
            async with asyncio.timeout(FAREWELL_TIMEOUT_S):
                if not self._started:
                    await self._send_start(send)
                await send(message)
        except (TimeoutError, OSError):
            self._service.metrics.disconnects.inc()
