"""The third tier: chunks in a place that several machines share, by fsspec or in Redis.

Knows: how chunks and what is told about them are laid out there.
Does not know: other tiers; nothing that happens there is an error here.

The bytes of a chunk are those of its file on disk, with their checksum. Beside them lies a small
record, so that prefixes are found without reading KV.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np

from kvloom.errors import StoreError
from kvloom.store.breaker import Breaker
from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey, Place, hash_tokens, is_name
from kvloom.store.serde import (
    FORMAT_VERSION,
    DamagedChunkError,
    OtherVersionError,
    aligned,
    deserialize,
    serialize,
)
from kvloom.store.tier import Continuation, Entry, Tally, TierStatistics

logger = logging.getLogger(__name__)
TIMEOUT_S = 2.0
PAUSE_S = 30.0
_VERSION = f"v{FORMAT_VERSION}"  # of others, nothing is seen
_KEYS = f"kvloom:{_VERSION}"


class Bucket(Protocol):
    """Where bytes and records lie; every method may raise whatever its client raises."""

    def load(self, name: str) -> bytes | None:
        """Return a chunk's bytes; None if there are none."""
        ...

    def save(self, name: str, place: str, data: bytes, record: bytes) -> None:
        """Write a chunk's bytes, and then its record."""
        ...

    def has(self, name: str) -> bool:
        """Whether there are bytes of that name."""
        ...

    def remove(self, name: str) -> bool:
        """Remove bytes and record; say whether there were bytes."""
        ...

    def records(self, place: str | None) -> list[bytes]:
        """Return the records of a place, or all."""
        ...


class FileBucket:
    """A folder of any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self._files, root = fsspec.url_to_fs(url, use_listings_cache=False)
        self._root = f"{root.rstrip('/')}/{_VERSION}"
        # Others' writes show at once; a local file would be seen while it is half written.
        self._rename = isinstance(self._files, LocalFileSystem)

    def load(self, name: str) -> bytes | None:
        """Return a chunk's bytes; None if there are none."""
        return self._read(self._chunk(name))

    def save(self, name: str, place: str, data: bytes, record: bytes) -> None:
        """Write a chunk's bytes, and then its record."""
        self._write(self._chunk(name), data)
        self._write(f"{self._root}/places/{place}/{name}.json", record)

    def has(self, name: str) -> bool:
        """Whether there are bytes of that name."""
        return bool(self._files.exists(self._chunk(name)))

    def remove(self, name: str) -> bool:
        """Remove bytes and record; say whether there were bytes."""
        for path in self._files.glob(f"{self._root}/places/*/{name}.json"):
            self._files.rm_file(path)
        try:
            self._files.rm_file(self._chunk(name))
        except FileNotFoundError:
            return False
        return True

    def records(self, place: str | None) -> list[bytes]:
        """Return the records of a place, or all."""
        paths = self._files.glob(f"{self._root}/places/{place or '*'}/*.json")
        return [record for path in paths if (record := self._read(path)) is not None]

    def _chunk(self, name: str) -> str:
        return f"{self._root}/chunks/{name}.safetensors"

    def _read(self, path: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(path))
        except FileNotFoundError:
            return None

    def _write(self, path: str, data: bytes) -> None:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not self._rename:
            self._files.pipe_file(path, data)
            return
        partial = f"{path}.{uuid4().hex}.partial"
        self._files.pipe_file(partial, data)
        self._files.mv(partial, path)


class RedisBucket:
    """A Redis server; room is made by the server's own rules."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    def load(self, name: str) -> bytes | None:
        """Return a chunk's bytes; None if there are none."""
        data: bytes | None = self._redis.get(f"{_KEYS}:chunk:{name}")
        return data

    def save(self, name: str, place: str, data: bytes, record: bytes) -> None:
        """Write a chunk's bytes, and then its record."""
        self._redis.set(f"{_KEYS}:chunk:{name}", data)
        self._redis.hset(f"{_KEYS}:place:{place}", name, record)
        self._redis.hset(f"{_KEYS}:places", name, place)

    def has(self, name: str) -> bool:
        """Whether there are bytes of that name."""
        return bool(self._redis.exists(f"{_KEYS}:chunk:{name}"))

    def remove(self, name: str) -> bool:
        """Remove bytes and record; say whether there were bytes."""
        place = self._redis.hget(f"{_KEYS}:places", name)
        if place is not None:
            self._redis.hdel(f"{_KEYS}:place:{place.decode()}", name)
            self._redis.hdel(f"{_KEYS}:places", name)
        return bool(self._redis.delete(f"{_KEYS}:chunk:{name}"))

    def records(self, place: str | None) -> list[bytes]:
        """Return the records of a place, or all."""
        places = {place} if place else {p.decode() for p in self._redis.hvals(f"{_KEYS}:places")}
        return [record for p in places for record in self._redis.hvals(f"{_KEYS}:place:{p}")]


