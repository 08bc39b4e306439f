"""A real server on loopback, in a thread of the test process.

Knows: how to start and stop one, and how to wait for a condition.
Does not know: what is asked of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

from kvloom.serve.app import create_app
from kvloom.serve.config import ServerConfig
from kvloom.serve.server import DrainingServer, listen

from .fake_llm import FakeAsyncLLM


class RunningServer:
    """A server around a fake engine, with the clients to ask it."""

    def __init__(self, llm: Any = None, **settings: Any) -> None:
        self.llm = llm if llm is not None else FakeAsyncLLM()
        self.config = ServerConfig(port=0, **settings)
        self._urls: list[str] = []
        self.app = create_app(self.llm, self.config)
        self.server = DrainingServer(self.app, self.config, on_ready=self._urls.append)
        # Reading certificates takes longer than most tests, and loopback has none.
        self.client = httpx.Client(verify=False, timeout=30)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [listen(self.config)]}, daemon=True
        )

    def __enter__(self) -> RunningServer:
        self._thread.start()
        eventually(lambda: self._urls)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.join()

    @property
    def url(self) -> str:
        return self._urls[0]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def openai(self, **settings: Any) -> OpenAI:
        if settings:
            return OpenAI(**{**self._openai_settings(), **settings})
        return self._openai

    @cached_property
    def _openai(self) -> OpenAI:
        return OpenAI(**self._openai_settings())

    def _openai_settings(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}

    def async_openai(self, **settings: Any) -> AsyncOpenAI:
        return AsyncOpenAI(**{**self._openai_settings(), **settings})

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return self.client.post(f"{self.url}{path}", json=body, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        return self.client.get(f"{self.url}{path}", **settings)


def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def events_of(text: str) -> list[Any]:
    """Return the events of an SSE body, checking its format to the byte."""
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ")
        assert "\n" not in block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def assert_openai_error(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """Check that a response is an error in OpenAI's shape, and return the error."""
    assert 400 <= response.status_code < 500 if status is None else response.status_code == status
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error
