"""Ways to damage a folder of chunks, as disks, programs and people do it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from kvloom.store.disk import INDEX


def pick(folder: Path, chosen: random.Random) -> Path:
    return chosen.choice(sorted(folder.glob("*.safetensors")))


def flip_bits(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    data = bytearray(path.read_bytes())
    for _ in range(chosen.choice([1, 1, 2, 50])):
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)


def flip_header_bits(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    data = bytearray(path.read_bytes())
    data[chosen.randrange(min(400, len(data)))] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    data = path.read_bytes()
    path.write_bytes(data[: chosen.choice([0, 1, 7, 8, 64, chosen.randrange(len(data))])])


def extend(folder: Path, chosen: random.Random) -> None:
    with pick(folder, chosen).open("ab") as file:
        file.write(chosen.choice([b"\0", b"x" * 64, bytes(4096)]))


def zero(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    data = bytearray(path.read_bytes())
    start = chosen.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


def swap(folder: Path, chosen: random.Random) -> None:
    one, two = pick(folder, chosen), pick(folder, chosen)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def mix(folder: Path, chosen: random.Random) -> None:
    """The beginning of one file and the end of another."""
    one, two = pick(folder, chosen), pick(folder, chosen)
    a, b = one.read_bytes(), two.read_bytes()
    cut = chosen.randrange(len(a))
    one.write_bytes(a[:cut] + b[cut:])


def garble_manifest(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    old, new = chosen.choice(
        [
            (b'\\"base\\":0', b'\\"base\\":9'),
            (b"plain", b"tiled"),
            (b"float32", b"float64"),
            (b"F32", b"I32"),
            (b"{", b"["),
            (b"kv.0.k", b"kv.0.v"),
            (b'version\\":1', b'version\\":7'),
        ]
    )
    assert old in data[: 8 + length], old
    path.write_bytes(data[:8] + data[8 : 8 + length].replace(old, new) + data[8 + length :])


def replace_file(folder: Path, chosen: random.Random) -> None:
    path = pick(folder, chosen)
    path.unlink()
    match chosen.randrange(4):
        case 0:
            path.write_bytes(chosen.randbytes(1000))
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(pick(folder, chosen) if list(folder.glob("*.safetensors")) else "/")
        case 3:
            pass


def harm_index(folder: Path, chosen: random.Random) -> None:
    for path in folder.glob(f"{INDEX}-*"):
        path.unlink()
    index = folder / INDEX
    data = bytearray(index.read_bytes())
    match chosen.randrange(4):
        case 0:
            index.unlink()
        case 1:
            index.write_bytes(chosen.randbytes(chosen.randrange(5000)))
        case 2:
            index.write_bytes(data[: chosen.randrange(len(data))])
        case 3:
            for _ in range(chosen.choice([1, 5, 50])):
                data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
            index.write_bytes(data)


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip_bits,
    flip_header_bits,
    truncate,
    extend,
    zero,
    swap,
    mix,
    garble_manifest,
    replace_file,
    harm_index,
]
