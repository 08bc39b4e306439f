"""`kvloom store`: list, check, clean up, carry and remove, in a folder of the test's own."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from kvloom.store.disk import DiskStore
from kvloom.store.key import hash_tokens
from tests.cli.conftest import Invoke, assert_error
from tests.store.chunks import ALICE, FINGERPRINT, make_chunk, place_of

CHUNKS = [make_chunk([1, 2, 3]), make_chunk([4, 5])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = DiskStore(tmp_path / "store")
    for chunk in CHUNKS:
        store.put(chunk)
    store.get(CHUNKS[0].key)
    store.pin(CHUNKS[0].name)
    store.close()
    return tmp_path / "store"


def damage(folder: Path) -> None:
    path = folder / f"{CHUNKS[0].name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_ls_shows_sizes_hits_and_uses(invoke: Invoke, folder: Path) -> None:
    result = invoke("store", "ls")
    assert result.exit_code == 0
    header, first, second = result.stdout.splitlines()
    assert "last use" in header
    assert first.split()[:2] == [CHUNKS[0].name[:12], "3"]
    assert second.split()[:2] == [CHUNKS[1].name[:12], "2"]
    assert FINGERPRINT.hex()[:12] in first
    assert ALICE[:8] in first
    assert "yes" in first
    assert "2 chunks, 5 tokens" in result.stderr


def test_ls_as_json(invoke: Invoke, folder: Path) -> None:
    result = invoke("store", "ls", "--json", "--store", str(folder))
    first, second = json.loads(result.stdout)
    assert (first["name"], first["tokens"], first["hits"]) == (CHUNKS[0].name, 3, 1)
    assert first["bytes"] == (folder / f"{CHUNKS[0].name}.safetensors").stat().st_size
    assert first["last_used"] >= first["created"]
    assert (first["pinned"], second["pinned"]) == (True, False)
    assert first["context"] == place_of().context.hex()


def test_verify_and_gc(invoke: Invoke, folder: Path) -> None:
    assert "2 intact, 0 failed" in invoke("store", "verify").stderr
    damage(folder)
    verified = invoke("store", "verify")
    assert verified.exit_code == 1
    assert f"{CHUNKS[0].name[:12]}: its checksum differs" in verified.stderr
    assert "Error: 1 chunks failed; run `kvloom store gc`" in verified.stderr
    cleaned = invoke("store", "gc")
    assert cleaned.exit_code == 0
    assert "1 removed" in cleaned.stderr
    assert "1 intact, 0 failed" in invoke("store", "verify").stderr
    assert "1 removed" in invoke("store", "gc", "--budget", "1KiB").stderr
    assert "no stored chunks" in invoke("store", "ls").stderr


@pytest.mark.parametrize("target", ["export", "export.tar"])
def test_export_and_import(invoke: Invoke, folder: Path, tmp_path: Path, target: str) -> None:
    path, other = str(tmp_path / target), str(tmp_path / "other")
    assert "2 exported" in invoke("store", "export", path).stderr
    assert "2 imported" in invoke("store", "import", path, "--store", other).stderr
    assert len(json.loads(invoke("store", "ls", "--json", "--store", other).stdout)) == 2
    some = str(tmp_path / f"some-{target}")
    assert "1 exported" in invoke("store", "export", some, CHUNKS[1].name[:10]).stderr


def test_what_files_say_is_not_carried_out_by_a_terminal(
    invoke: Invoke, folder: Path, tmp_path: Path
) -> None:
    store = DiskStore(folder)
    evil = make_chunk([7], key=place_of(recipe="\x1b]0;evil\x07").key(hash_tokens([7])))
    store.put(evil)
    store.close()
    assert "\x1b" not in invoke("store", "ls").output
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("\x1b[31m.safetensors"))
    assert "\x1b" not in invoke("store", "import", str(tmp_path / "in.tar")).output


def test_rm(invoke: Invoke, folder: Path) -> None:
    assert invoke("store", "rm", CHUNKS[0].name[:12]).exit_code == 0
    (left,) = json.loads(invoke("store", "ls", "--json").stdout)
    assert left["name"] == CHUNKS[1].name
    assert invoke("store", "rm", CHUNKS[1].name).exit_code == 0


def test_wrong_names_and_folders_are_said(invoke: Invoke, folder: Path, tmp_path: Path) -> None:
    assert_error(invoke("store", "rm", "xyz"), 1, "xyz", "store ls")
    assert_error(invoke("store", "rm", ""), 1, "no stored chunk")
    assert_error(invoke("store", "rm"), 2, "NAME")
    none = str(tmp_path / "none")
    assert_error(invoke("store", "ls", "--store", none), 1, "none", "--store")
    assert not Path(none).exists()
    assert_error(invoke("store", "import", none), 1, "cannot be read")
    (tmp_path / "file").touch()
    assert_error(invoke("store", "ls", "--store", str(tmp_path / "file")), 2, "store")
    assert_error(invoke("store", "gc", "--budget", "much"), 2, "much")
