"""Documents over HTTP: what a client sends is what the document becomes, or nothing changes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import CapacityError, UnsupportedModelError
from kvloom.serve.logprobs import IMPOSSIBLE

from .fake_llm import FakeAsyncLLM
from .running import RunningServer, assert_openai_error, events_of, eventually

ROOT = "/v1/kv/documents"
TEXT = "one\nzwölf 🙂 end\n"


@pytest.fixture(scope="module")
def kept() -> Iterator[RunningServer]:
    """A server whose documents nobody counts."""
    with RunningServer(max_documents=10**6) as server:
        yield server


def make(server: RunningServer, text: str = TEXT, **fields: Any) -> str:
    reply = server.post(ROOT, {"text": text} | fields)
    assert reply.status_code == 201, reply.text
    return f"{ROOT}/{reply.json()['id']}"


def patch(server: RunningServer, path: str, body: Any, **settings: Any) -> Any:
    return server.client.patch(f"{server.url}{path}", json=body, **settings)


def text_of(server: RunningServer, path: str) -> str:
    return server.get(path, params={"text": "true"}).json()["text"]


def edit(start: int, end: int, text: str) -> dict[str, Any]:
    return {"start": start, "end": end, "text": text}


def line_edit(start: tuple[int, int], end: tuple[int, int], text: str) -> dict[str, Any]:
    places = [{"line": line, "character": column} for line, column in (start, end)]
    return {"range": {"start": places[0], "end": places[1]}, "text": text}


def test_a_document_is_made_read_and_deleted(kept: RunningServer) -> None:
    made = kept.post(ROOT, {"text": TEXT, "name": "notes", "model": "echo"})
    fields = made.json()
    assert made.status_code == 201
    assert made.headers["etag"] == '"1"'
    assert fields["name"] == "notes"
    assert fields["version"] == 1
    assert fields["num_tokens"] == 1 + len(TEXT.encode())
    path = f"{ROOT}/{fields['id']}"
    read = kept.get(path).json()
    assert "text" not in read
    assert read["bytes"] > 0
    assert read["provenance"]["tokens"] == {"exact": read["num_tokens"]}
    assert read["fidelity"] == "exact"
    assert fields["id"] in [each["id"] for each in kept.get(ROOT).json()["data"]]
    assert text_of(kept, path) == TEXT
    assert kept.client.delete(f"{kept.url}{path}").json()["deleted"] is True
    for answer in (kept.get(path), patch(kept, path, {"text": ""}), kept.post(f"{path}/fork", {})):
        assert assert_openai_error(answer, 404)["code"] == "document_not_found"


def test_token_ids_make_a_document_too(kept: RunningServer) -> None:
    reply = kept.post(ROOT, {"tokens": list(b"abc")}).json()
    assert reply["num_tokens"] == 3
    assert text_of(kept, f"{ROOT}/{reply['id']}") == "abc"


pieces = st.lists(st.sampled_from(["a", "zwölf", "🙂", "\n", "\r\n", " ", "</s>", "b\nc"])).map(
    "".join
)
numbers = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))
changes = st.lists(st.tuples(numbers, pieces), min_size=1, max_size=4)


def place_of(text: str, character: int) -> tuple[int, int]:
    """Return a character's line and column, one character at a time."""
    line = column = 0
    for this, behind in zip(text, text[1:] + " ", strict=False):
        if character == 0:
            break
        character -= 1
        ends = this == "\n" or (this == "\r" and behind != "\n")
        line, column = (
            (line + 1, 0) if ends else (line, column + len(this.encode("utf-16-le")) // 2)
        )
    return line, column


@settings(max_examples=60, deadline=None)
@given(text=pieces, requests=st.lists(st.tuples(st.booleans(), changes), max_size=3))
def test_edits_are_those_of_a_string(
    kept: RunningServer, text: str, requests: list[tuple[bool, Any]]
) -> None:
    path = make(kept, text)
    for version, (by_lines, wanted) in enumerate(requests, 1):
        sent = []
        if by_lines:
            for ends, new in wanted:
                # A place inside of "\r\n" has no name in lines and columns.
                start, end = sorted(number % (len(text) + 1) for number in ends)
                start -= text[start - 1 : start + 1] == "\r\n"
                end -= text[end - 1 : end + 1] == "\r\n"
                sent.append(line_edit(place_of(text, start), place_of(text, end), new))
                text = text[:start] + new + text[end:]
        else:
            edges = sorted(number % (len(text) + 1) for ends, _ in wanted for number in ends)
            starts, stops = edges[::2], edges[1::2]
            news = [new for _, new in wanted]
            spans = list(zip(starts, stops, news, strict=True))
            sent = [edit(start, end, new) for start, end, new in spans]
            if len(set(edges)) == len(edges):
                sent.reverse()  # places are those before the request, so the order says nothing
            rest = 0
            parts = []
            for start, end, new in spans:
                parts += [text[rest:start], new]
                rest = end
            text = "".join(parts) + text[rest:]
        reply = patch(kept, path, {"edits": sent, "version": version})
        assert reply.status_code == 200, reply.text
        assert reply.json()["version"] == version + 1
        assert text_of(kept, path) == text
    kept.client.delete(f"{kept.url}{path}")


def test_whole_texts_appended_text_and_receipts(kept: RunningServer) -> None:
    path = make(kept)
    assert patch(kept, path, {"append": "more"}).json()["receipt"] is None
    assert text_of(kept, path) == TEXT + "more"
    for fidelity in ("shifted", "repaired", "exact"):
        reply = patch(kept, path, {"text": fidelity, "fidelity": fidelity}).json()
        assert reply["receipt"]["fidelity"] == fidelity
        assert reply["fidelity"] == kept.get(path).json()["fidelity"] == fidelity
        assert text_of(kept, path) == fidelity
    patch(kept, path, {"edits": [{"text": "new"}], "fidelity": "shifted"})
    fork = kept.post(f"{path}/fork", {"name": "copy"}).json()
    assert fork["fidelity"] == "shifted"
    assert fork["version"] == 1
    repaired = kept.client.post(f"{kept.url}{path}/repair").json()
    assert repaired["fidelity"] == repaired["receipt"]["fidelity"] == "exact"
    assert repaired["version"] == 6
    assert kept.get(f"{ROOT}/{fork['id']}").json()["fidelity"] == "shifted"


def test_scores(kept: RunningServer) -> None:
    reply = kept.post(f"{make(kept)}/score", {"text": "ab"}).json()
    assert reply["tokens"] == [97, 98]
    assert reply["token_strs"] == ["a", "b"]
    assert reply["logprobs"] == [-1.0, IMPOSSIBLE]
    assert reply["total"] == IMPOSSIBLE
    assert math.isfinite(reply["total"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "edits"),
        ({"edits": []}, "edits"),
        ({"edits": [edit(0, 1, "x")], "text": "x"}, "edits"),
        ({"edits": [edit(0, 1, "x"), {"text": "all"}]}, "edits"),
        ({"edits": [edit(0, 3, "x"), edit(2, 4, "y")]}, "edits"),
        ({"edits": [edit(0, 3, "x"), edit(1, 1, "y")]}, "edits"),
        ({"edits": [edit(0, 1, "x")] * 1001}, "edits"),
        ({"edits": [edit(2, 1, "x")]}, "edits.0.end"),
        ({"edits": [edit(-1, 1, "x")]}, "edits.0.end"),
        ({"edits": [{"start": 1, "text": "x"}]}, "edits.0.end"),
        ({"edits": [edit(0, 1, "x") | line_edit((0, 0), (0, 0), "x")]}, "edits.0.range"),
        ({"edits": [edit(0, 1, "x") | {"why": 1}]}, "edits.0.why"),
        ({"edits": [{"start": "0", "end": 1, "text": "x"}]}, "edits.0.start"),
        ({"edits": [edit(0, len(TEXT) + 1, "x")]}, "range"),
        ({"edits": [edit(10**30, 10**30, "x")]}, "range"),
        ({"edits": [line_edit((0, 4), (0, 4), "x")]}, "range"),
        ({"edits": [line_edit((1, 7), (1, 7), "x")]}, "range"),
        ({"edits": [line_edit((9, 0), (9, 0), "x")]}, "range"),
        ({"edits": [line_edit((0, -1), (0, 0), "x")]}, "range"),
        ({"edits": [line_edit((-1, 0), (0, 0), "x")]}, "range"),
        ({"edits": [line_edit((1, 0), (0, 0), "x")]}, "range"),
        ({"edits": [line_edit((0, 0), (1, 0), ""), line_edit((1, 9), (1, 9), "x")]}, "range"),
        ({"text": "x", "fidelity": "roughly"}, "fidelity"),
        ({"text": "x", "fidelity": "repaired", "share": 2}, "share"),
        ({"text": "x", "fidelity": "repaired", "selector": "best"}, "selector"),
        ({"text": "x", "share": 0.1}, "share"),
        ({"append": "x", "fidelity": "shifted"}, "fidelity"),
        ({"text": "x" * 5000}, "prompt"),
        ({"append": "x" * 5000}, "prompt"),
        ({"text": "x", "vresion": 1}, "vresion"),
        ({"text": 1}, "text"),
        ("text", None),
    ],
)
def test_bad_changes_change_nothing(kept: RunningServer, body: Any, param: str | None) -> None:
    path = make(kept)
    before = kept.get(path, params={"text": "true"}).json()
    error = assert_openai_error(patch(kept, path, body), 400)
    assert error["param"] == param
    after = kept.get(path, params={"text": "true"}).json()
    assert after.pop("last_used") >= before.pop("last_used")
    assert after == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "x", "tokens": [1]}, "text"),
        ({"tokens": [999]}, "prompt"),
        ({"tokens": [-1]}, "prompt"),
        ({"tokens": "x"}, "tokens"),
        ({"text": "x" * 5000}, "prompt"),
        ({"text": "x", "name": "n" * 201}, "name"),
        ({"text": "x", "id": "doc-1"}, "id"),
    ],
)
def test_bad_documents_are_refused(kept: RunningServer, body: Any, param: str) -> None:
    assert assert_openai_error(kept.post(ROOT, body), 400)["param"] == param


