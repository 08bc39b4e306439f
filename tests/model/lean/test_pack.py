"""A GGUF file's own codes are taken where they give a matrix bit for bit, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.model.lean.pack import GgufCodes, Packer, decode_blocks
from kvloom.ops.packing import unpack
from kvloom.types import WeightFormat

KINDS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
Type = gguf.GGMLQuantizationType


def random_blocks(kind: str, rows: int, groups: int, seed: int) -> np.ndarray:
    """Return blocks of any codes, whose scales and minimums are finite."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, groups, KINDS[kind]), dtype=np.uint8)
    numbers = 2 if kind == "Q4_1" else 1
    halves = (
        random.standard_normal((rows, groups, numbers)) * 10.0 ** random.integers(-6, 2)
    ).astype(np.float16)
    blocks[..., : 2 * numbers] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether values are equal bit for bit; both zeros are one."""
    return bool(
        np.array_equal((x + np.float32(0)).view(np.int32), (y + np.float32(0)).view(np.int32))
    )


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_blocks_are_decoded_as_gguf_does(kind, rows, groups, seed):
    blocks = random_blocks(kind, rows, groups, seed)
    coded = decode_blocks(kind, blocks)
    assert coded is not None
    assert same_bits(coded.dense(), dequantize(blocks, Type[kind]))
    limits = (-128, 127) if kind == "Q8_0" else (0, 15)
    assert limits[0] <= coded.codes.min() <= coded.codes.max() <= limits[1]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    assert decode_blocks(kind, np.zeros((2, 36), dtype=np.uint8)) is None


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    """Write tensors of blocks, or of plain numbers, into a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, data) in tensors.items():
        raw = None if kind == "F32" else Type[kind]
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(kind: str, blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(dequantize(blocks, Type[kind])))


@pytest.fixture(scope="module")
def blocks() -> dict[str, np.ndarray]:
    return {
        "q": random_blocks("Q4_0", 48, 2, 1),
        "k": random_blocks("Q4_0", 16, 2, 2),
        "one": random_blocks("Q4_1", 40, 2, 3),
        "eight": random_blocks("Q8_0", 33, 2, 4),
        "long": random_blocks("Q8_0", 20, 3, 5),
    }


SPELLED = {"q": "Q4_0", "k": "Q4_0", "one": "Q4_1", "eight": "Q8_0", "long": "Q8_0"}


@pytest.fixture(scope="module")
def file(blocks: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors: dict[str, Any] = {name: (SPELLED[name], data) for name, data in blocks.items()}
    values = np.random.default_rng(6).standard_normal((8, 256)).astype(np.float32)
    tensors["coarse"] = ("Q5_0", gguf.quantize(values, Type.Q5_0))
    # Blocks of Q6_K: 256 values in 210 bytes, of which nothing is read.
    tensors["k-quant"] = ("Q6_K", np.zeros((4, 210), dtype=np.uint8))
    tensors["plain"] = ("F32", values)
    tensors["norm"] = ("F32", np.ones(64, dtype=np.float32))
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors)


@pytest.fixture(scope="module")
def codes(file: Path) -> GgufCodes:
    return GgufCodes(file)


@pytest.mark.parametrize("name", SPELLED)
def test_every_coded_tensor_is_found(
    codes: GgufCodes, blocks: dict[str, np.ndarray], name: str
) -> None:
    matrix = dense(SPELLED[name], blocks[name])
    found = codes.find(matrix)
    assert found is not None
    assert found.format == ("int8" if SPELLED[name] == "Q8_0" else "int4")
    assert (found.outputs, found.inputs) == tuple(matrix.shape)
    assert torch.equal(unpack(found), matrix)


@given(data=st.data())
def test_rows_are_found_in_any_order_and_out_of_several_tensors(codes, blocks, data):
    q, k = dense("Q4_0", blocks["q"]), dense("Q4_0", blocks["k"])
    one = dense("Q4_1", blocks["one"])
    rows = torch.cat([q, k, one])
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=70))
    found = codes.find(rows[order])
    assert found is not None
    assert found.format == "int4"
    assert torch.equal(unpack(found), rows[order])


def test_a_half_precision_copy_of_exact_values_is_found(
    codes: GgufCodes, blocks: dict[str, np.ndarray]
) -> None:
    matrix = dense("Q8_0", blocks["eight"])
    assert codes.find(matrix.double()) is not None


def test_negative_zeros_are_zeros(tmp_path: Path) -> None:
    blocks = random_blocks("Q4_0", 16, 1, 9)
    blocks[:, :2] = np.float16(-0.5).tobytes()[0], np.float16(-0.5).tobytes()[1]
    blocks[:, 2:] = 0x88  # codes of 8 stand for zero, here for a negative one
    matrix = dense("Q4_0", blocks)
    found = GgufCodes(write(tmp_path / "zeros.gguf", {"z": ("Q4_0", blocks)})).find(matrix)
    assert found is not None
    assert torch.equal(unpack(found), torch.zeros(16, 32))


def test_what_is_not_in_the_file_is_not_found(
    codes: GgufCodes, blocks: dict[str, np.ndarray]
) -> None:
    q, eight = dense("Q4_0", blocks["q"]), dense("Q8_0", blocks["eight"])
    changed = q.clone()
    changed[7, 3] += 1e-3 * q.abs().max()
    absent = [
        changed,
        torch.cat([q, eight]),  # two formats
        q[:, :32],
        q[:, :31],
        q.T.contiguous()[:, :32],
        torch.randn(4, 64),
        torch.full((2, 64), torch.nan),
    ]
    assert [codes.find(matrix) for matrix in absent] == [None] * len(absent)


def test_other_formats_are_counted(codes: GgufCodes) -> None:
    assert dict(codes.skipped) == {"Q5_0": 1, "Q6_K": 1, "F32": 1}


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_a_packer_counts_what_is_exact_and_what_was_rounded(
    codes: GgufCodes, blocks: dict[str, np.ndarray], format: Any
) -> None:
    packer = Packer(format, codes)
    own, random = (
        dense("Q8_0", blocks["eight"]),
        torch.randn(20, 64, generator=torch.Generator().manual_seed(0)),
    )
    first, second, zeros = packer(own), packer(random), packer(torch.zeros(5, 64))
    assert first.format == "int8"
    assert torch.equal(unpack(first), own)
    assert second.format == zeros.format == format
    assert packer.exact == (3 if format == "float32" else 2)
    assert dict(packer.rounded) == ({} if format == "float32" else {format: 1})
    assert all(weight.codes.data_ptr() % 64 == 0 for weight in (first, second, zeros))


def test_a_packer_without_codes_rounds_all(blocks: dict[str, np.ndarray]) -> None:
    packer = Packer("int4")
    own = dense("Q8_0", blocks["eight"])
    assert packer(own).format == "int4"
    assert (packer.exact, dict(packer.rounded)) == (0, {"int4": 1})


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_matrix_that_cannot_be_coded_is_exact(format: WeightFormat) -> None:
    packer, matrix = Packer(format), torch.randn(4, 33)
    assert packer(matrix).format == "float32"
    assert packer(matrix.to(torch.bfloat16).float()).format == "bfloat16"
    assert (packer.exact, dict(packer.rounded)) == (2, {})
