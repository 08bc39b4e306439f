"""A store is opened where the settings say, and credentials do not reach its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.engine.shelving import StoreSettings, give_shelf, open_store, store_folder
from kvloom.errors import StoreError
from tests.engine.worlds import BOOKS, TOKENIZER, fake_engine, greedy


def test_the_folder_is_the_one_asked_for_or_lies_in_the_cache(tmp_path: Path) -> None:
    assert store_folder(StoreSettings(folder=tmp_path / "x"), tmp_path / "y") == tmp_path / "x"
    assert store_folder(StoreSettings(), tmp_path).parent == tmp_path


@pytest.mark.parametrize("remote", [None, "memory://kept"])
def test_kv_lies_in_the_folder_afterwards(tmp_path: Path, remote: str | None) -> None:
    settings = StoreSettings(folder=tmp_path / "kept", remote=remote)
    found = []
    for _ in range(2):
        engine = fake_engine()
        give_shelf(engine, open_store(settings, None), b"one model", TOKENIZER.decode)
        engine.submit(BOOKS[0][:100], greedy(1))
        while engine.has_work:
            found += [event.usage for event in engine.step()]  # type: ignore[union-attr]
        engine.close()
    assert [usage is not None and usage.cached_tokens for usage in found] == [0, 99]


def test_credentials_stay_out_of_the_folder(tmp_path: Path) -> None:
    engine = fake_engine()
    key = "-----BEGIN RSA " + "PRIVATE KEY-----"
    store = open_store(StoreSettings(folder=tmp_path), None)
    give_shelf(engine, store, b"one model", lambda tokens: f"some text {key} and more")
    engine.submit(BOOKS[0][:100], greedy(1))
    while engine.has_work:
        engine.step()
    engine.close()
    assert store.statistics().secret == 1
    again = open_store(StoreSettings(folder=tmp_path), None)
    assert not again.entries()
    again.close()


def test_a_folder_that_cannot_be_used_costs_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    engine = fake_engine()
    store = open_store(StoreSettings(folder=tmp_path / "file"), None)
    give_shelf(engine, store, b"one model", TOKENIZER.decode)
    engine.submit(BOOKS[0][:100], greedy(1))
    while engine.has_work:
        engine.step()
    engine.close()
    assert store.statistics().tiers["disk"].errors > 0


def test_an_address_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        open_store(StoreSettings(folder=tmp_path, remote="nowhere://x"), None)
