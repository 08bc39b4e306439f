"""Documents and chunks that are joined, over the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.errors import CapacityError, UnsupportedModelError
from kvloom.reuse.planner import PLANNERS
from kvloom.serve.joins import MAX_JOINED
from kvloom.serve.schemas import KvloomOptions

from .fake_llm import BOS, FakeAsyncLLM
from .running import RunningServer, assert_openai_error, events_of, eventually

ROOT = "/v1/kv/documents"
SHIFTED = {"kvloom": {"fidelity": "shifted"}}
REPAIRED = {"kvloom": {"fidelity": "repaired", "share": 0.3, "planner": "first"}}


@pytest.fixture
def kept(server: RunningServer, llm: FakeAsyncLLM) -> Iterator[RunningServer]:
    """A server whose joined documents are all let go of in the end."""
    yield server
    eventually(lambda: all(each.closed for each in llm.joined))


def make(server: RunningServer, text: str) -> str:
    name: str = server.post(ROOT, {"text": text}).json()["id"]
    return name


def chunk(text: str) -> dict[str, str]:
    return {"type": "chunk", "text": text}


def user(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def chat(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    fields: dict[str, Any] = reply.json()
    return fields


def test_a_chat_shows_documents_and_chunks_where_they_stand(
    kept: RunningServer, llm: FakeAsyncLLM
) -> None:
    name = make(kept, "Anna bakes.")
    content = [
        {"type": "text", "text": "Read:"},
        chunk("Ben flies."),
        {"type": "document", "document_id": name},
        {"type": "text", "text": "Who bakes?"},
    ]
    text = "user:Read:\nBen flies.\nAnna bakes.\nWho bakes?\n"
    reply = chat(kept, user(*content) | SHIFTED)
    # The fake model repeats its prompt.
    assert reply["choices"][0]["message"]["content"] == text
    assert reply["usage"]["prompt_tokens"] == len(text)
    parts, *how = llm.joins[-1]
    assert how == ["shifted", REPAIRED_SHARE, "blend"]
    spelled = [(bytes(part.tokens).decode(), part.reusable) for part in parts]
    assert spelled == [
        ("user:Read:\n", False),
        ("Ben flies.", True),
        ("\n", False),
        ("Anna bakes.", True),
    ]
    notes = reply["kvloom"]
    assert notes["documents"] == [{"id": name, "version": 1}]
    assert [part["type"] for part in notes["parts"]] == ["text", "chunk", "text", "document"]
    assert notes["parts"][3]["document_id"] == name
    assert notes["parts"][3]["tokens"] == len("Anna bakes.")
    assert notes["parts"][3]["actions"][0]["action"] == "shift"
    receipt = notes["receipt"]
    assert receipt["fidelity"] == "shifted"
    assert sum(receipt["tokens"].values()) == len(text)
    assert receipt["tokens"]["moved"] == len("Ben flies.Anna bakes.")
    # The first time all is computed, the second time what is no chunk.
    assert receipt["computed_tokens"] == len(text)
    again = chat(kept, user(content[2], content[1]) | REPAIRED)["kvloom"]["receipt"]
    assert llm.joins[-1][1:] == ("repaired", 0.3, "first")
    assert (again["fidelity"], again["repaired"]) == ("repaired", 2)
    assert (again["deviation"], again["deviation_left"]) == (0.5, 0.25)
    assert again["computed_tokens"] == again["recomputed"] + 1 == len("user:") + 1 + 2 + 1
    assert again["cached_tokens"] == len("user:Anna bakes.\nBen flies.\n") - 9


@pytest.mark.parametrize("options", [{}, {"kvloom": {}}, {"kvloom": {"fidelity": "exact"}}])
def test_exact_reads_parts_as_text(
    kept: RunningServer, llm: FakeAsyncLLM, options: dict[str, Any]
) -> None:
    body = user(chunk(" Ben flies. "), {"type": "document", "document_id": make(kept, "A ")})
    reply = chat(kept, body | options)
    assert reply["choices"][0]["message"]["content"] == "user:Ben flies. \nA\n"
    assert not llm.joins
    assert "parts" not in reply["kvloom"]
    assert reply["kvloom"]["receipt"]["fidelity"] == "exact"


def test_completions_go_on_from_joined_parts(kept: RunningServer, llm: FakeAsyncLLM) -> None:
    one, two = make(kept, "one "), make(kept, "two ")
    body = {"documents": [{"text": "zero "}, two, one, one], "prompt": ["end", "END"]}
    reply = kept.post("/v1/completions", body | SHIFTED | {"n": 2, "max_tokens": 40}).json()
    texts = [choice["text"] for choice in reply["choices"]]
    beginning = "zero two one one "
    assert texts == [f"{beginning}end", f"{beginning}end1", f"{beginning}END", f"{beginning}END1"]
    assert len(llm.joins) == 1
    parts = llm.joins[0][0]
    assert [part.tokens for part in parts if not part.reusable] == [(BOS,)]
    assert reply["usage"]["prompt_tokens"] == 2 * (1 + len(beginning) + 3)
    exact = kept.post("/v1/completions", body | {"n": 2, "max_tokens": 40}).json()
    assert exact["usage"]["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert exact["choices"] == reply["choices"]
    assert len(llm.joins) == 1
    echo = {"echo": True, "max_tokens": 1}
    echoed = kept.post("/v1/completions", body | SHIFTED | echo).json()["choices"][0]
    assert echoed["text"].startswith(f"{beginning}end")


def test_one_document_that_stands_where_it_was_computed_is_not_joined(
    kept: RunningServer, llm: FakeAsyncLLM
) -> None:
    body = {"document": make(kept, "one "), "prompt": "two"} | REPAIRED
    assert kept.post("/v1/completions", body).json()["choices"][0]["text"] == "one two"
    assert not llm.joins
    assert llm.bases[-1][0] is not None


def test_scored_prompts_are_computed(kept: RunningServer, llm: FakeAsyncLLM) -> None:
    body = {"documents": [{"text": "zero "}], "prompt": "end", "echo": True, "logprobs": 1}
    reply = kept.post("/v1/completions", body | SHIFTED).json()
    assert not llm.joins
    assert "log" in reply["kvloom"]["read_as_text"]
    assert reply["kvloom"]["receipt"]["fidelity"] == "exact"


def test_an_odd_template_reads_parts_as_text_and_says_so(
    kept: RunningServer, llm: FakeAsyncLLM
) -> None:
    reply = chat(kept, user({"type": "text", "text": "SHOUT"}, chunk("Ben flies.")) | SHIFTED)
    assert reply["choices"][0]["message"]["content"] == "USER:SHOUT\nBEN FLIES.\n"
    assert not llm.joins
    assert "template" in reply["kvloom"]["read_as_text"]
    assert "parts" not in reply["kvloom"]
    assert "kvloom_parts_read_as_text_total 1.0" in kept.get("/metrics").text


def test_streams_end_with_what_was_done(kept: RunningServer, llm: FakeAsyncLLM) -> None:
    body = user(chunk("Ben flies."), {"type": "text", "text": "Who?"}) | SHIFTED
    usage = {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    *events, last, done = events_of(kept.post("/v1/chat/completions", body | usage).text)
    assert done == "[DONE]"
    whole = chat(kept, body | {"n": 2})
    for index in (0, 1):
        text = "".join(
            event["choices"][0]["delta"].get("content", "")
            for event in events
            if event["choices"][0]["index"] == index
        )
        assert text == whole["choices"][index]["message"]["content"]
    assert [part["type"] for part in last["kvloom"]["parts"]] == ["text", "chunk"]
    assert last["usage"]["prompt_tokens"] == len("user:Ben flies.\nWho?\n")
    assert all("kvloom" not in event for event in events)


def test_a_document_may_go_while_it_is_joined(kept: RunningServer, llm: FakeAsyncLLM) -> None:
    name = make(kept, "one ")
    body = {"documents": [{"text": "zero "}, name], "prompt": "end", "max_tokens": 40} | SHIFTED

    async def scenario() -> list[str]:
        async with kept.async_openai() as client:
            llm.delay_s = 0.05
            asking = asyncio.create_task(
                client.completions.create(
                    model="echo", prompt="end", max_tokens=40, extra_body=body
                )
            )
            while not llm.joins:
                await asyncio.sleep(0.001)
            llm.delay_s = 0
            deleted = await asyncio.to_thread(kept.client.delete, f"{kept.url}{ROOT}/{name}")
            assert deleted.status_code == 200
            return [choice.text for choice in (await asking).choices]

    assert asyncio.run(scenario()) == ["zero one end"]
    error = assert_openai_error(kept.post("/v1/completions", body), 404)
    assert error["code"] == "document_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (UnsupportedModelError("Positions are opaque."), 400),
        (CapacityError("The memory cannot hold it."), 400),
        (CapacityError("Full.", retry_after_s=1.0), 429),
        (ValueError("secret"), 500),
    ],
)
def test_failing_joins_have_a_status(
    kept: RunningServer, llm: FakeAsyncLLM, failure: Exception, status: int, stream: bool
) -> None:
    llm.failure = failure
    body = user(chunk("Ben flies.")) | SHIFTED | {"stream": stream}
    error = assert_openai_error(kept.post("/v1/chat/completions", body), status)
    assert "secret" not in error["message"]


def test_a_join_that_nobody_waits_for_ends(kept: RunningServer, llm: FakeAsyncLLM) -> None:
    llm.delay_s = 30
    with pytest.raises(Exception, match="timed out"):
        kept.post("/v1/chat/completions", user(chunk("Ben flies.")) | SHIFTED, timeout=0.2)
    eventually(lambda: llm.joins)
    llm.delay_s = 0
    assert not llm.joined


@pytest.mark.parametrize(
    ("parts", "param"),
    [([chunk("x")] * (MAX_JOINED + 1), "kvloom"), ([chunk("x" * 1500)] * 3, "prompt")],
)
def test_too_much_is_refused_before_it_is_computed(
    kept: RunningServer, llm: FakeAsyncLLM, parts: list[dict[str, str]], param: str
) -> None:
    reply = kept.post("/v1/chat/completions", user(*parts) | SHIFTED)
    assert assert_openai_error(reply, 400)["param"] == param
    assert not llm.joins


def test_strangers_documents_are_unknown() -> None:
    with RunningServer(api_keys=("mine", "yours")) as server:
        headers = {"Authorization": "Bearer mine"}
        name = server.post(ROOT, {"text": "secret"}, headers=headers).json()["id"]
        body = user({"type": "document", "document_id": name}) | SHIFTED
        headers = {"Authorization": "Bearer yours"}
        reply = server.post("/v1/chat/completions", body, headers=headers)
        assert assert_openai_error(reply, 404)["code"] == "document_not_found"
        assert not server.llm.joins


def test_the_server_knows_every_planner() -> None:
    annotation = KvloomOptions.model_fields["planner"].annotation
    assert {*get_args(get_args(annotation)[0])} == {*PLANNERS}
