"""Documents as parts of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from kvloom.outputs import Fidelity
from kvloom.serve.content import ChunkPart
from kvloom.serve.documents import Snapshot
from kvloom.serve.parts import PromptPart, cut_end, is_joined, joined
from kvloom.store.key import ANYBODY

from .running import RunningServer, assert_openai_error, events_of

ROOT = "/v1/kv/documents"


def document(tokens: list[int], fidelity: Fidelity = "exact", num_lead: int = 0) -> PromptPart:
    kept = Snapshot("doc-1", 1, "", tokens, fidelity, object(), num_lead)
    return PromptPart(tuple(tokens[num_lead:]), kept)


def text(*tokens: int) -> PromptPart:
    return PromptPart(tokens)


def chunk(*tokens: int) -> PromptPart:
    return PromptPart(tokens, ChunkPart("x"))


def test_the_first_part_gives_its_kv() -> None:
    first, second = document([1, 2]), document([3])
    assert joined([first, second, text(4)], ANYBODY).tokens == [1, 2, 3, 4]
    assert joined([first, second, text(4)], ANYBODY).base is first.source.kv  # type: ignore[union-attr]
    assert joined([text(4), first], ANYBODY).base is None
    assert joined([text(4), first], ANYBODY).tokens == [4, 1, 2]
    assert joined([chunk(4), first], ANYBODY).base is None
    assert joined([document([1, 2], num_lead=1)], ANYBODY).base is None
    assert joined([], ANYBODY).tokens == []
    assert joined([first], ANYBODY).followed_by([9]).tokens == [1, 2, 9]


@pytest.mark.parametrize("wanted", [None, *get_args(Fidelity)])
@pytest.mark.parametrize("has", get_args(Fidelity))
def test_kv_is_not_worse_than_was_asked_for(has: Fidelity, wanted: Fidelity | None) -> None:
    ranks = {"shifted": 0, "repaired": 1, "exact": 2, None: 0}
    ask = joined([document([1], has), text(2)], ANYBODY, wanted)
    assert ask.exact_only == (ranks[has] < ranks[wanted])


@pytest.mark.parametrize("wanted", [None, *get_args(Fidelity)])
def test_only_what_stands_elsewhere_is_joined(wanted: Fidelity | None) -> None:
    approximate = wanted not in (None, "exact")
    one = document([1, 2])
    assert not is_joined([one, text(3)], wanted)
    assert not is_joined([text(3)], wanted)
    assert not is_joined([], wanted)
    for parts in ([text(3), one], [one, one], [chunk(3)], [document([1, 2], num_lead=1)]):
        assert is_joined(parts, wanted) is approximate
    assert is_joined([document([1], "shifted")], wanted) is (wanted == "repaired")


def test_an_end_has_no_kv() -> None:
    one = document([1, 2])
    assert cut_end([text(0), one, text(3), text(4)]) == ([text(0), one], [3, 4])
    assert cut_end([text(3), text(4)]) == ([], [3, 4])
    assert cut_end([one]) == ([one], [])


@pytest.fixture(scope="module")
def kept() -> Iterator[RunningServer]:
    """A server with documents."""
    with RunningServer() as server:
        yield server


def make(server: RunningServer, text: str) -> str:
    name: str = server.post(ROOT, {"text": text}).json()["id"]
    return name


def test_a_completion_goes_on_from_documents(kept: RunningServer) -> None:
    one, two = make(kept, "one "), make(kept, "two ")
    client = kept.openai()
    # The fake model repeats its prompt.
    reply = client.completions.create(
        model="echo", prompt=["three", "four"], extra_body={"document": one}, max_tokens=100
    )
    assert [choice.text for choice in reply.choices] == ["one three", "one four"]
    assert reply.kvloom["documents"] == [{"id": one, "version": 1}]
    receipt = reply.kvloom["receipt"]
    assert receipt["fidelity"] == "exact"
    assert receipt["tokens"] == {"exact": reply.usage.prompt_tokens}
    body = {"documents": [one, two], "prompt": "end", "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = kept.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "one two end"
    alone = kept.post("/v1/completions", {"document": one, "max_tokens": 50}).json()
    assert alone["choices"][0]["text"] == "one "


def test_fidelity_decides_what_is_used(kept: RunningServer) -> None:
    name = make(kept, "text that is moved")
    path = f"{kept.url}{ROOT}/{name}"
    kept.client.patch(path, json={"text": "a text that is moved", "fidelity": "shifted"})
    for fidelity, exact_only in (("exact", True), ("shifted", False), (None, False)):
        body = {"document": name, "max_tokens": 1, "kvloom": {"fidelity": fidelity}}
        assert kept.post("/v1/completions", body).status_code == 200
        base, used = kept.llm.bases[-1]
        assert base is not None
        assert used is exact_only


def test_documents_stand_in_messages(kept: RunningServer) -> None:
    name = make(kept, "Anna bakes.")
    parts: list[Any] = [
        {"type": "text", "text": "Read:"},
        {"type": "document", "document_id": name},
        {"type": "text", "text": "Who bakes?"},
    ]
    messages: list[Any] = [{"role": "user", "content": parts}]
    plain: list[Any] = [{"role": "user", "content": "Read:\nAnna bakes.\nWho bakes?"}]
    client = kept.openai()
    reply = client.chat.completions.create(model="echo", messages=messages)
    same = client.chat.completions.create(model="echo", messages=plain)
    assert reply.choices[0].message.content == same.choices[0].message.content
    assert reply.kvloom["documents"] == [{"id": name, "version": 1}]
    assert getattr(same, "kvloom", None) is None
    sent = {"messages": messages}
    assert kept.post("/tokenize", sent).json() == kept.post("/tokenize", {"messages": plain}).json()
    stream = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
    assert stream[-1].kvloom["documents"] == [{"id": name, "version": 1}]
    assert stream[-1].choices == []


def test_receipts_come_to_those_who_ask(kept: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": "x", "kvloom": {}}
    assert kept.post("/v1/completions", body).json()["kvloom"]["receipt"]["fidelity"] == "exact"
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    *_, last, done = events_of(kept.post("/v1/completions", streamed).text)
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 2
    assert last["kvloom"]["receipt"]["computed_tokens"] >= 1


PART = {"type": "document", "document_id": "doc-1"}
CHUNK = {"type": "chunk", "text": "x"}
REPAIRED = {"fidelity": "repaired"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"document": "x", "documents": ["y"]}, "documents"),
        ("completions", {"document": "x", "add_special_tokens": True}, "add_special_tokens"),
        ("completions", {"documents": [1]}, "documents.0"),
        ("completions", {"documents": []}, "prompt"),
        ("completions", {"documents": ["x"] * 65}, "documents"),
        ("completions", {"documents": [{"text": ""}]}, "documents.0"),
        ("completions", {"documents": [{"text": "x", "id": "y"}]}, "documents.0"),
        ("completions", {"documents": [{"text": "x"}], "suffix": "y", "prompt": "z"}, "suffix"),
        ("completions", {"prompt": "x", "kvloom": {"fidelity": "most"}}, "kvloom.fidelity"),
        ("completions", {"prompt": "x", "kvloom": {"docs": 1}}, "kvloom.docs"),
        ("completions", {"prompt": "x", "kvloom": True}, "kvloom"),
        ("completions", {"prompt": "x", "kvloom": {"share": 0.5}}, "kvloom.share"),
        ("completions", {"prompt": "x", "kvloom": REPAIRED | {"share": 2}}, "kvloom.share"),
        ("completions", {"prompt": "x", "kvloom": REPAIRED | {"planner": "x"}}, "kvloom.planner"),
        ("completions", {"prompt": "x", "kvloom": {"planner": "blend"}}, "kvloom.planner"),
        ("chat/completions", {"messages": [CHUNK | {"text": ""}]}, "messages.0.content"),
        ("chat/completions", {"messages": [CHUNK | {"more": "x"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"type": "chunk"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [PART | {"text": "x"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"type": "document"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [PART | {"document_id": 1}]}, "messages.0.content"),
        ("chat/completions", {"messages": ["x"]}, "messages.0.content"),
    ],
)
def test_bad_parts_are_named(
    kept: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    if "messages" in body:
        body = {"messages": [{"role": "user", "content": body["messages"]}]}
    assert assert_openai_error(kept.post(f"/v1/{path}", body), 400)["param"] == param
