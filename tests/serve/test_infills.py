"""`/infill` and `suffix`, as editors and the OpenAI client use them."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.serve.infill import SPELLINGS

from .fake_llm import FakeAsyncLLM
from .running import RunningServer, assert_openai_error, events_of

GAP = {"input_prefix": "def f():\n", "input_suffix": "\nf()\n", "temperature": 0}
# What the plugins of Vim and VS Code send.
EDITOR = GAP | {
    "input_extra": [{"text": "x = 1", "time": [5, 7], "filename": "a.py"}],
    "prompt": "    ",
    "n_predict": 8,
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_n", "truncated"],
}


@pytest.fixture(scope="module")
def coder() -> Any:
    """A server whose tokenizer has control tokens for gaps."""
    with RunningServer(FakeAsyncLLM(controls=SPELLINGS[0].all)) as server:
        yield server


def test_the_reply_has_the_fields_that_clients_read(shared_server: RunningServer) -> None:
    reply = shared_server.post("/infill", GAP | {"return_tokens": True}).json()
    # The fake model repeats its prompt.
    assert reply["content"] == reply["prompt"].removeprefix("<s>")
    assert reply["stop"] is True
    assert reply["stop_type"] == "eos"
    assert reply["tokens"][:-1] == list(reply["content"].encode())
    assert reply["tokens_evaluated"] == len(reply["prompt"].removeprefix("<s>")) + 1
    assert reply["tokens_predicted"] == len(reply["tokens"])
    assert reply["truncated"] is False
    assert reply["has_new_line"] is True
    assert reply["model"] == "echo"
    assert reply["timings"]["predicted_n"] == reply["tokens_predicted"]
    assert reply["kvloom"]["infill"] == "emulated"
    assert shared_server.post("/infill", GAP).json()["tokens"] == []


def test_what_editors_send_is_answered(coder: RunningServer) -> None:
    reply = coder.post("/infill", EDITOR).json()
    assert set(reply) == {"content", "prompt_n", "predicted_n", "truncated", "kvloom"}
    assert reply["predicted_n"] == 8
    assert len(reply["content"]) == 8
    assert reply["kvloom"]["infill"] == "native"
    hints = ["n_indent", "samplers", "t_max_predict_ms", "t_max_prompt_ms"]
    assert reply["kvloom"]["ignored"] == hints


def test_streams_end_with_the_whole_picture(coder: RunningServer) -> None:
    whole = coder.post("/infill", GAP | {"n_predict": 12}).json()
    events = events_of(coder.post("/infill", GAP | {"n_predict": 12, "stream": True}).text)
    assert "".join(each["content"] for each in events) == whole["content"]
    assert [each["stop"] for each in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["stop_type"] == whole["stop_type"] == "limit"
    assert events[-1]["kvloom"]["infill"] == "native"
    assert events[-1]["prompt"] == "<s><|fim_prefix|>def f():\n<|fim_suffix|>\nf()\n<|fim_middle|>"


def test_stop_words_and_reading_the_prompt_only(coder: RunningServer) -> None:
    reply = coder.post("/infill", GAP | {"stop": ["():"]}).json()
    assert (reply["stop_type"], reply["stopping_word"]) == ("word", "():")
    assert reply["content"] == "def f"
    for stream in (False, True):
        reply = coder.post("/infill", GAP | {"n_predict": 0, "stream": stream})
        fields = events_of(reply.text)[-1] if stream else reply.json()
        assert fields["content"] == ""
        assert fields["tokens_predicted"] == 0
        assert fields["tokens_evaluated"] > 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": 1}, "input_suffix"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra.0.text"),
        ({"input_extra": [{"text": "a", "why": 1}]}, "input_extra.0.why"),
        ({"n_predict": -2}, "n_predict"),
        ({"temperature": -1}, "temperature"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"n_probs": 1}, "n_probs"),
        ({"id_slot": 3}, "id_slot"),
        ({"lora": [{"id": 0}]}, "lora"),
        ({"kvloom": {"fidelty": "exact"}}, "kvloom.fidelty"),
        ({"prompts": "x"}, "prompts"),
    ],
)
def test_bad_fields_are_named(
    shared_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    assert assert_openai_error(shared_server.post("/infill", GAP | fields), 400)["param"] == param
    unknown = GAP | {"model": "gpt-9"}
    assert assert_openai_error(shared_server.post("/infill", unknown), 404)["param"] == "model"


def test_suffix_of_a_completion(shared_server: RunningServer, coder: RunningServer) -> None:
    for server, kind in ((shared_server, "emulated"), (coder, "native")):
        reply = server.openai().completions.create(
            model="echo", prompt=["one", "two"], suffix="behind", max_tokens=200
        )
        assert reply.kvloom["infill"] == kind
        for choice, prompt in zip(reply.choices, ("one", "two"), strict=True):
            assert prompt in choice.text
            assert "behind" in choice.text
    plain = shared_server.post("/v1/completions", {"prompt": "x", "suffix": ""}).json()
    assert "kvloom" not in plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"document": "doc-1"}, "suffix"),
    ],
)
def test_what_does_not_go_with_suffix(
    shared_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    body = fields | {"suffix": "behind"}
    assert assert_openai_error(shared_server.post("/v1/completions", body), 400)["param"] == param
