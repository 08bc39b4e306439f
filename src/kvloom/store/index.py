"""The index of a folder of chunks: one sqlite table that several processes share.

Knows: how entries are kept, found and counted.
Does not know: files of chunks; what it says is a hint, and the files are the truth.

A failing index costs hints, never an answer: errors are counted, and reads find nothing.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from kvloom.errors import StoreError
from kvloom.store.files import locked
from kvloom.store.key import ChunkKey, Place, hash_tokens
from kvloom.store.tier import Continuation, Entry, Tally

logger = logging.getLogger(__name__)
T = TypeVar("T")
SCHEMA_VERSION = 1
BUSY_S = 1.0
"""Seconds to wait for another process that writes to the index."""

OPEN_S = 5.0
"""Seconds to wait for another process that opens the index."""
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)

_TABLE = """
CREATE TABLE IF NOT EXISTS chunks (
  name TEXT PRIMARY KEY, place BLOB NOT NULL, first_token INTEGER NOT NULL, tokens BLOB NOT NULL,
  fingerprint BLOB NOT NULL, recipe TEXT NOT NULL, token_hash BLOB NOT NULL, context BLOB,
  tenant TEXT NOT NULL, nbytes INTEGER NOT NULL, hits INTEGER NOT NULL, created REAL NOT NULL,
  last_used REAL NOT NULL, pinned INTEGER NOT NULL
)
"""
_PLACES = "CREATE INDEX IF NOT EXISTS places ON chunks (place, first_token)"
_KEY = "fingerprint, recipe, token_hash, context, tenant"
_ENTRY = f"{_KEY}, length(tokens) / 8, nbytes, hits, created, last_used, pinned"


class Index:
    """Entries by name and by place.

    Args:
        path: file of the index; it is made anew if it is missing or damaged.
        tally: counts failures as `errors`.
        tier: name of the tier in entries.
    """

    def __init__(self, path: Path, tally: Tally, tier: str) -> None:
        self._tally = tally
        self._tier = tier
        self._lock = Lock()
        self._connection = self._open(path)

    def add(self, key: ChunkKey, tokens: np.ndarray, nbytes: int, now: float) -> None:
        """Enter a chunk, or correct the size of one that is there."""
        found = (key.name, key.place.digest, int(tokens[0]), tokens.tobytes())
        parts = (key.fingerprint, key.recipe, key.token_hash, key.context, key.tenant)
        row = (*found, *parts, nbytes, 0, now, now, False)
        marks = ", ".join("?" * len(row))
        statement = f"INSERT INTO chunks VALUES ({marks}) ON CONFLICT (name) DO UPDATE SET nbytes=?"
        self._change(statement, (*row, nbytes))

    def touch(self, name: str, now: float) -> None:
        """Count a use."""
        self._change("UPDATE chunks SET hits = hits + 1, last_used = ? WHERE name = ?", (now, name))

    def pin(self, name: str, *, pinned: bool) -> bool:
        """Mark a chunk and say whether it is there."""
        return self._change("UPDATE chunks SET pinned = ? WHERE name = ?", (pinned, name)) > 0

    def remove(self, names: Iterable[str]) -> None:
        """Forget chunks."""
        for name in names:
            self._change("DELETE FROM chunks WHERE name = ?", (name,))

    def clean(self) -> set[str]:
        """Forget entries whose parts contradict each other; return the names of the others."""
        sound: set[str] = set()
        unsound = []
        statement = f"SELECT rowid, name, place, first_token, tokens, {_KEY} FROM chunks"
        for row, name, place, first_token, raw, *parts in self._rows(statement):
            with suppress(ValueError, TypeError, StoreError):
                key, tokens = ChunkKey(*parts), np.frombuffer(raw, dtype=np.int64)
                found = (key.name, key.place.digest, int(tokens[0]), hash_tokens(tokens))
                if found == (name, place, first_token, key.token_hash):
                    sound.add(name)
                    continue
            unsound.append(row)
        for row in unsound:  # their names may be garbled as well
            self._change("DELETE FROM chunks WHERE rowid = ?", (row,))
        return sound

    def size(self) -> tuple[int, int]:
        """Return the number of entries and the sum of their bytes."""
        rows = self._rows("SELECT count(*), coalesce(sum(nbytes), 0) FROM chunks")
        return (int(rows[0][0]), int(rows[0][1])) if rows else (0, 0)

    def entries(self) -> list[Entry]:
        """Return all entries."""
        found = []
        for name, *row in self._rows(f"SELECT name, {_ENTRY} FROM chunks"):
            with suppress(ValueError, TypeError, StoreError):
                entry = self._entry(row)
                if entry.key.name == name:
                    found.append(entry)
        return found

    def continuations(self, place: Place, next_token: int | None) -> list[Continuation]:
        """Return the chunks at a place; with `next_token`, those that begin with it."""
        statement = "SELECT token_hash, tokens FROM chunks WHERE place = ?"
        values: tuple[Any, ...] = (place.digest,)
        if next_token is not None:
            statement, values = statement + " AND first_token = ?", (*values, next_token)
        found = []
        for token_hash, raw in self._rows(statement, values):
            with suppress(ValueError, TypeError, StoreError):  # a damaged row finds nothing
                tokens = np.frombuffer(raw, dtype=np.int64)
                if hash_tokens(tokens) == token_hash:
                    found.append(Continuation(place.key(token_hash), tokens))
        return found

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _entry(self, row: Sequence[Any]) -> Entry:
        *key, num_tokens, nbytes, hits, created, last_used, pinned = row
        return Entry(
            key=ChunkKey(*key),
            num_tokens=int(num_tokens),
            nbytes=int(nbytes),
            tiers=(self._tier,),
            hits=int(hits),
            created=float(created),
            last_used=float(last_used),
            pinned=bool(pinned),
        )

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._run(lambda: self._connection.execute(statement, values).fetchall(), [])

    def _change(self, statement: str, values: Sequence[Any]) -> int:
        return self._run(lambda: self._connection.execute(statement, values).rowcount, 0)

    def _run(self, work: Callable[[], T], otherwise: T) -> T:
        with self._lock:
            try:
                return work()
            except (sqlite3.Error, UnicodeError) as error:  # the latter: a garbled message
                self._tally.add("errors")
                self._tally.say_once("index", "the index of stored chunks fails: %s", error)
                return otherwise

    def _open(self, path: Path) -> sqlite3.Connection:
        """Open the file; make it anew if it is damaged; do without one if that is impossible."""
        try:
            with locked(path.parent, OPEN_S):
                try:
                    return connect(path)
                except sqlite3.Error as error:
                    if error.sqlite_errorcode & 0xFF in _NOT_DAMAGE:
                        raise
                    logger.warning("the index %s is made anew: %s", path, error)
                for part in ("", "-wal", "-shm"):
                    path.with_name(path.name + part).unlink(missing_ok=True)
                return connect(path)
        except (OSError, sqlite3.Error) as error:
            self._tally.add("errors")
            logger.warning("no index at %s (%s); it is kept in memory only", path, error)
            return connect(None)


def connect(path: Path | None) -> sqlite3.Connection:
    """Open an index file, or one in memory, and check that it is whole.

    Raises:
        sqlite3.Error: it cannot be opened or written now, is damaged or of another version.
    """
    if path is not None:
        _make_private(path)
    connection = sqlite3.connect(
        ":memory:" if path is None else path,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # After a power cut the index may be damaged; then it is made anew from the files.
        connection.execute("PRAGMA synchronous = OFF")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise _damage(f"it has version {version}, not {SCHEMA_VERSION}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _damage(verdict)
        connection.execute(_TABLE)
        connection.execute(_PLACES)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute(f"SELECT name, place, first_token, {_ENTRY} FROM chunks LIMIT 1")
        connection.execute("UPDATE chunks SET hits = hits WHERE name = ''")  # is it writable?
    except UnicodeError as error:  # the message quotes what is garbled
        connection.close()
        raise _damage("its schema is garbled") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _make_private(path: Path) -> None:
    """Let nobody else read the index, which holds tokens; sqlite gives its other files the same."""
    # An existing file is not opened: closing it would drop the locks of this process's other
    # connections to it.
    with suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with suppress(OSError):
        path.chmod(0o600)


def _damage(reason: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