def test_bad_questions_are_refused(kept: RunningServer) -> None:
    path = make(kept)
    assert assert_openai_error(kept.get(path, params={"txet": "1"}), 400)["param"] == "txet"
    assert assert_openai_error(kept.get(path, params={"text": "what"}), 400)["param"] == "text"
    assert assert_openai_error(kept.post(f"{path}/score", {"text": ""}), 400)["param"] == "text"
    assert assert_openai_error(kept.post(f"{path}/score", {}), 400)["param"] == "text"
    assert assert_openai_error(kept.post(f"{path}/fork", {"nmae": "x"}), 400)["param"] == "nmae"
    body = {"text": "x", "model": "gpt-9"}
    assert assert_openai_error(kept.post(ROOT, body), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "name",
    ["doc-0", "doc-" + "0" * 32, "..%2F..%2Fhealth", "%00", "doc-%0a", "x" * 5000, "%F0%9F%99%82"],
)
def test_unknown_ids_are_not_found(kept: RunningServer, name: str) -> None:
    for path in (f"{ROOT}/{name}", f"{ROOT}/{name}/score"):
        assert_openai_error(kept.client.request("PATCH", f"{kept.url}{path}", json={}), None)
    assert_openai_error(kept.get(f"{ROOT}/{name}"), 404)
    assert_openai_error(kept.post("/v1/completions", {"document": name}), 404)


