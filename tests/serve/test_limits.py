"""Who may ask and how much."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

from kvloom.errors import RequestError
from kvloom.serve.config import ServerConfig
from kvloom.serve.limits import (
    check_address,
    digests_of,
    host_is_local,
    is_loopback,
    known_key,
)

from .running import RunningServer, assert_openai_error, eventually

KEYS = ("sk-first-key", "sk-second")


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with RunningServer(api_keys=KEYS) as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_address(ServerConfig(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.7", "10.0.0.1", "example.org", "", "127.0.0.1.evil.org"]
)
def test_public_addresses_need_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(RequestError, match="API key") as caught:
        check_address(ServerConfig(host=host))
    assert caught.value.param == "host"
    check_address(ServerConfig(host=host, api_keys=("k",)))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(locked: RunningServer, key: str) -> None:
    reply = locked.openai(api_key=key).completions.create(model="echo", prompt="x")
    assert reply.choices[0].text == "x"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer sk-first-ke",
        "Bearer sk-first-keyy",
        "Basic sk-first-key",
        "sk-first-key",
        "Bearer sk-first-key,sk-second",
        "Bearer \u00fc",
    ],
)
def test_anything_else_does_not(locked: RunningServer, header: str | None) -> None:
    assert known_key(header, digests_of(KEYS)) is None
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = locked.post("/v1/completions", {"prompt": "x"}, headers=headers)
    error = assert_openai_error(response, 401)
    assert error["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert not any(key in response.text for key in KEYS)


def test_the_client_sees_an_authentication_error(locked: RunningServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        locked.openai(api_key="wrong").models.list()


def test_what_tells_nothing_stays_open(locked: RunningServer) -> None:
    assert locked.get("/health").status_code == 200
    assert locked.get("/docs").status_code == 200
    for path in ("/metrics", "/v1/models", "/healthy", "/docs../v1/models", "/nowhere"):
        assert_openai_error(locked.get(path), 401)


@pytest.mark.parametrize(
    ("header", "local"),
    [
        (None, True),
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("192.168.0.2", False),
    ],
)
def test_host_headers(header: str | None, local: bool) -> None:
    assert host_is_local(header) is local


def test_a_rebound_name_does_not_reach_an_open_server(
    shared_server: RunningServer, locked: RunningServer
) -> None:
    headers = {"Host": "evil.example"}
    response = shared_server.post("/v1/completions", {"prompt": "x"}, headers=headers)
    assert assert_openai_error(response, 403)["code"] == "host_not_allowed"
    headers["Authorization"] = f"Bearer {KEYS[0]}"
    assert locked.get("/v1/models", headers=headers).status_code == 200


def test_a_body_over_the_limit_is_refused_and_the_connection_lives() -> None:
    with (
        RunningServer(max_body_bytes=1000) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        for size in (1000, 2000):
            response = client.post("/v1/completions", json={"prompt": "x" * size})
            error = assert_openai_error(response, 413)
            assert error["code"] == "body_too_large"
            assert "1000 bytes" in error["message"]
        assert client.post("/v1/completions", json={"prompt": "x" * 900}).status_code == 200
        assert server.llm.submitted[0][0][1:] == [ord("x")] * 900
        assert len(server.llm.submitted) == 1


def test_a_body_of_unknown_length_is_limited_too() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(30):
            yield b"x" * 100
        yield b'"}'

    with RunningServer(max_body_bytes=1000) as server:
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/completions", content=pieces(), headers=headers)
        assert_openai_error(response, 413)


def test_a_huge_declared_body_is_not_waited_for() -> None:
    with (
        RunningServer(max_body_bytes=1000) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as client,
    ):
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_holds_nothing() -> None:
    with RunningServer() as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
        metric = "kvloom_http_requests_active"
        active = server.app.state.service.metrics.registry.get_sample_value
        eventually(lambda: active(metric) == 0)
        assert server.llm.submitted == []
