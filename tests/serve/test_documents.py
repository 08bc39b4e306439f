"""Kept documents over a tiny real model with little memory: nothing is lost, mixed up or held."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvloom import AsyncLLM
from kvloom.serve.documents import ID_PATTERN, Documents, Lead
from kvloom.serve.errors import TooManyDocumentsError
from tests.model.tiny_models import tiny_llama, write_folder
from tests.tolerances import TOLERANCE

from .raw_client import RawClient
from .running import RunningServer, assert_openai_error, eventually

ROOT = "/v1/kv/documents"
CHUNKS = ["A chunk of text that many share.", "Another one.\n"]
WORDS = ["one ", "two ", "zwölf ", "🙂", "\n", "def f():\n", "    ", "a"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = write_folder(
        tmp_path_factory.mktemp("tiny"), tiny_llama(max_position_embeddings=512)
    )
    llm = AsyncLLM(str(folder), kv_memory="256KiB", dtype="float32")
    with RunningServer(llm, served_model_name="tiny") as server:
        yield server


class Editor:
    """A client that keeps a document in step with a string of its own."""

    def __init__(self, server: RunningServer, seed: int) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.text = self.words(40)
        made = server.post(ROOT, {"text": self.text})
        assert made.status_code == 201, made.text
        self.name = made.json()["id"]
        self.version = 1
        self.refused = 0

    @property
    def url(self) -> str:
        return f"{self.server.url}{ROOT}/{self.name}"

    def words(self, count: int) -> str:
        return "".join(self.rng.choices(WORDS, k=self.rng.randrange(1, count)))

    def work(self, count: int) -> None:
        for _ in range(count):
            work = [self.edit, self.edit, self.ask, self.join, self.fork, self.repair]
            self.rng.choice(work)()
        read = self.server.get(f"{ROOT}/{self.name}", params={"text": True}).json()
        assert read["text"] == self.text
        assert read["version"] == self.version
        assert self.server.client.delete(self.url).status_code == 200

    def edit(self) -> None:
        start, end = sorted(self.rng.randrange(len(self.text) + 1) for _ in range(2))
        end = min(end, start + 9)
        new = self.words(9) if len(self.text) < 200 else ""
        fidelity = self.rng.choice(["exact", "repaired", "shifted"])
        edits = [{"start": start, "end": end, "text": new}]
        body = {"edits": edits, "fidelity": fidelity, "version": self.version}
        if self.taken(self.server.client.patch(self.url, json=body)):
            self.text = self.text[:start] + new + self.text[end:]
            self.version += 1

    def ask(self) -> None:
        body: dict[str, Any] = {"document": self.name, "prompt": "What", "max_tokens": 4}
        body["kvloom"] = {"fidelity": self.rng.choice(["exact", "shifted", None])}
        reply = self.server.post("/v1/completions", body)
        if self.taken(reply) and body["kvloom"]["fidelity"] == "exact":
            assert set(reply.json()["kvloom"]["receipt"]["tokens"]) == {"exact"}

    def join(self) -> None:
        fidelity = self.rng.choice(["exact", "repaired", "shifted"])
        parts = [{"text": self.rng.choice(CHUNKS)}, self.name, {"text": self.rng.choice(CHUNKS)}]
        self.rng.shuffle(parts)
        body = {"documents": parts, "prompt": "What", "max_tokens": 1, "echo": True}
        body |= {"kvloom": {"fidelity": fidelity}, "n": self.rng.choice([1, 2])}
        reply = self.server.post("/v1/completions", body)
        if self.taken(reply):
            texts = [self.text if isinstance(part, str) else part["text"] for part in parts]
            answer = reply.json()
            assert answer["choices"][0]["text"].startswith("".join(texts) + "What")
            states = answer["kvloom"]["receipt"]["tokens"]
            assert fidelity != "exact" or set(states) == {"exact"}
            assert sum(states.values()) >= answer["usage"]["prompt_tokens"]

    def fork(self) -> None:
        reply = self.server.post(f"{ROOT}/{self.name}/fork", {})
        if self.taken(reply):
            path = f"{ROOT}/{reply.json()['id']}"
            assert self.server.get(path, params={"text": True}).json()["text"] == self.text
            self.server.client.delete(f"{self.server.url}{path}")

    def repair(self) -> None:
        reply = self.server.client.post(f"{self.url}/repair")
        if self.taken(reply):
            assert reply.json()["fidelity"] == "exact"

    def taken(self, reply: Any) -> bool:
        """Whether the server did it; where not, it said that there is no room."""
        if reply.status_code in (200, 201):
            return True
        assert_openai_error(reply)
        assert reply.json()["error"]["code"] in ("kv_memory_exceeded", "queue_full"), reply.text
        self.refused += 1
        return False


def test_many_editors_at_once(tiny: RunningServer) -> None:
    editors = [Editor(tiny, seed) for seed in range(6)]
    with ThreadPoolExecutor(len(editors)) as threads:
        for done in [threads.submit(editor.work, 25) for editor in editors]:
            done.result(120)
    assert sum(editor.refused for editor in editors) < 20
    assert tiny.get(ROOT).json()["data"] == []

    assert leftover(tiny) == 0


def test_joins_that_nobody_waits_for_leave_nothing(tiny: RunningServer) -> None:
    rng = random.Random(7)
    name = tiny.post(ROOT, {"text": "".join(rng.choices(WORDS, k=60))}).json()["id"]
    for number in range(30):
        parts: list[Any] = [{"text": f"Chunk {number}. " * 5}, name, {"text": CHUNKS[0]}]
        body = {"documents": parts, "prompt": "What", "kvloom": {"fidelity": "repaired"}}
        with RawClient(tiny.port, "/v1/completions", body | {"stream": bool(number % 2)}) as client:
            time.sleep(rng.random() * 0.05)
            client.reset()
    assert tiny.client.delete(f"{tiny.url}{ROOT}/{name}").status_code == 200
    eventually(lambda: leftover(tiny) == 0)


def leftover(server: RunningServer) -> int:
    """Check the engine's books, and return the bytes that somebody still holds."""

    def count(engine: Any) -> int:
        engine.release_abandoned()
        engine.memory.check()
        engine.chunks.clear()
        engine.memory.tree.clear()
        return int(engine.pool.used_bytes)

    return int(server.llm.loop.call(count).result(10))


