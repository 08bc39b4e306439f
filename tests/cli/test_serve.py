"""`kvloom serve`: serves a model, ends when asked to, and says what is wrong before it loads."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.cli.conftest import KVLOOM, SMALL, Invoke, assert_error


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its URL."""
    process = subprocess.Popen(
        [*KVLOOM, "serve", "--port", "0", *SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    try:
        assert process.stderr is not None
        seen = ""
        while (found := re.search(r"at (http://\S+)/v1", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def assert_stops(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err


def test_answers_until_it_is_terminated(tiny_model: str) -> None:
    with serving("-m", tiny_model) as (process, url), httpx.Client(timeout=60) as client:
        assert client.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        body = {"model": "tiny", "prompt": "def", "max_tokens": 3, "temperature": 0}
        answer = client.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert_stops(process, signal.SIGTERM)


def test_keys_come_from_options_or_the_environment(tiny_model: str) -> None:
    name = ("--served-model-name", "mine")
    with serving("-m", tiny_model, *name, KVLOOM_API_KEY="one two") as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.json()["data"][0]["id"] == "mine"
        assert_stops(process, signal.SIGINT)


def test_a_taken_port_is_said_before_the_model_is_loaded(invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = invoke("serve", "-m", "nobody/nothing", "--port", port)
    assert_error(result, 1, f"port {port}")


def test_a_public_address_without_a_key_is_refused(invoke: Invoke) -> None:
    assert_error(invoke("serve", "-m", "nobody/nothing", "--host", "0.0.0.0"), 1, "API key")


def test_a_key_that_no_header_can_carry_is_refused(invoke: Invoke) -> None:
    result = invoke("serve", "-m", "nobody/nothing", "--api-key", "schlüssel")
    assert_error(result, 1, "ASCII")
    assert "schlüssel" not in result.stderr


def test_an_unknown_model_ends_the_server(invoke: Invoke) -> None:
    assert_error(invoke("serve", "-m", "nobody/nothing", "--port", "0"), 1, "nobody/nothing")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "70000"),
        ("--port", "http"),
        ("--kv-memory", "garbage"),
        ("--max-body", "0"),
        ("--grace", "-1"),
        ("--threads", "0"),
        ("--step-tokens", "0"),
        ("--max-running", "0"),
        ("--max-waiting", "-1"),
    ],
)
def test_wrong_usage_is_exit_code_2(invoke: Invoke, option: str, value: str) -> None:
    assert_error(invoke("serve", option, value), 2, option)
