"""Errors as the OpenAI API words them.

Knows: which status, type and code each error of ours gets.
Does not know: who raised it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from kvloom.errors import (
    CapacityError,
    FidelityError,
    KvloomError,
    RequestError,
    UnsupportedModelError,
)

MAX_MESSAGE_CHARS = 2000
MAX_PARAM_CHARS = 100
BODY_HINT = "The body must be one JSON object, sent with Content-Type: application/json."


class UnknownModelError(KvloomError):
    """The request names a model that is not served."""


class UnknownDocumentError(KvloomError):
    """The request names a document that its sender does not have."""


class StaleVersionError(KvloomError):
    """The document was changed since its sender read it."""


class TooManyDocumentsError(KvloomError):
    """The sender keeps as many documents as it may."""


class ShuttingDownError(KvloomError):
    """The server is ending and the grace time is over."""


class GenerationAbortedError(KvloomError):
    """The engine gave a request up before its end."""


class EngineFailedError(KvloomError):
    """The engine broke on a request in a way nobody foresaw."""


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as it goes over the wire.

    Attributes:
        status: HTTP status.
        message: what, why and what to do.
        kind: OpenAI's `type` of the error.
        param: the offending field, if one can be named.
        code: a word for programs.
        headers: extra response headers.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {
            "error": {
                # What the client sent may be part of both, at any length.
                "message": self.message[:MAX_MESSAGE_CHARS],
                "type": self.kind,
                "param": self.param and self.param[:MAX_PARAM_CHARS],
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(
            to_json(self.body()),
            status_code=self.status,
            media_type="application/json",
            headers=dict(self.headers),
        )


def reply_to(error: BaseException) -> ErrorReply:
    """Return what a client is told about an error."""
    message = str(error)
    match error:
        case RequestError():
            reply = ErrorReply(400, message, param=error.param)
        case UnknownModelError():
            reply = ErrorReply(404, message, param="model", code="model_not_found")
        case UnknownDocumentError():
            reply = ErrorReply(404, message, code="document_not_found")
        case StaleVersionError():
            reply = ErrorReply(409, message, param="version", code="version_conflict")
        case TooManyDocumentsError():
            reply = ErrorReply(429, message, "rate_limit_error", code="too_many_documents")
        case CapacityError(retry_after_s=None):
            reply = ErrorReply(400, message, code="kv_memory_exceeded")
        case CapacityError(retry_after_s=seconds):
            wait = {"Retry-After": str(max(1, math.ceil(seconds or 0)))}
            reply = ErrorReply(429, message, "rate_limit_error", code="queue_full", headers=wait)
        case ShuttingDownError():
            reply = ErrorReply(503, message, "server_error", code="shutting_down")
        case UnsupportedModelError() | FidelityError():
            reply = ErrorReply(400, message)
        case KvloomError():
            # The engine's own word for "I failed"; what the client got wrong has a class above.
            reply = ErrorReply(500, message, "server_error", code="engine_error")
        case _:
            reply = ErrorReply(
                500,
                "The server failed on this request; its log holds the reason.",
                "server_error",
                code="internal_error",
            )
    return reply


def reply_to_status(status: int, detail: str, headers: Mapping[str, str] | None) -> ErrorReply:
    """Return the reply for a status that the web framework or a limit decided on."""
    codes = {404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}
    if detail == HTTPStatus(status).phrase:
        detail = f"{detail}: see /docs for the routes and methods there are."
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ErrorReply(status, detail, kind, code=codes.get(status), headers=headers or {})


def reply_to_validation(errors: Sequence[Mapping[str, Any]]) -> ErrorReply:
    """Return the reply that names the first field a body got wrong.

    Args:
        errors: pydantic's list of errors.
    """
    first = errors[0]
    context = first.get("ctx") or {}
    # The first part says "body"; parts in brackets are pydantic's own, such as "[key]".
    place = [str(part) for part in first["loc"][1:] if not str(part).startswith("[")]
    if inner := context.get("param"):
        place.append(str(inner))
    param = ".".join(place)
    match first["type"]:
        case "extra_forbidden":
            message = f"{param} is not a field that is known here; leave it out."
        case "missing" if param:
            message = f"{param} is missing; give a value."
        case "kvloom":
            message = first["msg"]
        case _ if not param:
            message = BODY_HINT
        case _:
            message = f"{param} cannot be used: {first['msg']}."
    return ErrorReply(400, message, param=param or None)
