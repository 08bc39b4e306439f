"""The server with the real engine and the default model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom import AsyncLLM
from kvloom.outputs import EngineStats

from .raw_client import RawClient
from .running import RunningServer, assert_openai_error, eventually
from .soak import is_idle, soak

TEXT = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is"
ENDLESS = {"prompt": TEXT, "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def real() -> Iterator[RunningServer]:
    llm = AsyncLLM("default", dtype="float32", kv_memory="1GiB", repair_when_idle=False)
    with RunningServer(llm, served_model_name="smol") as server:
        yield server


def stats_of(llm: AsyncLLM) -> EngineStats:
    return asyncio.run(llm.stats())


def idle(server: RunningServer) -> bool:
    return is_idle(stats_of(server.llm))


def test_answers_and_reuses(real: RunningServer) -> None:
    client = real.openai()
    first = client.completions.create(model="smol", prompt=TEXT, temperature=0, max_tokens=4)
    assert "Madrid" in first.choices[0].text
    again = client.completions.create(model="smol", prompt=TEXT, temperature=0, max_tokens=4)
    assert again.choices[0].text == first.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.usage.kvloom["computed_tokens"] == 1


def test_streams_the_same_chat(real: RunningServer) -> None:
    client = real.openai()
    question: dict[str, Any] = {
        "model": "smol",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**question)
    stream = list(client.chat.completions.create(**question, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert stream[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_echoed_logprobs_are_those_of_transformers(real: RunningServer) -> None:
    reply = real.openai().completions.create(
        model="smol", prompt=TEXT, echo=True, logprobs=1, max_tokens=0
    )
    folder = Path(real.llm.model_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        rows = model(tokens).logits[0, :-1].log_softmax(-1)
    expected = rows.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    got = reply.choices[0].logprobs
    assert got.token_logprobs[0] is None
    assert got.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert "".join(got.tokens) == reply.choices[0].text == TEXT


def test_tokenizes_as_the_model_does(real: RunningServer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(real.llm.model_path))
    got = real.post("/tokenize", {"prompt": TEXT}).json()["tokens"]
    assert got == tokenizer(TEXT).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    got = real.post("/tokenize", {"messages": messages}).json()["tokens"]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert got == tokenizer(expected, add_special_tokens=False).input_ids


STORY = "Anna is a baker. " + "The town is small and the river is slow. " * 8 + "Ben is a pilot.\n"
DOCUMENTS = "/v1/kv/documents"


def patch(server: RunningServer, name: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.client.patch(f"{server.url}{DOCUMENTS}/{name}", json=body)
    assert reply.status_code == 200, reply.text
    fields: dict[str, Any] = reply.json()
    return fields


def test_an_edited_document_answers_exactly_when_asked_to(real: RunningServer) -> None:
    name = real.post(DOCUMENTS, {"text": STORY}).json()["id"]
    text = STORY
    for fidelity, (old, new) in {
        "shifted": ("slow", "not at all slow"),
        "repaired": ("small", "very small"),
    }.items():
        place = text.index(old)
        edits = [{"start": place, "end": place + len(old), "text": new}]
        text = text.replace(old, new, 1)
        edited = patch(real, name, {"edits": edits, "fidelity": fidelity})
        assert edited["fidelity"] == edited["receipt"]["fidelity"] == fidelity
        assert edited["receipt"]["recomputed"] < edited["num_tokens"] // 2
    assert real.get(f"{DOCUMENTS}/{name}", params={"text": True}).json()["text"] == text
    question = {"prompt": "Question: Who flies?\nAnswer:", "max_tokens": 12, "temperature": 0}
    asked = question | {"document": name}
    loose = real.post("/v1/completions", asked).json()
    assert loose["kvloom"]["receipt"]["fidelity"] == "repaired"
    strict = real.post("/v1/completions", asked | {"kvloom": {"fidelity": "exact"}}).json()
    assert strict["kvloom"]["receipt"]["fidelity"] == "exact"
    tokens = real.llm.tokenizer.encode(text) + real.llm.tokenizer.encode(question["prompt"])
    plain = real.post("/v1/completions", question | {"prompt": tokens}).json()
    assert strict["choices"][0]["text"] == plain["choices"][0]["text"]
    assert strict["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    path = f"{DOCUMENTS}/{name}"
    assert real.client.post(f"{real.url}{path}/repair").json()["fidelity"] == "exact"
    score = real.post(f"{path}/score", {"text": " Ben"}).json()
    echo = {"prompt": [*real.llm.tokenizer.encode(text), *score["tokens"]], "max_tokens": 0}
    echoed = real.post("/v1/completions", echo | {"echo": True, "logprobs": 0}).json()
    expected = echoed["choices"][0]["logprobs"]["token_logprobs"][-len(score["tokens"]) :]
    assert score["logprobs"] == pytest.approx(expected, abs=1e-3)
    assert real.client.delete(f"{real.url}{path}").status_code == 200


def test_edits_do_not_touch_what_runs(real: RunningServer) -> None:
    name = real.post(DOCUMENTS, {"text": STORY}).json()["id"]
    client = real.openai()
    question: dict[str, Any] = {"model": "smol", "prompt": "Then", "temperature": 0}
    question |= {"max_tokens": 24, "extra_body": {"document": name, "ignore_eos": True}}
    undisturbed = client.completions.create(**question).choices[0].text
    stream = client.completions.create(**question, stream=True)
    text = next(stream).choices[0].text
    for fidelity in ("shifted", "exact", "repaired"):
        edit = {"start": 40, "end": 60, "text": f" {fidelity} "}
        patch(real, name, {"edits": [edit], "fidelity": fidelity})
    real.client.delete(f"{real.url}{DOCUMENTS}/{name}")
    text += "".join(choice.text for chunk in stream for choice in chunk.choices)
    assert text == undisturbed


def test_a_document_in_a_chat_is_its_text(real: RunningServer) -> None:
    name = real.post(DOCUMENTS, {"text": STORY}).json()["id"]
    part = {"type": "document", "document_id": name}
    content = [part, {"type": "text", "text": "Who flies?"}]
    asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    plain = asked | {"messages": [{"role": "user", "content": f"{STORY}\nWho flies?"}]}
    reply, same = (real.post("/v1/chat/completions", body).json() for body in (asked, plain))
    assert reply["choices"][0]["message"] == same["choices"][0]["message"]
    assert reply["kvloom"]["receipt"]["fidelity"] == "exact"


TOWN = "Carla repairs clocks in Vienna. " + "Her shop is old and very quiet. " * 8 + "Dora dives."
QUESTION = "Who is a pilot?"
SHIFTED = {"fidelity": "shifted"}
REPAIRED = {"fidelity": "repaired"}
REPAIRED_ALL = {"fidelity": "repaired", "share": 1}


def by_parts(real: RunningServer, *parts: str) -> list[int]:
    """Return a chat of parts and a question in tokens, each part tokenised by itself."""
    folder = Path(real.llm.model_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = [f"MARK{number}" for number in range(len(parts))]
    messages = [{"role": "user", "content": "\n".join([*marks, QUESTION])}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokens: list[int] = []
    for mark, part in zip(marks, parts, strict=True):
        before, text = text.split(mark)
        tokens += tokenizer(before, add_special_tokens=False).input_ids
        tokens += tokenizer(part, add_special_tokens=False).input_ids
    return [*tokens, *tokenizer(text, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chat_about_documents_in_any_order(real: RunningServer, backwards: bool) -> None:
    texts = [STORY, TOWN][:: -1 if backwards else 1]
    names = [real.post(DOCUMENTS, {"text": text}).json()["id"] for text in texts]
    content: list[Any] = [{"type": "document", "document_id": name} for name in names]
    content.append({"type": "text", "text": QUESTION})
    tokens = by_parts(real, *texts)
    lengths = [len(real.llm.tokenizer.encode(text)) for text in texts]
    ask = real.openai().chat.completions.create
    greedy: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 4}
    greedy["messages"] = [{"role": "user", "content": content}]
    for options in SHIFTED, REPAIRED, REPAIRED_ALL:
        reply = ask(**greedy, extra_body={"kvloom": options})
        assert reply.usage.prompt_tokens == len(tokens)
        receipt = reply.kvloom["receipt"]
        shown = [part for part in reply.kvloom["parts"] if part["type"] == "document"]
        assert [part["tokens"] for part in shown] == lengths
        if options is SHIFTED:
            assert receipt["fidelity"] == "shifted"
            assert [part["actions"][0]["action"] for part in shown] == ["shift", "shift"]
            # All but the documents, and what the engine runs again to begin.
            assert receipt["computed_tokens"] <= len(tokens) - sum(lengths) + 3
            assert reply.usage.prompt_tokens_details.cached_tokens >= sum(lengths) - 3
            stream = list(ask(**greedy, extra_body={"kvloom": options}, stream=True))
            text = "".join(x.choices[0].delta.content or "" for x in stream if x.choices)
            assert text == reply.choices[0].message.content
            assert stream[-1].kvloom["parts"] == reply.kvloom["parts"]
        if options is REPAIRED:
            assert receipt["fidelity"] == "repaired"
            assert 0 < receipt["repaired"] < 0.2 * len(tokens)
            assert receipt["deviation_left"] < receipt["deviation"]
        if options is REPAIRED_ALL:
            assert set(receipt["tokens"]) == {"exact"}
            best = reply.choices[0].message.content
    body = {"prompt": tokens, "temperature": 0, "max_tokens": 4}
    assert real.post("/v1/completions", body).json()["choices"][0]["text"] == best
    exact = ask(**greedy, extra_body={"kvloom": {"fidelity": "exact"}})
    assert exact.kvloom["receipt"]["fidelity"] == "exact"
    assert "parts" not in exact.kvloom
    for name in names:
        real.client.delete(f"{real.url}{DOCUMENTS}/{name}")


def test_chunks_are_computed_once(real: RunningServer) -> None:
    # No other test has computed anything that begins like these.
    chunks = [{"text": f"Chunk {number}: {text}\n"} for number, text in enumerate((STORY, TOWN))]
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": 4}
    rows = []
    for order in (chunks, chunks[::-1], [*chunks, chunks[0]]):
        asked = body | {"documents": order, "kvloom": {"fidelity": "repaired"}}
        reply = real.post("/v1/completions", asked).json()
        receipt = reply["kvloom"]["receipt"]
        rows.append(receipt["computed_tokens"] / reply["usage"]["prompt_tokens"])
        assert receipt["deviation_left"] <= receipt["deviation"]
    assert rows[0] > 1
    assert max(rows[1:]) < 0.4


def test_what_changes_meanwhile_answers_as_it_was(real: RunningServer) -> None:
    name = real.post(DOCUMENTS, {"text": STORY}).json()["id"]
    client = real.openai()
    asked: dict[str, Any] = {"model": "smol", "prompt": "Then", "temperature": 0, "max_tokens": 12}
    body = {"documents": [{"text": TOWN}, name], "ignore_eos": True}
    asked |= {"extra_body": body | {"kvloom": {"fidelity": "shifted"}}}
    undisturbed = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True)
    text = next(stream).choices[0].text
    patch(real, name, {"edits": [{"start": 0, "end": 50, "text": "Zoe. "}]})
    real.client.delete(f"{real.url}{DOCUMENTS}/{name}")
    text += "".join(choice.text for chunk in stream for choice in chunk.choices)
    assert text == undisturbed


def test_the_default_model_has_no_tokens_for_gaps(real: RunningServer) -> None:
    gap = {"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 8}
    reply = real.post("/infill", gap).json()
    assert reply["kvloom"]["infill"] == "emulated"
    assert reply["tokens_predicted"] <= 8


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_gives_the_pages_back(real: RunningServer, stream: bool) -> None:
    aborted = stats_of(real.llm).requests_finished.get("abort", 0)
    with RawClient(real.port, "/v1/completions", ENDLESS | {"stream": stream}) as client:
        if stream:
            client.read_until(b"data: ")
        else:
            eventually(lambda: stats_of(real.llm).running == 1)
    eventually(lambda: idle(real))
    assert stats_of(real.llm).requests_finished["abort"] == aborted + 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [7] * 100_000}, "prompt"),
        ({"prompt": TEXT, "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"prompt": TEXT, "stop_token_ids": [99999999]}, "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_a_client_error(
    real: RunningServer, body: dict[str, Any], param: str, stream: bool
) -> None:
    error = assert_openai_error(real.post("/v1/completions", body | {"stream": stream}), 400)
    assert error["param"] == param


def test_a_full_queue_is_refused_with_a_time() -> None:
    llm = AsyncLLM("default", dtype="float32", kv_memory="256MiB", max_running=1, max_waiting=1)
    with (
        RunningServer(llm, served_model_name="smol") as server,
        RawClient(server.port, "/v1/completions", ENDLESS | {"stream": True}) as first,
    ):
        first.read_until(b"data: ")
        with RawClient(server.port, "/v1/completions", ENDLESS):
            eventually(lambda: stats_of(llm).waiting == 1)
            response = server.post("/v1/completions", {"prompt": TEXT})
            assert_openai_error(response, 429)
            assert int(response.headers["retry-after"]) >= 1
            with pytest.raises(openai.RateLimitError):
                server.openai().completions.create(model="smol", prompt=TEXT)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("caching", "count"), [(False, 1000), (True, 300)])
def test_soak(caching: bool, count: int) -> None:
    # A process that ran other tests has freed memory lying about, which moves its size by itself.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        soaked = process.submit(soak, caching, count).result()
    tally, stats = soaked.tally, soaked.stats
    print(tally, [size // 2**20 for size in soaked.sizes], "MiB", stats)

    checked = tally.equal + tally.near
    assert checked >= count // 3
    assert tally.left >= count // 10
    assert tally.near <= checked // 50
    assert stats.requests_finished["abort"] >= 1
    # Some cancelled requests never reach the engine; nothing else may be missing.
    known = sum(stats.requests_finished.values()) - soaked.prompts
    assert count - tally.cancelled <= known <= count
    if caching:
        assert stats.kv_bytes_used == (stats.pages_total - stats.pages_free) * stats.page_bytes
        assert stats.prefix_hits > 0
    else:
        assert stats.pages_free == stats.pages_total
        assert stats.kv_bytes_used == 0
    # The first half touches every page of the pool once; from then on nothing may grow.
    assert soaked.sizes[3] - soaked.sizes[1] < 64 * 2**20
    assert soaked.health == {"status": "ok", "running": 0, "waiting": 0}
