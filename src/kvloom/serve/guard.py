"""Runs the work for one client and ends it when the client leaves or the server stops.

Knows: disconnects and the server's stop signal.
Does not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive

from kvloom.serve.errors import ClientGoneError, ShuttingDownError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Guard:
    """Watches over all work that the server does for its clients.

    Attributes:
        closing: set once the grace time is over; running work is then cancelled.
    """

    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """Return what `work` returns, and cancel it as soon as nobody waits for it.

        Raises:
            ClientGoneError: the client closed the connection.
            ShuttingDownError: the server's grace time is over.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        closing = asyncio.ensure_future(self.closing.wait())
        everything = (task, gone, closing)
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGoneError
            raise ShuttingDownError("The server is shutting down; ask again later.")
        finally:
            for waiter in everything:
                waiter.cancel()
            # The work's own clean-up, which frees its memory, is over before this returns.
            await asyncio.gather(*everything, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
