"""The application as a whole: error shapes whatever is sent, and pages without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvloom.errors import CapacityError, RequestError, UnsupportedModelError
from kvloom.serve.schemas import ChatBody, CompletionBody
from kvloom.serve.unsupported import CHAT

from .fake_llm import FakeAsyncLLM
from .running import RunningServer, assert_openai_error, eventually

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
NAMES = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *CHAT, "tokens"})
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 30),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool"]) | values, "content": values},
        optional={"name": values, "tool_calls": values},
    ),
    max_size=3,
)
prompts = st.text(max_size=20) | st.lists(st.integers(-1, 300), max_size=9) | values
bodies = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(NAMES, values)
    | {"messages": messages | values, "prompt": prompts, "model": st.just("echo") | values},
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[RunningServer, httpx.Client]]:
    with (
        RunningServer(FakeAsyncLLM(max_model_len=96), max_body_bytes=4096) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield server, client
        assert client.get("/health").json()["status"] == "ok"
        eventually(lambda: server.llm.live == 0)


def assert_fair(response: httpx.Response) -> None:
    """Whatever was sent, the reply is an answer or a client's error in OpenAI's shape."""
    if response.status_code != 200:
        assert_openai_error(response)


@FUZZ
@given(path=st.sampled_from(PATHS), body=bodies)
def test_any_fields_are_answered_or_refused(
    fuzzed: tuple[RunningServer, httpx.Client], path: str, body: dict[str, Any]
) -> None:
    headers = {"Content-Type": "application/json"}
    assert_fair(fuzzed[1].post(path, content=json.dumps(body), headers=headers))


@FUZZ
@given(path=st.sampled_from(PATHS), field=st.sampled_from(NAMES), value=values)
def test_one_strange_field_is_answered_or_refused(
    fuzzed: tuple[RunningServer, httpx.Client], path: str, field: str, value: Any
) -> None:
    needed = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body = json.dumps(needed | {field: value})
    headers = {"Content-Type": "application/json"}
    assert_fair(fuzzed[1].post(path, content=body, headers=headers))


@FUZZ
@given(path=st.sampled_from(PATHS), body=values)
def test_any_json_is_answered_or_refused(
    fuzzed: tuple[RunningServer, httpx.Client], path: str, body: Any
) -> None:
    headers = {"Content-Type": "application/json"}
    assert_fair(fuzzed[1].post(path, content=json.dumps(body), headers=headers))


@FUZZ
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=64),
    kind=st.sampled_from(["application/json", "text/plain", "application/octet-stream", ""]),
)
def test_any_bytes_are_refused(
    fuzzed: tuple[RunningServer, httpx.Client], path: str, body: bytes, kind: str
) -> None:
    response = fuzzed[1].post(path, content=body, headers={"Content-Type": kind} if kind else {})
    assert_openai_error(response)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[" * 100_000,
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": 1' + b"0" * 5000 + b"}",
        b'"text"',
        b"[]",
        b"null",
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_malformed_json_is_refused(shared_server: RunningServer, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{shared_server.url}{path}", content=body, headers=headers)
    error = assert_openai_error(response, 400)
    assert "JSON" in error["message"]


def test_json_must_be_declared(shared_server: RunningServer) -> None:
    # A web page can send text/plain to any server without asking; it must not reach the model.
    headers = {"Content-Type": "text/plain"}
    response = httpx.post(
        f"{shared_server.url}/v1/completions", content=b'{"prompt": "x"}', headers=headers
    )
    assert "application/json" in assert_openai_error(response, 400)["message"]


def test_unknown_routes_and_methods_keep_the_shape(shared_server: RunningServer) -> None:
    assert assert_openai_error(shared_server.get("/v2/models"), 404)["code"] == "unknown_route"
    assert_openai_error(shared_server.post("/v1/completions/", {"prompt": "x"}), 404)
    response = shared_server.get("/v1/completions")
    assert assert_openai_error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert_openai_error(httpx.request("BREW", f"{shared_server.url}/v1/models"), 405)


def test_error_messages_do_not_grow_with_the_request(shared_server: RunningServer) -> None:
    body = {"prompt": "x", "model": "m" * 100_000}
    assert len(shared_server.post("/v1/completions", body).content) < 5000
    assert len(shared_server.post("/v1/completions", {"n" * 100_000: 1}).content) < 5000


@pytest.mark.parametrize(
    ("failure", "status", "param", "code"),
    [
        (RequestError("No.", param="prompt"), 400, "prompt", None),
        (CapacityError("It never fits."), 400, None, "kv_memory_exceeded"),
        (CapacityError("Full.", retry_after_s=1.2), 429, None, "queue_full"),
        (UnsupportedModelError("The model cannot."), 400, None, None),
        (RuntimeError("secret detail"), 500, None, "engine_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_a_status(
    server: RunningServer,
    failure: Exception,
    status: int,
    param: str | None,
    code: str | None,
    stream: bool,
) -> None:
    server.llm.failure = failure
    response = server.post("/v1/completions", {"prompt": "x", "stream": stream})
    error = assert_openai_error(response, status)
    assert error["param"] == param
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert response.headers.get("retry-after") == ("2" if status == 429 else None)

    server.llm.failure = None
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200


def test_a_full_queue_is_a_rate_limit_to_the_client() -> None:
    with RunningServer(FakeAsyncLLM(max_live=0)) as server:
        with pytest.raises(openai.RateLimitError):
            server.openai().completions.create(model="echo", prompt="x")
        # The client asks again by itself, after the time it was told.
        server.llm.max_live = 1
        reply = server.openai(max_retries=2).completions.create(model="echo", prompt="x")
        assert reply.choices[0].text == "x"


def test_one_refused_prompt_ends_the_others(server: RunningServer) -> None:
    server.llm.hold_after = 1
    prompts = [*["x"] * 20, "y" * 5000]
    assert_openai_error(server.post("/v1/completions", {"prompt": prompts}), 400)
    eventually(lambda: server.llm.live == 0)


def test_a_given_up_request_is_no_answer(server: RunningServer) -> None:
    server.llm.abort_after = 2
    error = assert_openai_error(server.post("/v1/completions", {"prompt": "xyz"}), 500)
    assert "gave the request up" in error["message"]


def test_pages_come_with_their_scripts(shared_server: RunningServer) -> None:
    for path in ("/docs", "/redoc"):
        page = shared_server.get(path).text
        sources = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert sources
        for source in sources:
            assert source.startswith("/")
            assert shared_server.get(source).status_code == 200


def test_openapi_describes_the_bodies(shared_server: RunningServer) -> None:
    schema = shared_server.get("/openapi.json").json()
    assert {*PATHS, "/v1/models", "/health", "/metrics"} <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "temperature", "top_k", "stream_options"} <= set(fields)
    assert "tools" not in fields


def test_the_engine_ends_with_the_server() -> None:
    with RunningServer() as server:
        assert server.llm.closed == 0
    assert server.llm.closed == 1