def test_a_key_sees_its_own_documents_only() -> None:
    with RunningServer(api_keys=("mine", "yours"), max_documents=1) as server:
        keys = {key: {"Authorization": f"Bearer {key}"} for key in ("mine", "yours")}
        reply = server.post(ROOT, {"text": "secret"}, headers=keys["mine"])
        path = f"{ROOT}/{reply.json()['id']}"
        part = {"type": "document", "document_id": reply.json()["id"]}
        chat = {"messages": [{"role": "user", "content": [part]}]}
        asked = {"document": reply.json()["id"]}
        for key, status in (("mine", 200), ("yours", 404)):
            settings: Any = {"headers": keys[key]}
            assert server.get(path, **settings).status_code == status
            assert patch(server, path, {"text": "secret"}, **settings).status_code == status
            assert server.post(f"{path}/score", {"text": "x"}, **settings).status_code == status
            assert server.post("/v1/completions", asked, **settings).status_code == status
            assert server.post("/v1/chat/completions", chat, **settings).status_code == status
            assert server.post("/tokenize", chat, **settings).status_code == status
            assert len(server.get(ROOT, **settings).json()["data"]) == (status == 200)
        assert_openai_error(server.client.delete(f"{server.url}{path}", headers=keys["yours"]), 404)
        assert_openai_error(server.get(path), 401)
        full = server.post(ROOT, {"text": "more"}, headers=keys["mine"])
        assert assert_openai_error(full, 429)["code"] == "too_many_documents"
        assert_openai_error(server.post(f"{path}/fork", {}, headers=keys["mine"]), 429)
        assert server.post(ROOT, {"text": "own"}, headers=keys["yours"]).status_code == 201
        server.client.delete(f"{server.url}{path}", headers=keys["mine"])
        assert server.post(ROOT, {"text": "more"}, headers=keys["mine"]).status_code == 201


