"""A chunk as bytes: it comes back bit by bit, aligned, and no other bytes are taken for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from kvloom.errors import StoreError
from kvloom.store import serde
from kvloom.store.serde import DamagedChunkError, OtherVersionError, deserialize, serialize
from tests.store.chunks import assert_same, chunks, make_chunk, raw


def joined(chunk) -> bytearray:
    return bytearray(b"".join(serialize(chunk)))


@given(chunks())
def test_round_trip(chunk):
    data = joined(chunk)
    assert_same(deserialize(data, chunk.key), chunk)
    assert joined(chunk) == data


@given(chunks())
def test_the_library_reads_it_and_every_tensor_starts_at_a_multiple_of_64(chunk):
    data = joined(chunk)
    header = serde.read_header(data)
    found = load(bytes(data))
    for group, prefix in ((chunk.tensors, "kv."), (chunk.statistics, "stat.")):
        for name, tensor in group.items():
            assert raw(found[prefix + name]) == raw(tensor)
            start, _ = header.entries[prefix + name]["data_offsets"]
            assert (header.start + start) % 64 == 0
    assert found["tokens"].tolist() == chunk.tokens.tolist()


def test_tensors_are_views_of_the_buffer(tmp_path):
    chunk = make_chunk([1, 2, 3])
    data = joined(chunk)
    found = deserialize(data, chunk.key)
    start = found.tensors["0.k"].data_ptr()
    first = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    assert first < start < first + len(data)
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("kv.0.k"), chunk.tensors["0.k"])


@given(chunks(), st.data())
def test_any_changed_bit_is_found(chunk, data):
    good = joined(chunk)
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((DamagedChunkError, OtherVersionError)):
        deserialize(bad, chunk.key)


@given(chunks(), st.data())
def test_other_lengths_are_found(chunk, data):
    good = joined(chunk)
    cut = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:cut], good + bytes(data.draw(st.integers(1, 200)))):
        with pytest.raises(DamagedChunkError):
            deserialize(bad, chunk.key)


@given(st.binary(max_size=300))
def test_garbage_is_no_chunk(garbage):
    with pytest.raises(DamagedChunkError):
        deserialize(bytearray(garbage), make_chunk([1]).key)


def test_other_safetensors_are_no_chunks():
    for metadata in (None, {"kvloom": "{}"}, {"kvloom": "[]"}, {"kvloom": "{"}):
        data = save({"x": torch.zeros(3)}, metadata)
        with pytest.raises(DamagedChunkError):
            serde.read_header(data)


def test_another_chunk_is_refused():
    one, other = make_chunk([1, 2]), make_chunk([1, 3])
    with pytest.raises(DamagedChunkError, match="another chunk"):
        deserialize(joined(one), other.key)


def test_another_version_is_told_from_damage(monkeypatch):
    chunk = make_chunk([1, 2])
    monkeypatch.setattr(serde, "FORMAT_VERSION", 2)
    data = joined(chunk)
    monkeypatch.undo()
    with pytest.raises(OtherVersionError, match="format 2"):
        deserialize(data, chunk.key)


def test_a_header_that_lies_with_a_right_checksum_is_refused(monkeypatch):
    """Whoever computes the checksum anew must at least not read outside of the buffer."""
    chunk = make_chunk([1, 2])
    entry = serde._entry
    lies = [("F32", [10**12], 0, 4 * 10**12), ("F32", [1], -4, 0), ("F32", [1], 0, 8)]
    lies += [("X", [1], 0, 4), ("F32", ["1"], 0, 4), ("F32", [-1], 0, -4)]
    for lie in lies:
        monkeypatch.setattr(serde, "_entry", lambda *_, lie=lie: entry(*lie))
        data = joined(chunk)
        with pytest.raises(DamagedChunkError, match=r"fit|read"):
            deserialize(data, chunk.key)


def test_what_cannot_be_stored_is_said():
    with pytest.raises(StoreError, match="dtype"):
        serialize(make_chunk([1], tensors={"x": torch.zeros(2, dtype=torch.complex64)}))
    with pytest.raises(StoreError, match="JSON"):
        serialize(make_chunk([1], facts={"x": object()}))


@given(st.binary(max_size=100))
def test_aligned_copies(data):
    copy = serde.aligned(data)
    assert bytes(copy) == data
    assert not copy.readonly
