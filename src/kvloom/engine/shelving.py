"""Opens the store that an engine's settings ask for.

Knows: folders, budgets and remote addresses.
Does not know: how chunks are kept, or when.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom.engine.engine import Engine
from kvloom.engine.shelf import Shelf
from kvloom.model.digest import cache_root

if TYPE_CHECKING:
    from kvloom.store.tiered import TieredStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """Where KV outlives the process.

    Attributes:
        folder: of the disk tier; None takes `store` in the cache folder.
        disk_bytes: budget of the disk tier.
        ram_bytes: budget of the memory tier, beside the KV memory.
        remote: address of a third tier, `redis://...` or any that fsspec knows; None for none.
    """

    folder: Path | None = None
    disk_bytes: int = 8 * 2**30
    ram_bytes: int = 128 * 2**20
    remote: str | None = None


def store_folder(settings: StoreSettings, cache_dir: Path | None) -> Path:
    """Return where the disk tier lies."""
    return settings.folder or cache_root(cache_dir) / "store"


def open_store(settings: StoreSettings, cache_dir: Path | None) -> TieredStore:
    """Return the store, its folder made where it was missing; one that cannot be used is left out.

    Raises:
        StoreError: the address names nothing that can be used.
    """
    from kvloom.store.disk import DiskStore
    from kvloom.store.ram import RamStore
    from kvloom.store.remote import open_remote
    from kvloom.store.tiered import TieredStore

    folder = store_folder(settings, cache_dir)
    if not folder.exists():
        logger.info("KV is kept in a new folder", extra={"folder": str(folder)})
    remote = None if settings.remote is None else open_remote(settings.remote)
    disk = DiskStore(folder, settings.disk_bytes)
    return TieredStore(RamStore(settings.ram_bytes), disk, remote)


def give_shelf(
    engine: Engine, store: TieredStore, fingerprint: bytes, text_of: Callable[[Sequence[int]], str]
) -> None:
    """Let an engine's prefixes outlive it.

    Args:
        engine: whose prefixes.
        store: keeps them.
        fingerprint: of the passport.
        text_of: gives the text of tokens, which is searched for credentials.
    """
    from kvloom.store.secrets import SecretScanner

    scanner = SecretScanner()
    memory = engine.memory
    memory.shelf = Shelf(
        store, memory.pool, memory.root, fingerprint, lambda tokens: scanner.scan(text_of(tokens))
    )