def test_a_stale_version_is_a_conflict(kept: RunningServer) -> None:
    path = make(kept, "a")
    assert patch(kept, path, {"text": "b", "version": 1}).headers["etag"] == '"2"'
    stale = patch(kept, path, {"text": "c", "version": 1})
    assert assert_openai_error(stale, 409)["code"] == "version_conflict"
    header = {"If-Match": '"1"'}
    assert_openai_error(patch(kept, path, {"append": "c"}, headers=header), 409)
    assert_openai_error(kept.post(f"{path}/repair", {"version": 1}), 409)
    for wrong in ("2", 'W/"2"', '"2", "3"', '"x"'):
        reply = patch(kept, path, {"text": "c"}, headers={"If-Match": wrong})
        assert assert_openai_error(reply, 400)["param"] == "If-Match"
    reply = patch(kept, path, {"text": "c", "version": 2}, headers=header)
    assert assert_openai_error(reply, 400)["param"] == "If-Match"
    assert text_of(kept, path) == "b"
    assert patch(kept, path, {"text": "c"}, headers={"If-Match": "*"}).status_code == 200
    assert patch(kept, path, {"text": "d"}, headers={"If-Match": '"3"'}).status_code == 200


def test_of_changes_at_the_same_time_one_wins(server: RunningServer, llm: FakeAsyncLLM) -> None:
    path = make(server, "")
    llm.delay_s = 0.02
    with ThreadPoolExecutor(8) as threads:
        bodies = [{"append": str(number), "version": 1} for number in range(8)]
        replies = list(threads.map(lambda body: patch(server, path, body), bodies))
        assert sorted(reply.status_code for reply in replies) == [200] + 7 * [409]
        bodies = [{"append": str(number)} for number in range(8)]
        replies = list(threads.map(lambda body: patch(server, path, body), bodies))
        assert {reply.json()["version"] for reply in replies} == set(range(3, 11))
    assert sorted(text_of(server, path)[1:]) == list("01234567")


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (CapacityError("Full."), 400),
        (CapacityError("Busy.", retry_after_s=1.0), 429),
        (UnsupportedModelError("The positions cannot be moved."), 400),
    ],
)
def test_a_refused_change_leaves_the_document(
    server: RunningServer, failure: Exception, status: int
) -> None:
    path = make(server)
    server.llm.failure = failure
    for body in ({"text": "x"}, {"append": "x"}, {"edits": [edit(0, 1, "")]}):
        assert_openai_error(patch(server, path, body), status)
    assert_openai_error(server.post(ROOT, {"text": "x"}), status)
    server.llm.failure = None
    assert text_of(server, path) == TEXT
    assert patch(server, path, {"text": "x", "version": 1}).status_code == 200


def test_a_change_whose_client_left_is_carried_out(
    server: RunningServer, llm: FakeAsyncLLM
) -> None:
    path = make(server, "a")
    llm.delay_s = 0.3
    with pytest.raises(Exception, match="timed out"):
        patch(server, path, {"text": "b"}, timeout=0.1)
    reply = patch(server, path, {"append": "c"})
    assert reply.json()["version"] == 3
    assert text_of(server, path) == "bc"
    assert len(server.get(ROOT).json()["data"]) == 1


def test_a_generation_does_not_see_edits(server: RunningServer, llm: FakeAsyncLLM) -> None:
    path = make(server, "first")
    llm.hold_after = 2
    body = {"document": path.rpartition("/")[2], "stream": True, "max_tokens": 100}
    answers: list[str] = []
    asking = threading.Thread(
        target=lambda: answers.append(server.post("/v1/completions", body).text)
    )
    asking.start()
    eventually(lambda: llm.live == 1)
    assert patch(server, path, {"text": "second"}).status_code == 200
    assert server.client.delete(f"{server.url}{path}").status_code == 200
    llm.hold_after = None
    asking.join(20)
    events = events_of(answers[0])[:-1]
    text = "".join(choice["text"] for each in events for choice in each["choices"])
    assert text == "first"
    assert events[-1]["kvloom"]["documents"] == [{"id": body["document"], "version": 1}]


def test_documents_are_counted(server: RunningServer) -> None:
    path = make(server, "abcd")
    make(server, "other")
    patch(server, path, {"edits": [edit(1, 1, "x")], "fidelity": "shifted"})
    patch(server, path, {"text": "x"})
    metrics = server.get("/metrics").text
    assert "kvloom_documents 2.0" in metrics
    assert 'route="/v1/kv/documents/{document_id}"' in metrics
    assert 'kvloom_document_edits_total{fidelity="shifted"} 1.0' in metrics
    assert 'kvloom_document_edits_total{fidelity="exact"} 1.0' in metrics
    assert 'kvloom_document_rows_total{kv="recomputed"}' in metrics
    assert 'kvloom_document_rows_total{kv="kept"}' in metrics


def test_documents_end_with_the_server() -> None:
    with RunningServer() as server:
        make(server)
        (held,) = server.app.state.service.documents.of("")
    assert held.document.closed
