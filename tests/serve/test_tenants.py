"""API keys and salts over a real engine with a store: nobody can tell what others asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvloom import AsyncLLM, StoreSettings
from tests.model.tiny_models import tiny_llama, write_folder

from .running import RunningServer, assert_openai_error

DOCUMENTS = "/v1/kv/documents"
TEXT = "The town is small, and the river behind it is slow, wide and cold in every season. " * 3
WHO = [("anna", None), ("anna", "x"), ("ben", None), ("ben", "x"), ("ben", "anna")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(max_position_embeddings=512)
    return write_folder(tmp_path_factory.mktemp("tiny"), model)


@contextmanager
def serving(model: Path, store: Path | None = None, keys: bool = True) -> Iterator[RunningServer]:
    """A server over the tiny model that is asked by two clients."""
    kept = None if store is None else StoreSettings(folder=store)
    llm = AsyncLLM(str(model), kv_memory="16MiB", dtype="float32", store=kept)
    with RunningServer(llm, api_keys=("anna", "ben") if keys else ()) as server:
        yield server


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[RunningServer]:
    with serving(folder) as server:
        yield server


class Client:
    """One of those who ask."""

    def __init__(self, server: RunningServer, key: str = "none", salt: str | None = None) -> None:
        self.server = server
        self.headers = {"Authorization": f"Bearer {key}"}
        self.salt = {} if salt is None else {"cache_salt": salt}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        reply = self.server.post(path, body, headers=self.headers)
        assert reply.status_code in (200, 201), reply.text
        return reply.json()

    def keep(self, text: str) -> str:
        made = self.post(DOCUMENTS, {"text": text} | self.salt)
        return f"{DOCUMENTS}/{made['id']}"

    def known(self, text: str, route: str = "completions") -> bool:
        """Have a text read, and say whether it was known; if only in part, fail."""
        fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0} | self.salt
        if route == "infill":
            gap = {"input_prefix": text, "input_suffix": "", "n_predict": 1}
            reply = self.post("/infill", gap | self.salt)
            cached, length = reply["tokens_cached"], reply["tokens_evaluated"]
        else:
            fields |= {"prompt": text, "suffix": "end"} if route == "suffix" else {"prompt": text}
            if route == "chat":
                del fields["prompt"]
                fields["messages"] = [{"role": "user", "content": text}]
            path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
            usage = self.post(path, fields)["usage"]
            cached, length = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
        # What stands before the text may have been sent with another one.
        assert cached >= length - 2 or cached < length // 2
        return bool(cached >= length - 2)


@pytest.mark.parametrize("route", ["completions", "chat", "infill", "suffix"])
def test_a_text_is_known_to_those_who_sent_it(shared: RunningServer, route: str) -> None:
    clients, text = [Client(shared, *who) for who in WHO], f"Of {route}. {TEXT}"
    for known in (False, True):
        assert [client.known(text, route) for client in clients] == [known] * len(clients)


def place_between_tokens(server: RunningServer, text: str) -> int:
    """Return a place where a text can be cut without other tokens coming of it."""
    encode = server.llm.tokenizer.encode
    return next(
        cut
        for cut in range(40, len(text))
        if encode(text[:cut]) + encode(text[cut:], add_special_tokens=False) == encode(text)
    )


@pytest.mark.parametrize("what", ["create", "append", "edit", "fork", "score"])
def test_a_documents_text_is_known_to_those_who_made_it(shared: RunningServer, what: str) -> None:
    clients = [Client(shared, *who) for who in WHO]
    for number, client in enumerate(clients):
        text = f"{what} {number}. {TEXT}"
        cut = place_between_tokens(shared, text)
        path = client.keep(text if what == "create" else text[:cut])
        url, rest = f"{shared.url}{path}", {"text": text[cut:]}
        match what:
            case "append":
                shared.client.patch(url, json={"append": text[cut:]}, headers=client.headers)
            case "edit":
                edit = {"start": cut, "end": cut} | rest
                shared.client.patch(url, json={"edits": [edit]}, headers=client.headers)
            case "fork":
                name = client.post(f"{path}/fork", {})["id"]
                client.post(f"{DOCUMENTS}/{name}/score", rest)
            case "score":
                client.post(f"{path}/score", rest)
        others = [other for other in clients if other is not client]
        assert not any(other.known(text) for other in others)
        assert client.known(text)


def test_a_chunk_is_computed_for_each(shared: RunningServer) -> None:
    chunks = [{"text": "First. "}, {"text": f"Chunk. {TEXT}"}]
    asked = {"documents": chunks, "prompt": "A", "max_tokens": 1, "kvloom": {"fidelity": "shifted"}}

    def is_computed(client: Client) -> bool:
        parts = client.post("/v1/completions", asked | client.salt)["kvloom"]["parts"]
        return "compute" in {each["action"] for each in parts[-1]["actions"]}

    clients = [Client(shared, *who) for who in WHO]
    for new in (True, False):
        assert [is_computed(client) for client in clients] == [new] * len(clients)


def test_a_document_answers_with_its_salt_only(shared: RunningServer) -> None:
    for salt in (None, "x"):
        name = Client(shared, "anna", salt).keep(TEXT).rpartition("/")[2]
        part = {"type": "document", "document_id": name}
        bodies = {
            "completions": {"document": name, "prompt": "A", "max_tokens": 1},
            "chat/completions": {"messages": [{"role": "user", "content": [part]}]},
        }
        for path, body in bodies.items():
            for key, other in WHO:
                client, given = Client(shared, key, other), body | {"max_tokens": 1}
                url = f"/v1/{path}"
                reply = shared.post(url, given | client.salt, headers=client.headers)
                if key == "ben":
                    assert_openai_error(reply, 404)
                elif other != salt:
                    assert assert_openai_error(reply, 400)["param"] == "cache_salt"
                else:
                    assert reply.status_code == 200
        # Its text is not KV: whoever has the key may read it.
        asked = {"messages": bodies["chat/completions"]["messages"]}
        assert Client(shared, "anna").post("/tokenize", asked)["count"] > 9


def test_each_gets_its_own_back_after_a_restart(folder: Path, tmp_path: Path) -> None:
    texts = {who: f"{number}. {TEXT}" for number, who in enumerate(WHO)}
    with serving(folder, tmp_path) as server:
        for who, text in texts.items():
            assert not Client(server, *who).known(text)
    with serving(folder, tmp_path) as server:
        for who, text in texts.items():
            others = [other for other in WHO if other != who]
            assert not any(Client(server, *other).known(text) for other in others)
            assert Client(server, *who).known(text)
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"anna" not in files


def test_without_keys_and_salts_all_are_one(folder: Path) -> None:
    with serving(folder, keys=False) as server:
        assert [Client(server, key).known(TEXT) for key in "ab"] == [False, True]
        assert not Client(server, salt="x").known(TEXT)
        assert Client(server, "a", "x").known(TEXT)


@pytest.mark.parametrize("salt", ["", 5, ["x"]])
def test_a_salt_is_a_text(shared: RunningServer, salt: Any) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "A"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "A"}]},
        "/infill": {"input_prefix": "A", "input_suffix": "B"},
        DOCUMENTS: {"text": "A"},
    }
    for path, body in bodies.items():
        reply = shared.post(
            path, body | {"cache_salt": salt}, headers=Client(shared, "anna").headers
        )
        assert assert_openai_error(reply, 400)["param"] == "cache_salt"
