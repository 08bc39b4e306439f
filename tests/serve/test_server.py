"""Signals, draining and addresses, with a server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from kvloom.errors import RequestError
from kvloom.serve.app import create_app
from kvloom.serve.config import ServerConfig
from kvloom.serve.server import listen, run

from .fake_llm import FakeAsyncLLM
from .raw_client import RawClient
from .running import RunningServer, assert_openai_error, events_of, eventually

PACKAGE = __package__ or ""
ROOT = Path(__file__).parents[PACKAGE.count(".") + 1]
ENDLESS = {"prompt": "x" * 50, "max_tokens": 4000, "ignore_eos": True}


class ServerProcess:
    """The process, where it listens, and what it says at its end."""

    def __init__(self, delay_s: float, grace_s: float) -> None:
        command = [sys.executable, "-m", f"{PACKAGE}.fake_process", str(delay_s), str(grace_s)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()
        self.port = int(self.url.rpartition(":")[2])

    def last_words(self) -> str:
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return out

    def refuses_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False


@contextmanager
def running(delay_s: float, grace_s: float) -> Iterator[ServerProcess]:
    server = ServerProcess(delay_s, grace_s)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_running_requests_finish(number: int) -> None:
    body = {"prompt": "finish me", "max_tokens": 100}
    with running(0.05, 60) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        with RawClient(server.port, "/v1/completions", body | {"stream": True}) as client:
            received = client.read_until(b"data: ")
            server.process.send_signal(number)
            eventually(server.refuses_connections)
            received += client.read_all()
        assert received.rstrip().endswith(b"data: [DONE]\n\n\r\n0".rstrip())
        assert whole.result().json()["choices"][0]["text"] == "finish me"
        assert server.last_words() == "closed=1 live=0 {'stop': 2}\n"


def test_requests_over_the_grace_time_end_with_an_error() -> None:
    with running(0.01, 0.5) as server, ThreadPoolExecutor(2) as pool:
        url = f"{server.url}/v1/completions"
        whole = pool.submit(httpx.post, url, json=ENDLESS, timeout=60)
        stream = pool.submit(httpx.post, url, json=ENDLESS | {"stream": True}, timeout=60)
        running_metric = "kvloom_running 2.0"
        eventually(lambda: running_metric in httpx.get(f"{server.url}/metrics").text)
        server.process.terminate()
        assert assert_openai_error(whole.result(), 503)["code"] == "shutting_down"
        events = events_of(stream.result().text)
        assert events[-1]["error"]["code"] == "shutting_down"
        assert len(events) > 1
        assert server.last_words() == "closed=1 live=0 {'abort': 2}\n"


def test_a_second_signal_ends_at_once() -> None:
    with (
        running(0.01, 600) as server,
        RawClient(server.port, "/v1/completions", ENDLESS | {"stream": True}) as client,
    ):
        client.read_until(b"data: ")
        server.process.terminate()
        eventually(server.refuses_connections)
        server.process.terminate()
        server.last_words()


def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    with running(0, 600) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        server.process.terminate()
        assert server.last_words() == "closed=1 live=0 {}\n"


def test_a_public_address_needs_a_key() -> None:
    config = ServerConfig(host="0.0.0.0", port=0)
    llm = FakeAsyncLLM()
    with pytest.raises(RequestError, match="API key"):
        run(create_app(llm, config), config)
    assert llm.closed == 0


def test_says_where_it_listens(shared_server: RunningServer) -> None:
    assert shared_server.url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{shared_server.url}/health").status_code == 200


def test_names_an_ipv6_address_in_brackets() -> None:
    with RunningServer(host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_taken_port_is_said_clearly(shared_server: RunningServer) -> None:
    config = ServerConfig(port=shared_server.port)
    with pytest.raises(RequestError, match="port") as caught:
        run(create_app(FakeAsyncLLM(), config), config)
    assert caught.value.param == "port"


def test_small_replies_are_sent_at_once() -> None:
    with (
        listen(ServerConfig(port=0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=30),
    ):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