def test_a_document_becomes_exact_while_nothing_else_runs(tiny: RunningServer) -> None:
    text = "def f(left, right):\n    return left + right\n" * 6
    edits = [{"start": 30, "end": 34, "text": "some"}, {"start": 60, "end": 60, "text": "ab"}]
    scores = []
    for fidelity in ("shifted", "exact"):
        # What the first became would answer for the second.
        tiny.llm.loop.call(lambda engine: engine.memory.tree.clear()).result(10)
        name = tiny.post(ROOT, {"text": text}).json()["id"]
        body = {"edits": edits, "fidelity": fidelity}
        edited = tiny.client.patch(f"{tiny.url}{ROOT}/{name}", json=body).json()
        assert edited["fidelity"] == fidelity

        def all_exact() -> bool:
            return {each["fidelity"] for each in tiny.get(ROOT).json()["data"]} == {"exact"}

        eventually(all_exact)
        read = tiny.get(f"{ROOT}/{name}").json()
        assert read["provenance"]["tokens"] == {"exact": read["num_tokens"]}
        scores.append(tiny.post(f"{ROOT}/{name}/score", {"text": "    return 1"}).json())
        assert tiny.client.delete(f"{tiny.url}{ROOT}/{name}").status_code == 200
    repaired, exact = scores
    assert repaired["fidelity"] == "exact"
    close = TOLERANCE["float32"]["logits"]
    assert repaired["logprobs"] == pytest.approx(exact["logprobs"], abs=close)
    assert "kvloom_idle_repaired_rows_total 0.0" not in tiny.get("/metrics").text


def test_ids_are_random_and_limits_hold_while_documents_are_made() -> None:
    class Nothing:
        tokens: tuple[int, ...] = ()

    async def scenario() -> None:
        documents = Documents(20)

        async def make() -> Any:
            await asyncio.sleep(0.001)
            return Nothing(), Lead()

        adding = [documents.add("me", None, make) for _ in range(25)]
        made = await asyncio.gather(*adding, return_exceptions=True)
        refused = [each for each in made if isinstance(each, Exception)]
        assert len(refused) == 5
        assert all(isinstance(each, TooManyDocumentsError) for each in refused)
        ids = {held.id for held in documents.of("me")}
        assert len(ids) == len(documents) == 20
        assert all(ID_PATTERN.fullmatch(each) for each in ids)
        assert documents.of("you") == []

    asyncio.run(scenario())
