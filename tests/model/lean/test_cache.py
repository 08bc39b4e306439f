"""Packed models on disk: whole or not at all, and whatever is damaged counts as none."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvloom.model.lean import cache
from kvloom.model.lean.cache import (
    PackedModel,
    load_packed,
    load_refusal,
    packed_folder,
    save_packed,
    save_refusal,
)
from kvloom.model.stored_tokenizer import TokenizerFacts
from tests.model.lean.decoders import decoder_of, family
from tests.model.lean.test_encode import same

KEY = {"files": "abc", "weights": "int8", "level": "avx2", "abi": 1}


def packed(name: str = "gemma2") -> PackedModel:
    return PackedModel(
        decoder=decoder_of(name, "int8"),
        spec=family(name)[1].spec,
        weights="int8 + bfloat16",
        digests={"weights": "1", "config": "2", "tokenizer": "3"},
        eos_token_ids=(2, 7),
        receipt={"nll": 1.25, "tokens": 384.0},
        tokenizer=('{"ä": "🙂"}', TokenizerFacts(0, None, "{{ x }}", {"bos_token": "<s>"})),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_packed(packed(), KEY, tmp_path)
    return packed_folder(KEY, tmp_path)


def test_what_was_saved_is_loaded(folder: Path, tmp_path: Path) -> None:
    found = load_packed(KEY, tmp_path)
    assert found is not None
    expected = packed()
    assert same(found.decoder, expected.decoder)
    assert same(found.spec, expected.spec)
    assert replace(found, decoder=expected.decoder, spec=expected.spec) == expected
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == [folder.name]


def test_tensors_are_mapped_and_aligned(folder: Path, tmp_path: Path) -> None:
    found = load_packed(KEY, tmp_path)
    assert found is not None
    decoder = found.decoder
    tensors = [w.codes for layer in decoder.layers for _, w in layer.weights()]
    tensors += [decoder.embedding.codes, decoder.head.codes]
    tensors += [
        w.scales for layer in decoder.layers for _, w in layer.weights() if w.scales is not None
    ]
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "packed.safetensors") in maps


def test_tied_weights_take_their_bytes_once(tmp_path: Path) -> None:
    sizes = {}
    for name in ("gemma2", "llama"):
        key = KEY | {"files": name}
        save_packed(packed(name), key, tmp_path)
        path = packed_folder(key, tmp_path) / "packed.safetensors"
        large = [len(x) for x in load_file(path).values()]
        sizes[name] = large.count(decoder_of(name, "int8").embedding.codes.numel())
        found = load_packed(key, tmp_path)
        assert found is not None
        tied = found.decoder.head.codes.data_ptr() == found.decoder.embedding.codes.data_ptr()
        assert tied == (name == "gemma2")


def test_of_another_key_there_is_none(folder: Path, tmp_path: Path) -> None:
    for change in ({"level": "avx512"}, {"abi": 2}, {"more": None}):
        assert load_packed(KEY | change, tmp_path) is None
    assert load_packed(KEY, tmp_path / "elsewhere") is None


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def other_fact(content: Any) -> Any:
    content["model"]["decoder"]["fields"]["more"] = 1
    return content


def other_number(content: Any) -> Any:
    content["model"]["decoder"]["fields"]["embedding_scale"] *= 1.5
    return content


def less(name: str) -> Callable[[Any], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda f: (f / "packed.json").unlink(),
    "an empty manifest": lambda f: (f / "packed.json").write_text(""),
    "half a manifest": lambda f: cut(f / "packed.json", 900),
    "a list for a manifest": lambda f: (f / "packed.json").write_text("[]"),
    "a manifest of nothing": lambda f: (f / "packed.json").write_text("{}"),
    "bytes that are no text": lambda f: (f / "packed.json").write_bytes(b"\xff\xfe{"),
    "a deep manifest": lambda f: (f / "packed.json").write_text("[" * 100_000),
    "no model": lambda f: rewrite(f / "packed.json", less("model")),
    "no files": lambda f: rewrite(f / "packed.json", less("files")),
    "model is a number": lambda f: rewrite(f / "packed.json", lambda c: c | {"model": 3}),
    "another field": lambda f: rewrite(f / "packed.json", other_fact),
    "another number": lambda f: rewrite(f / "packed.json", other_number),
    "another key": lambda f: rewrite(f / "packed.json", lambda c: c | {"key": {}}),
    "another version": lambda f: rewrite(f / "packed.json", lambda c: c | {"format_version": 99}),
    "no weights": lambda f: (f / "packed.safetensors").unlink(),
    "cut weights": lambda f: cut(f / "packed.safetensors", 10_000),
    "empty weights": lambda f: cut(f / "packed.safetensors", 0),
    "a flipped byte": lambda f: flip(f / "packed.safetensors", -100),
    "a flipped byte of the header": lambda f: flip(f / "packed.safetensors", 20),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "a changed tokenizer": lambda f: flip(f / "tokenizer.json", 3),
    "a folder for weights": lambda f: (
        (f / "packed.safetensors").unlink(),
        (f / "packed.safetensors").mkdir(),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_counts_as_none_and_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    time.sleep(0.002)  # so that the time of change differs
    DAMAGES[name](folder)
    with caplog.at_level(logging.WARNING):
        assert load_packed(KEY, tmp_path) is None
    (record,) = caplog.records
    assert "packing again" in record.message
    assert str(folder) in record.message
    save_packed(packed(), KEY, tmp_path)
    assert load_packed(KEY, tmp_path) is not None


def test_a_touched_file_is_read_and_accepted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.utime(folder / "packed.safetensors", ns=(1, 1))
    assert load_packed(KEY, tmp_path) is not None
    assert caplog.text == ""


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "packed").write_text("a file where a folder must be")
    with pytest.raises(OSError, match="packed"):
        save_packed(packed(), KEY, tmp_path)


@pytest.mark.parametrize("step", ["save_file", "write_json", "_stamp"])
def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(cache, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_packed(packed(), KEY, tmp_path)
    assert not packed_folder(KEY, tmp_path).exists()
    assert [path for path in (tmp_path / "packed").iterdir() if path.is_dir()] == []
    assert load_packed(KEY, tmp_path) is None


def test_a_save_over_another_replaces_it(folder: Path, tmp_path: Path) -> None:
    held = load_packed(KEY, tmp_path)
    save_packed(replace(packed(), weights="int4"), KEY, tmp_path)
    found = load_packed(KEY, tmp_path)
    assert found is not None
    assert found.weights == "int4"
    assert held is not None
    assert same(held.decoder, found.decoder), "what is mapped stays readable"


# Processes. A child saves on its own, and may be told to stop at a step.

CHILD = """
import sys, time
from pathlib import Path
from kvloom.model.lean import cache
from tests.model.lean.test_cache import KEY, packed
step, root = sys.argv[1], Path(sys.argv[2])
def hang(*args, **kwargs):
    print("there", flush=True)
    time.sleep(60)
