"""Reads request bodies as JSON by the standard: no NaN, no lone surrogates, bounded depth.

Knows: FastAPI's way to give a route its own request class.
Does not know: what a body means.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response


class StrictJSONRequest(Request):
    """A request whose body is parsed strictly."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: 400, the body is not JSON.
        """
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(
                400, f"The body is not valid JSON ({error}); send one JSON object."
            ) from None


class StrictJSONRoute(APIRoute):
    """A route that reads its body through `StrictJSONRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJSONRequest(request.scope, request.receive))

        return handle_strictly
