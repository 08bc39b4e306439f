"""Servers for the tests of `kvloom.serve`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .fake_llm import FakeAsyncLLM
from .running import RunningServer


@pytest.fixture(scope="package")
def shared_server() -> Iterator[RunningServer]:
    """A server whose engine no test may change."""
    with RunningServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """A server of the test's own."""
    with RunningServer() as running:
        yield running


@pytest.fixture
def llm(server: RunningServer) -> FakeAsyncLLM:
    """The engine of the test's own server."""
    return server.llm