if step != "none":
    setattr(cache, step, hang)
model = packed()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    cache.save_packed(model, KEY, root)
"""


def child(step: str, root: Path, times: int = 1) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, step, str(root), str(times)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_may_save_at_once(tmp_path: Path) -> None:
    children = [child("none", tmp_path, times=4) for _ in range(2)]
    for process in children:
        go(process)
    while any(process.poll() is None for process in children):
        time.sleep(0.01)
    assert [process.returncode for process in children] == [0, 0]
    assert load_packed(KEY, tmp_path) is not None
    assert len([path for path in (tmp_path / "packed").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("step", ["_stamp", "write_json"])
def test_a_save_that_is_killed_leaves_nothing_that_loads(tmp_path: Path, step: str) -> None:
    process = child(step, tmp_path)
    go(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert load_packed(KEY, tmp_path) is None
    save_packed(packed(), KEY, tmp_path)
    found = load_packed(KEY, tmp_path)
    assert found is not None
    assert torch.equal(found.decoder.head.codes, packed().decoder.head.codes)


def test_a_refusal_is_kept_for_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_refusal(KEY, tmp_path) is None
    save_refusal("layer 0 differs: größer", KEY, tmp_path)
    assert load_refusal(KEY, tmp_path) == "layer 0 differs: größer"
    for name in KEY:
        assert load_refusal(KEY | {name: "another"}, tmp_path) is None
    assert load_packed(KEY, tmp_path) is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"key": 3', None]
)
def test_a_damaged_refusal_counts_as_none_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    save_refusal("layer 0 differs", KEY, tmp_path)
    (path,) = (tmp_path / "packed").glob("*.refused.json")
    if content is None:
        rewrite(path, lambda kept: kept | {"format_version": 99})
    else:
        path.write_bytes(content)
    assert load_refusal(KEY, tmp_path) is None
    assert "trying again" in caplog.text