@dataclass(frozen=True, slots=True)
class _Record:
    """What is told about a chunk beside its bytes."""

    key: ChunkKey
    tokens: np.ndarray
    nbytes: int
    created: float

    def encode(self) -> bytes:
        key = self.key
        content = {
            "name": key.name,
            "fingerprint": key.fingerprint.hex(),
            "recipe": key.recipe,
            "context": None if key.context is None else key.context.hex(),
            "tenant": key.tenant,
            "tokens": base64.b64encode(self.tokens.astype("<i8").tobytes()).decode(),
            "nbytes": self.nbytes,
            "created": self.created,
        }
        return json.dumps(content).encode()

    @classmethod
    def decode(cls, data: bytes) -> _Record:
        """Read a record.

        Raises:
            ValueError, TypeError, KeyError, StoreError: it is damaged.
        """
        content = json.loads(data)
        context = content["context"]
        tokens = np.frombuffer(base64.b64decode(content["tokens"]), dtype=np.int64)
        key = ChunkKey(
            fingerprint=bytes.fromhex(content["fingerprint"]),
            recipe=str(content["recipe"]),
            token_hash=hash_tokens(tokens),
            context=None if context is None else bytes.fromhex(context),
            tenant=str(content["tenant"]),
        )
        if key.name != content["name"] or not len(tokens):
            raise ValueError("its parts contradict each other")
        return cls(key, tokens, int(content["nbytes"]), float(content["created"]))


class RemoteStore:
    """Chunks on a bucket behind a breaker; a bucket that is gone is a miss."""

    name = "remote"

    def __init__(
        self, bucket: Bucket, timeout_s: float = TIMEOUT_S, pause_s: float = PAUSE_S
    ) -> None:
        self._bucket = bucket
        self._tally = Tally(logger)
        self._breaker = Breaker(self.name, self._tally, timeout_s, pause_s)

    def get(self, key: ChunkKey) -> Chunk | None:
        """Return a chunk and count the use; None if there is none, or no answer."""
        data = self._breaker.call(lambda: self._bucket.load(key.name), None)
        chunk = None if data is None else self._read(data, key)
        self._tally.add("misses" if chunk is None else "hits")
        return chunk

    def put(self, chunk: Chunk) -> bool:
        """Send a chunk; it is refused where the bucket does not take it in time."""
        if self.has(chunk.name):
            return True
        try:
            data = b"".join(serialize(chunk))
        except StoreError as error:
            self._tally.say_once("serialize", "%s", error)
            self._tally.add("refused")
            return False
        record = _Record(chunk.key, chunk.tokens, len(data), time.time()).encode()
        place = chunk.key.place.digest.hex()

        def save() -> bool:
            self._bucket.save(chunk.name, place, data, record)
            return True

        saved = self._breaker.call(save, False)
        self._tally.add("stored" if saved else "refused")
        return saved

    def has(self, name: str) -> bool:
        """Whether there is such a chunk, as far as the bucket answers."""
        return is_name(name) and self._breaker.call(lambda: self._bucket.has(name), False)

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Say no: whoever runs the bucket decides what stays."""
        return False

    def delete(self, name: str) -> bool:
        """Remove a chunk and say whether there was one."""
        return is_name(name) and self._breaker.call(lambda: self._bucket.remove(name), False)

    def entries(self) -> Sequence[Entry]:
        """Return the catalogue; uses are not counted on the bucket."""
        return [
            Entry(r.key, len(r.tokens), r.nbytes, (self.name,), 0, r.created, r.created, False)
            for r in self._records(None)
        ]

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place; with `next_token`, those that begin with it."""
        return [
            Continuation(record.key, record.tokens)
            for record in self._records(place.digest.hex())
            if record.key.place == place and next_token in (None, record.tokens[0])
        ]

    def statistics(self) -> TierStatistics:
        """Return the counters; what the bucket holds is not asked."""
        return self._tally.statistics()

    def close(self) -> None:
        """Take no more calls."""
        self._breaker.close()

    def _read(self, data: bytes, key: ChunkKey) -> Chunk | None:
        try:
            return deserialize(aligned(data), key)
        except OtherVersionError as error:
            self._tally.say_once("version", "remote chunks are left alone: %s", error)
        except DamagedChunkError as error:
            self._tally.add("corrupt")
            logger.warning("remote chunk %s is damaged and is removed: %s", key.name, error)
            self.delete(key.name)
        return None

    def _records(self, place: str | None) -> list[_Record]:
        found = []
        nothing: list[bytes] = []
        for data in self._breaker.call(lambda: self._bucket.records(place), nothing):
            with suppress(ValueError, TypeError, KeyError, StoreError):
                found.append(_Record.decode(data))
        return found


def open_remote(url: str, timeout_s: float = TIMEOUT_S, pause_s: float = PAUSE_S) -> RemoteStore:
    """Return the remote tier at an address; it need not answer yet.

    Raises:
        StoreError: the address names nothing that can be used here.
    """
    scheme = urlsplit(url).scheme
    try:
        if scheme in ("redis", "rediss", "unix"):
            return RemoteStore(RedisBucket(url, timeout_s), timeout_s, pause_s)
        return RemoteStore(FileBucket(url), timeout_s, pause_s)
    except ImportError as error:
        raise StoreError(
            f"a remote store of kind {scheme!r} needs a package that is missing ({error.name}); "
            "install it; for Redis: pip install 'kvloom[redis]'."
        ) from error
    except Exception as error:  # each file system has errors of its own
        raise StoreError(
            f"a remote store of kind {scheme!r} cannot be used ({type(error).__name__}); "
            "give an address of fsspec, or redis://, rediss:// or unix:// for Redis."
        ) from error
