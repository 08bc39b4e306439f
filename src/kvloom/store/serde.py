"""A chunk as bytes, the same in every tier: one safetensors file that can be mapped and read.

Knows: the file format, its version and its checksum.
Does not know: files, sockets or tiers.

The library writes tensors at multiples of 8 bytes; here every tensor starts at a multiple of 64,
because gaps between tensors (which the format forbids) are tensors of zeros of their own. So the
header is written here, and what the library reads from it is a test.

The checksum covers every byte but its own 32 digits, which stand at a fixed place. It finds
damage, not forgery: whoever may write to a store may put anything into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvloom.errors import StoreError
from kvloom.kv.lineage import Lineage
from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey

FORMAT_VERSION = 1
ALIGNMENT = 64
Buffer = bytes | bytearray | memoryview

_OPENING = b'{"__metadata__":{"checksum":"'
_DIGITS = slice(8 + len(_OPENING), 8 + len(_OPENING) + 32)
_TENSOR, _STATISTIC, _TOKENS, _GAP = "kv.", "stat.", "tokens", "gap."
_MAX_HEADER = 64 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class DamagedChunkError(StoreError):
    """Bytes are not what was written, or belong to another chunk."""


class OtherVersionError(StoreError):
    """Bytes are in a format of another version of kvloom."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors.

    Attributes:
        key: what the chunk is.
        manifest: the chunk's facts as JSON.
        entries: dtype, shape and place of each tensor, by name.
        start: first byte behind the header.
    """

    key: ChunkKey
    manifest: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    start: int


def serialize(chunk: Chunk) -> list[memoryview]:
    """Return a chunk as pieces of bytes to be written one after the other; tensors are not copied.

    Equal chunks give equal bytes.

    Raises:
        StoreError: a tensor has a dtype that cannot be stored, or the facts are not JSON.
    """
    arrays = {_TOKENS: torch.from_numpy(chunk.tokens)}
    arrays |= {_TENSOR + name: tensor for name, tensor in chunk.tensors.items()}
    arrays |= {_STATISTIC + name: tensor for name, tensor in chunk.statistics.items()}
    entries: dict[str, Any] = {}
    body: list[memoryview] = []
    offset = 0
    for number, (name, tensor) in enumerate(arrays.items()):
        if tensor.dtype not in _NAMES:
            raise StoreError(f"a chunk cannot be stored: {name} has dtype {tensor.dtype}.")
        stop = offset + tensor.nbytes
        entries[name] = _entry(_NAMES[tensor.dtype], list(tensor.shape), offset, stop)
        body.append(_raw(tensor))
        offset = stop
        if gap := -offset % ALIGNMENT:
            entries[f"{_GAP}{number}"] = _entry("U8", [gap], offset, offset + gap)
            body.append(memoryview(bytes(gap)))
            offset += gap
    header = _header(chunk, entries)
    state = xxhash.xxh3_128(header[: _DIGITS.start] + header[_DIGITS.stop :])
    for piece in body:
        state.update(piece)
    header[_DIGITS] = state.hexdigest().encode()
    return [memoryview(header), *body]


def deserialize(buffer: Buffer, key: ChunkKey) -> Chunk:
    """Return the chunk in a writable buffer; its tensors are views of the buffer.

    Raises:
        DamagedChunkError: a byte differs from what was written, or it is another chunk.
        OtherVersionError: the format is another one.
    """
    header = check(buffer)
    if header.key != key:
        raise DamagedChunkError("it is another chunk")
    try:
        return _chunk(memoryview(buffer), header)
    except (KeyError, TypeError, ValueError, RuntimeError, StoreError) as error:
        raise DamagedChunkError(f"its header does not fit its tensors ({error})") from error


def check(buffer: Buffer) -> Header:
    """Compare every byte with the checksum and return the header.

    Raises:
        DamagedChunkError: a byte differs from what was written.
        OtherVersionError: the format is another one.
    """
    header = read_header(buffer)
    view = memoryview(buffer)
    state = xxhash.xxh3_128(view[: _DIGITS.start])
    state.update(view[_DIGITS.stop :])
    if bytes(view[_DIGITS]) != state.hexdigest().encode():
        raise DamagedChunkError("its checksum differs")
    return header


def read_header(buffer: Buffer) -> Header:
    """Return the header, which may be damaged: no checksum is compared.

    Raises:
        DamagedChunkError: it cannot be read.
        OtherVersionError: the format is another one.
    """
    view = memoryview(buffer)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or not 0 < length <= min(len(view) - 8, _MAX_HEADER):
        raise DamagedChunkError("it is cut off")
    try:
        content = json.loads(bytes(view[8 : 8 + length]))
        manifest = json.loads(content.pop("__metadata__")["kvloom"])
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            return Header(_read_key(manifest["key"]), manifest, content, 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, StoreError) as error:
        raise DamagedChunkError(f"its header cannot be read ({error})") from error
    raise OtherVersionError(f"it has format {version!r}, not {FORMAT_VERSION}")


def read_tokens(buffer: Buffer, header: Header) -> np.ndarray:
    """Return a copy of a chunk's tokens, int64 of shape (t,).

    Raises:
        DamagedChunkError: they cannot be read.
    """
    try:
        tokens = _view(memoryview(buffer), header, _TOKENS).numpy().copy()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedChunkError(f"its tokens cannot be read ({error})") from error
    if tokens.ndim != 1 or tokens.dtype != np.int64 or not len(tokens):
        raise DamagedChunkError("its tokens cannot be read")
    return tokens


def aligned(data: Buffer) -> memoryview:
    """Return a writable copy of bytes in memory that starts at a multiple of 64."""
    memory = torch.empty(len(data), dtype=torch.uint8).numpy()
    memory[:] = np.frombuffer(data, dtype=np.uint8)
    return memory.data


def _entry(dtype: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, shared where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(chunk: Chunk, entries: dict[str, Any]) -> bytearray:
    """Return the length and the header, with zeros for the checksum."""
    key = chunk.key
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": {
            "fingerprint": key.fingerprint.hex(),
            "recipe": key.recipe,
            "token_hash": key.token_hash.hex(),
            "context": None if key.context is None else key.context.hex(),
            "tenant": key.tenant,
        },
        "base": chunk.base,
        "layout": chunk.layout,
        "dtype": chunk.dtype,
        "num_slots": chunk.num_slots,
        "origin": {"digest": chunk.origin.digest.hex(), "pending": list(chunk.origin.pending)},
        "facts": dict(chunk.facts),
    }
    try:
        words = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"a chunk cannot be stored: its facts are no JSON ({error}).") from error
    content = {"__metadata__": {"checksum": "0" * 32, "kvloom": words}, **entries}
    text = json.dumps(content, separators=(",", ":")).encode()
    assert text.startswith(_OPENING)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return bytearray(len(text).to_bytes(8, "little") + text)


def _read_key(content: Mapping[str, Any]) -> ChunkKey:
    context = content["context"]
    return ChunkKey(
        fingerprint=bytes.fromhex(content["fingerprint"]),
        recipe=str(content["recipe"]),
        token_hash=bytes.fromhex(content["token_hash"]),
        context=None if context is None else bytes.fromhex(context),
        tenant=str(content["tenant"]),
    )


def _chunk(view: memoryview, header: Header) -> Chunk:
    manifest = header.manifest

    def group(prefix: str) -> dict[str, Tensor]:
        names = [name for name in header.entries if name.startswith(prefix)]
        return {name.removeprefix(prefix): _view(view, header, name) for name in names}

    origin = manifest["origin"]
    return Chunk(
        key=header.key,
        tokens=read_tokens(view, header),
        base=int(manifest["base"]),
        layout=manifest["layout"],
        dtype=manifest["dtype"],
        num_slots=int(manifest["num_slots"]),
        tensors=group(_TENSOR),
        origin=Lineage(bytes.fromhex(origin["digest"]), tuple(origin["pending"])),
        statistics=group(_STATISTIC),
        facts=manifest["facts"],
    )


def _view(view: memoryview, header: Header, name: str) -> Tensor:
    entry = header.entries[name]
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    start, stop = entry["data_offsets"]
    count = math.prod(shape)
    if not 0 <= start <= stop or stop - start != count * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(view, dtype=dtype, count=count, offset=header.start + start)
    return tensor.reshape(shape)
