"""The routes that are not generation, and what bodies are refused for."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from .running import RunningServer, assert_openai_error

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"prompt": "hi"}


def test_lists_and_describes_the_model(shared_server: RunningServer) -> None:
    client = shared_server.openai()
    (model,) = client.models.list().data
    assert model.id == "echo"
    assert model.owned_by == "kvloom"
    assert client.models.retrieve("echo").max_model_len == 4096


def test_serves_the_model_under_a_given_name() -> None:
    with RunningServer(served_model_name="org/tiny") as server:
        client = server.openai()
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        assert client.completions.create(model="org/tiny", prompt="p").model == "org/tiny"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="echo", prompt="p")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_unknown_model_is_not_found(shared_server: RunningServer, path: str) -> None:
    body = {"model": "gpt-9"} | (CHAT if "chat" in path else COMPLETION)
    error = assert_openai_error(shared_server.post(path, body), 404)
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"]
    assert "echo" in error["message"]
    assert_openai_error(shared_server.get("/v1/models/gpt-9"), 404)


def test_model_may_be_left_out(shared_server: RunningServer) -> None:
    reply = shared_server.post("/v1/chat/completions", CHAT).json()
    assert reply["model"] == "echo"


UNSUPPORTED_CHAT: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content"},
    "store": True,
    "reasoning_effort": "high",
    "verbosity": "low",
    "service_tier": "flex",
    "web_search_options": {},
    "moderation": {},
    "echo": True,
    "chat_template": "x",
    "structured_outputs": {"json": {}},
    "guided_json": {},
    "use_beam_search": True,
    "prompt_logprobs": 1,
    "add_generation_prompt": False,
}
UNSUPPORTED_COMPLETION: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "guided_regex": "a",
    "bad_words": ["x"],
    "truncate_prompt_tokens": 5,
    "best_of": 3,
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_CHAT))
def test_unsupported_chat_fields_are_named(shared_server: RunningServer, name: str) -> None:
    body = CHAT | {name: UNSUPPORTED_CHAT[name]}
    error = assert_openai_error(shared_server.post("/v1/chat/completions", body), 400)
    assert error["param"] == name
    assert "not supported yet" in error["message"]


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_COMPLETION))
def test_unsupported_completion_fields_are_named(shared_server: RunningServer, name: str) -> None:
    body = COMPLETION | {name: UNSUPPORTED_COMPLETION[name]}
    error = assert_openai_error(shared_server.post("/v1/completions", body), 400)
    assert error["param"] == name
    assert "not supported yet" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False},
        {"tools": None, "audio": None, "stop": None, "temperature": None, "n": None},
        {"user": "u", "metadata": {"run": "7"}, "prompt_cache_key": "k", "service_tier": "auto"},
        {"top_k": -1, "length_penalty": 1.0, "use_beam_search": False},
    ],
)
def test_fields_that_ask_nothing_are_accepted(
    shared_server: RunningServer, fields: dict[str, Any]
) -> None:
    response = shared_server.post("/v1/chat/completions", CHAT | fields)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "user:hi\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"temprature": 0}, "temprature"),
        ("/v1/completions", COMPLETION | {"temprature": 0}, "temprature"),
        ("/tokenize", COMPLETION | {"strs": True}, "strs"),
        ("/v1/completions", COMPLETION | {"stream_options": {"x": 1}}, "stream_options.x"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": [1.5]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [2**70]}, "prompt"),
        ("/v1/completions", COMPLETION | {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", COMPLETION | {"max_tokens": -1}, "max_tokens"),
        ("/v1/completions", COMPLETION | {"logprobs": 21}, "logprobs"),
        ("/v1/completions", COMPLETION | {"n": 0}, "n"),
        ("/v1/completions", COMPLETION | {"n": 10**9}, "n"),
        ("/v1/completions", COMPLETION | {"temperature": "0"}, "temperature"),
        ("/v1/completions", COMPLETION | {"temperature": -1}, "temperature"),
        ("/v1/completions", COMPLETION | {"top_p": 0}, "top_p"),
        ("/v1/completions", COMPLETION | {"seed": 10**400}, "seed"),
        ("/v1/completions", COMPLETION | {"temperature": 10**400}, "temperature"),
        ("/v1/completions", COMPLETION | {"stop": [""]}, "stop"),
        ("/v1/completions", COMPLETION | {"stop": ["x"] * 65}, "stop"),
        ("/v1/completions", COMPLETION | {"stop": [1]}, "stop.0"),
        ("/v1/completions", COMPLETION | {"logit_bias": {"a": 1}}, "logit_bias"),
        ("/v1/completions", COMPLETION | {"logit_bias": {"1": 101}}, "logit_bias"),
        ("/v1/completions", COMPLETION | {"min_tokens": 17}, "min_tokens"),
        ("/v1/completions", COMPLETION | {"stream_options": {}}, "stream_options"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
        ),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"logprobs": 2}, "logprobs"),
        (
            "/v1/chat/completions",
            CHAT | {"max_tokens": 1, "max_completion_tokens": 2},
            "max_completion_tokens",
        ),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", CHAT | COMPLETION, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_bad_fields_are_named(
    shared_server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    error = assert_openai_error(shared_server.post(path, body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", ["", "plain", "zwölf 🙂"])
def test_tokenize_and_detokenize_are_inverse(shared_server: RunningServer, text: str) -> None:
    body = {"model": "echo", "prompt": text, "add_special_tokens": False}
    reply = shared_server.post("/tokenize", body).json()
    assert reply == {
        "count": len(text.encode()),
        "max_model_len": 4096,
        "tokens": list(text.encode()),
        "token_strs": None,
    }
    back = shared_server.post("/detokenize", {"tokens": reply["tokens"]}).json()
    assert back == {"prompt": text}


def test_tokenize_conversation_and_token_texts(shared_server: RunningServer) -> None:
    reply = shared_server.post("/tokenize", CHAT | {"return_token_strs": True}).json()
    assert reply["token_strs"] == [*"user:hi\n"]
    text = shared_server.post("/detokenize", {"tokens": reply["tokens"]}).json()["prompt"]
    assert text == "user:hi\n"


def test_health_follows_the_engine(server: RunningServer) -> None:
    assert server.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    server.llm.stats_failure = RuntimeError("the engine's thread ended")
    assert_openai_error(server.get("/health"), 503)
