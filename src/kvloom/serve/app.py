"""Puts the server together: routes, limits, metrics and error replies around one engine.

Knows: the order of the layers and how long the engine lives.
Does not know: what any layer does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvloom.errors import KvloomError
from kvloom.serve import document_routes
from kvloom.serve.backend import Backend
from kvloom.serve.config import ServerConfig
from kvloom.serve.errors import (
    ClientGoneError,
    reply_to,
    reply_to_status,
    reply_to_validation,
)
from kvloom.serve.limits import Gate
from kvloom.serve.metrics import CLIENT_GONE_STATUS, MeasureRequests, Metrics
from kvloom.serve.routes import router
from kvloom.serve.service import Service
from kvloom.version import __version__


def create_app(llm: Backend, config: ServerConfig) -> FastAPI:
    """Return the server's application; it closes the engine when it ends.

    Args:
        llm: the engine, an `AsyncLLM`.
        config: limits and names; the address is `run`'s matter.
    """
    service = Service(llm, config, Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    # The offline variant brings the pages' scripts along, so that /docs needs no network.
    app = FastAPIOffline(
        title="kvloom",
        version=__version__,
        summary="An LLM inference engine whose KV cache is a document.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(document_routes.router)
    app.add_middleware(Gate, config=config)
    app.add_middleware(MeasureRequests, metrics=service.metrics)
    _handle_errors(app, service.metrics)
    return app


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(KvloomError)
    async def refused(_: Request, error: KvloomError) -> Response:
        return reply_to(error).response()

    @app.exception_handler(HTTPException)
    async def framework_refused(_: Request, error: HTTPException) -> Response:
        return reply_to_status(error.status_code, error.detail, error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return reply_to_validation(error.errors()).response()

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, __: ClientGoneError) -> Response:
        metrics.disconnects.inc()
        return Response(status_code=CLIENT_GONE_STATUS)

    # The framework logs the traceback, once, after this reply was sent.
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return reply_to(error).response()
