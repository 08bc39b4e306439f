"""Runs the application on a socket until a stop signal, and lets running requests finish.

Knows: uvicorn, signals and the grace time.
Does not know: routes or the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from socket import AF_INET, AF_INET6, IPPROTO_TCP, TCP_NODELAY, create_server, socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvloom.errors import RequestError
from kvloom.serve.config import ServerConfig
from kvloom.serve.limits import check_address
from kvloom.serve.service import Service

# Cancelled requests still send their last event; then the connections are cut.
FAREWELL_S = 5
# Longer than the pools of common clients keep a connection, so that none is closed under a request.
KEEP_ALIVE_S = 75
BACKLOG = 2048

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes running requests within a grace time, then cancels them.

    It is run on sockets that listen already: `server.run(sockets=[listen(config)])`.
    """

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        *,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.grace_s) + FAREWELL_S,
            )
        )
        self._service: Service = app.state.service
        self._grace_s = config.grace_s
        self._on_ready = on_ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends at once."""
        # Unlike the base class this does not raise the signal again later: a drained server
        # has ended as asked, and its caller goes on.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Accept connections, and say where."""
        await super().startup(sockets=sockets)
        if self.started and sockets and self._on_ready is not None:
            host, port = sockets[0].getsockname()[:2]
            self._on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop accepting, wait for running requests, then cancel what is left."""
        grace = asyncio.get_running_loop().call_later(self._grace_s, self._cancel_running)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            grace.cancel()

    def _cancel_running(self) -> None:
        logger.warning("grace time of %s s is over, cancelling running requests", self._grace_s)
        self._service.guard.closing.set()


def run(
    app: FastAPI, config: ServerConfig, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, drain, close the engine and return.

    Args:
        app: what `create_app` made.
        config: address and grace time.
        on_ready: called with the server's URL once it listens.

    Raises:
        RequestError: the address is public and no API key is set, or it cannot be bound; the
            engine is left open then.
    """
    check_address(config)
    DrainingServer(app, config, on_ready=on_ready).run(sockets=[listen(config)])


def listen(config: ServerConfig) -> socket:
    """Return a socket that listens at the address.

    Raises:
        RequestError: the address cannot be bound.
    """
    host = config.host.strip("[]")
    family = AF_INET6 if ":" in host else AF_INET
    try:
        listener = create_server((host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RequestError(
            f"Cannot listen at {host} port {config.port} ({error.strerror or error}); take another "
            "port, or end the program that holds it.",
            param="port",
        ) from error
    # Connections inherit this. asyncio sets it only on sockets it opens itself, and without it
    # every small reply waits up to 40 ms for the client's acknowledgement.
    listener.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    return listener
