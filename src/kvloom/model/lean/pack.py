"""Packs a model's matrices: a GGUF file's own codes where they are at hand, else rounded.

Knows: the blocks of GGUF formats, and how a matrix is found among a file's tensors by its rows.
Does not know: what the matrices are for. Nothing is requantised that a file holds in a format that
the kernels read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.ops.native.kernels import aligned
from kvloom.ops.packing import GROUP, PackedWeight, pack_int4, pack_int8, quantize, unpack
from kvloom.types import WeightFormat


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor of a GGUF file, block by block.

    Attributes:
        format: `int4` has minimums, `int8` has none.
        codes: uint8 0 to 15, or int8, (n, k).
        scale: fp16 (n, groups).
        minimum: fp16 (n, groups); None for int8.
    """

    format: WeightFormat
    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None

    def dense(self) -> np.ndarray:
        """Return the values in fp32, as GGUF defines them."""
        grouped = self.codes.astype(np.float32).reshape(*self.scale.shape, GROUP)
        values = grouped * self.scale.astype(np.float32)[..., None]
        if self.minimum is not None:
            values = values + self.minimum.astype(np.float32)[..., None]
        return values.reshape(self.codes.shape)


def decode_blocks(kind: str, blocks: np.ndarray) -> CodedTensor | None:
    """Return the codes of a tensor in Q4_0, Q4_1 or Q8_0; None for other formats.

    Source: ggml-quants, block_q4_0 (half scale, 16 bytes), block_q4_1 (half scale, half minimum,
    16 bytes) and block_q8_0 (half scale, 32 bytes); byte j holds inputs j and j + 16.

    Args:
        kind: GGUF's name of the format.
        blocks: uint8 (n, bytes of a row).
    """
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    if kind not in sizes:
        return None
    split = np.ascontiguousarray(blocks).reshape(len(blocks), -1, sizes[kind])
    n = len(blocks)
    scale = np.ascontiguousarray(split[..., :2]).view(np.float16)[..., 0]
    if kind == "Q8_0":
        codes = np.ascontiguousarray(split[..., 2:]).view(np.int8).reshape(n, -1)
        return CodedTensor("int8", codes, scale, None)
    halves = split[..., -16:]
    codes = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(n, -1)
    if kind == "Q4_1":
        minimum = np.ascontiguousarray(split[..., 2:4]).view(np.float16)[..., 0]
    else:  # a power of two times a half is exact
        minimum = (scale.astype(np.float32) * -8).astype(np.float16)
    return CodedTensor("int4", codes, scale, minimum)


class GgufCodes:
    """The coded tensors of a GGUF file, found by the values of their rows.

    A model's matrix may hold a tensor's rows in another order (Llama's q and k are permuted), or
    those of several tensors: rows are looked up one by one, and what was found must give the
    matrix bit for bit.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._tensors: list[CodedTensor] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self.skipped: Counter[str] = Counter()
        reader: Any = GGUFReader(path)
        for tensor in reader.tensors:
            if len(tensor.shape) != 2:
                continue
            coded = decode_blocks(tensor.tensor_type.name, np.asarray(tensor.data))
            if coded is None:
                self.skipped[tensor.tensor_type.name] += 1
                continue
            number = len(self._tensors)
            self._tensors.append(coded)
            for row, values in enumerate(coded.dense()):
                self._places.setdefault(_key(values), (number, row))

    def find(self, weight: Tensor) -> PackedWeight | None:
        """Return the packed codes of a matrix; None if the file holds none that give it exactly."""
        if weight.shape[1] % GROUP:
            return None
        places = [self._places.get(_key(row)) for row in weight.float().numpy()]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return None
        parts = np.array(found)
        tensors = [self._tensors[number] for number in dict.fromkeys(parts[:, 0].tolist())]
        if (
            len({tensor.format for tensor in tensors}) > 1
            or tensors[0].codes.shape[1] != (weight.shape[1])
        ):
            return None
        packed = self._gather(parts)
        return packed if torch.equal(unpack(packed), weight.float()) else None

    def _gather(self, parts: np.ndarray) -> PackedWeight:
        def rows(pick: Callable[[CodedTensor], Any]) -> Tensor:
            arrays = {number: pick(self._tensors[number]) for number in set(parts[:, 0].tolist())}
            first = next(iter(arrays.values()))
            out = np.empty((len(parts), first.shape[1]), dtype=first.dtype)
            for number, array in arrays.items():
                mine = parts[:, 0] == number
                out[mine] = array[parts[mine, 1]]
            return torch.from_numpy(out)

        codes, scale = rows(lambda tensor: tensor.codes), rows(lambda tensor: tensor.scale)
        if self._tensors[int(parts[0, 0])].format == "int8":
            return pack_int8(codes, scale)
        return pack_int4(codes, scale, rows(lambda tensor: tensor.minimum))


class Packer:
    """Gives every matrix its packed form.

    Attributes:
        exact: matrices whose packed form holds the very values of the model.
        rounded: matrices that were rounded, by format.

    Args:
        format: what matrices are rounded to where no codes are found.
        codes: a file's own codes, which come first; None rounds all.
    """

    def __init__(self, format: WeightFormat, codes: GgufCodes | None = None) -> None:
        self._format = format
        self._codes = codes
        self.exact = 0
        self.rounded: Counter[str] = Counter()

    def __call__(self, weight: Tensor) -> PackedWeight:
        """Pack one matrix, fp32 (outputs, inputs)."""
        if self._codes is not None:
            found = self._codes.find(weight)
            if found is not None:
                self.exact += 1
                return aligned(found)
        packed = aligned(quantize(weight, self._format))
        if torch.equal(unpack(packed), weight.float()):
            self.exact += 1
        else:
            self.rounded[packed.format] += 1
        return packed


def _key(row: np.ndarray) -> bytes:
    # Adding zero makes a negative zero positive, so that equal values have equal bytes.
    return (row + np.float32(0)).tobytes()
