"""Errors in OpenAI's words."""

from __future__ import annotations

import pytest

from kvloom.errors import (
    CapacityError,
    FidelityError,
    KvloomError,
    RequestError,
    StoreError,
    UnsupportedModelError,
)
from kvloom.serve.errors import (
    EngineFailedError,
    GenerationAbortedError,
    ShuttingDownError,
    UnknownModelError,
    reply_to,
    reply_to_status,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x"), 400),
        (FidelityError("x"), 400),
        (UnsupportedModelError("x"), 400),
        (KvloomError("x"), 500),
        (CapacityError("x"), 400),
        (CapacityError("x", retry_after_s=3), 429),
        (UnknownModelError("x"), 404),
        (ShuttingDownError("x"), 503),
        (StoreError("x"), 500),
        (GenerationAbortedError("x"), 500),
        (EngineFailedError("x"), 500),
        (MemoryError("x"), 500),
    ],
)
def test_statuses(error: Exception, status: int) -> None:
    reply = reply_to(error)
    assert reply.status == status
    assert reply.kind == ("server_error" if status >= 500 else reply.kind)
    assert reply.response().status_code == status


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2")])
def test_retry_after_is_whole_seconds_and_never_now(seconds: float, header: str) -> None:
    reply = reply_to(CapacityError("x", retry_after_s=seconds))
    assert reply.headers["Retry-After"] == header


def test_bare_statuses_say_where_to_look() -> None:
    assert "/docs" in reply_to_status(404, "Not Found", None).message
    assert reply_to_status(413, "Too long.", None).message == "Too long."
