"""Packed weights: matrices in the order in which the products read them, in four number formats.

Knows: how codes and scales lie in memory, how to pack them and how to read them back.
Does not know: models, files or the products themselves.

Layouts (n outputs, k inputs, groups of 32 inputs, blocks of 16 outputs, panels of 64 outputs;
outputs are padded with zeros to whole blocks or panels):

- int4: per block and group 256 bytes of codes, 16 fp16 scales, 16 fp16 minimums. Byte
  64 j + 4 r + i holds, of output r, input 8 j + i in its low half and input 8 j + 4 + i in its
  high half. A weight is scale * code + minimum.
- int8: per block and group 512 bytes of code + 128; byte 64 j + 4 r + i is input 4 j + i of
  output r. Scales, 16 per block and group, stand apart. A weight is scale * code.
- bfloat16: per panel and pair of inputs the 64 outputs' two values; an odd k is padded.
- float32: per panel and input the 64 outputs' values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from kvloom.types import WeightFormat

GROUP = 32
"""Inputs that share a scale."""
BLOCK = 16
"""Outputs of a block of coded weights."""
PANEL = 64
"""Outputs of a panel of plain weights."""
_TRIED_SHRINKS = 12


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix.

    Attributes:
        format: number format of the weights.
        outputs: rows of the matrix.
        inputs: columns of the matrix.
        codes: uint8, contiguous: the layout that the module describes.
        scales: fp16 of int8 weights (blocks, groups, 16); None for other formats.
        bias: fp32 (outputs,), or None.
    """

    format: WeightFormat
    outputs: int
    inputs: int
    codes: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and bias."""
        parts = (self.codes, self.scales, self.bias)
        return sum(part.nbytes for part in parts if part is not None)

    def with_bias(self, bias: Tensor | None) -> PackedWeight:
        """Return the same matrix with a bias (outputs,)."""
        return replace(self, bias=None if bias is None else bias.detach().float().contiguous())


def can_be_coded(inputs: int) -> bool:
    """Whether a matrix of so many inputs can be int4 or int8: groups must be whole."""
    return inputs % GROUP == 0


def codes_bytes(format: WeightFormat, outputs: int, inputs: int) -> int:
    """Return how many bytes the codes of a packed matrix take."""
    if format in {"int4", "int8"}:
        return -(-outputs // BLOCK) * (inputs // GROUP) * (320 if format == "int4" else 512)
    padded = -(-outputs // PANEL) * PANEL
    return padded * (4 * inputs if format == "float32" else 4 * -(-inputs // 2))


def pack_int4(
    codes: UInt8[Tensor, "n k"], scale: Float[Tensor, "n g"], minimum: Float[Tensor, "n g"]
) -> PackedWeight:
    """Pack codes of 0 to 15 with fp16 scales and minimums; nothing is rounded."""
    n, k = codes.shape
    groups = k // GROUP
    halves = _padded(codes, BLOCK).reshape(-1, BLOCK, groups, 4, 2, 4).permute(0, 2, 3, 1, 5, 4)
    both = (halves[..., 0] | (halves[..., 1] << 4)).reshape(-1, groups, 256)
    parts = [both, *(_blocked(values) for values in (scale, minimum))]
    return PackedWeight("int4", n, k, torch.cat(parts, dim=-1).contiguous().flatten())


def pack_int8(codes: Int8[Tensor, "n k"], scale: Float[Tensor, "n g"]) -> PackedWeight:
    """Pack signed codes with fp16 scales; nothing is rounded."""
    n, k = codes.shape
    groups = k // GROUP
    biased = _padded((codes.to(torch.int16) + 128).to(torch.uint8), BLOCK)
    blocks = biased.reshape(-1, BLOCK, groups, 8, 4).permute(0, 2, 3, 1, 4)
    scales = _padded(scale.to(torch.float16), BLOCK).reshape(-1, BLOCK, groups).transpose(1, 2)
    return PackedWeight("int8", n, k, blocks.contiguous().flatten(), scales.contiguous())


def pack_plain(weight: Float[Tensor, "n k"], format: WeightFormat) -> PackedWeight:
    """Pack a matrix as float32 or bfloat16, to which it is rounded."""
    n, k = weight.shape
    pair = 2 if format == "bfloat16" else 1
    dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
    padded = torch.nn.functional.pad(_padded(weight.to(dtype), PANEL), (0, k % pair))
    panels = padded.reshape(-1, PANEL, padded.shape[1] // pair, pair).transpose(1, 2)
    return PackedWeight(format, n, k, panels.contiguous().view(torch.uint8).flatten())


def unpack(weight: PackedWeight) -> Float[Tensor, "n k"]:
    """Return the matrix in fp32: codes times scales, exactly as the products read them."""
    n, k, groups = weight.outputs, weight.inputs, weight.inputs // GROUP
    if weight.format == "int4":
        blocks = weight.codes.reshape(-1, groups, 320)
        both = blocks[..., :256].reshape(-1, groups, 4, BLOCK, 4)
        halves = torch.stack([both & 15, both >> 4], dim=-1).permute(0, 3, 1, 2, 5, 4)
        values = halves.reshape(-1, BLOCK, groups, GROUP).float()
        numbers = blocks[..., 256:].contiguous().view(torch.float16).float()
        scale, minimum = numbers.reshape(-1, groups, 2, BLOCK).permute(2, 0, 3, 1)[..., None]
        matrix: Tensor = (values * scale + minimum).reshape(-1, k)[:n]
        return matrix
    if weight.format == "int8":
        assert weight.scales is not None
        blocks = weight.codes.reshape(-1, groups, 8, BLOCK, 4).permute(0, 3, 1, 2, 4)
        values = blocks.reshape(-1, BLOCK, groups, GROUP).float() - 128
        return (values * weight.scales.float().transpose(1, 2)[..., None]).reshape(-1, k)[:n]
    pair = 2 if weight.format == "bfloat16" else 1
    dtype = torch.bfloat16 if weight.format == "bfloat16" else torch.float32
    panels = weight.codes.view(dtype).reshape(-1, -(-k // pair), PANEL, pair)
    return panels.transpose(1, 2).reshape(-1, -(-k // pair) * pair)[:n, :k].float()


def quantize_int8(weight: Float[Tensor, "n k"]) -> PackedWeight:
    """Round a matrix, within the range of fp16, to int8: the largest of each group becomes 127."""
    grouped = weight.float().reshape(len(weight), -1, GROUP)
    scale = (grouped.abs().amax(-1) / 127).to(torch.float16)
    codes = _divided(grouped, scale.float()).round().clamp(-127, 127)
    return pack_int8(codes.to(torch.int8).reshape(weight.shape), scale)


def quantize_int4(weight: Float[Tensor, "n k"]) -> PackedWeight:
    """Round a matrix, within the range of fp16, to int4.

    Of several ranges of each group the one with the smallest square error is taken.
    """
    grouped = weight.float().reshape(len(weight), -1, GROUP)
    low, high = grouped.amin(-1), grouped.amax(-1)
    best = torch.full_like(low, torch.inf)
    codes = torch.zeros(grouped.shape, dtype=torch.uint8)
    scales, minimums = torch.zeros_like(low), torch.zeros_like(low)
    for step in range(_TRIED_SHRINKS):
        shrink = 1 - 0.02 * step
        middle, half = (low + high) / 2, (high - low) / 2 * shrink
        scale = (2 * half / 15).to(torch.float16).float()
        minimum = (middle - half).to(torch.float16).float()
        tried = _divided(grouped - minimum[..., None], scale).round().clamp(0, 15)
        error = (tried * scale[..., None] + minimum[..., None] - grouped).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[..., None], tried.to(torch.uint8), codes)
        scales, minimums = (
            torch.where(better, scale, scales),
            torch.where(better, minimum, minimums),
        )
    return pack_int4(codes.reshape(weight.shape), scales, minimums)


def quantize(weight: Float[Tensor, "n k"], format: WeightFormat) -> PackedWeight:
    """Pack a matrix in a format.

    A matrix that cannot be coded is kept as it is, in bfloat16 where that holds its values, else in
    float32: its groups are not whole, or it holds values that fp16 scales cannot reach.
    """
    if format in {"int8", "int4"}:
        if can_be_coded(weight.shape[1]) and _fits_fp16(weight):
            return quantize_int8(weight) if format == "int8" else quantize_int4(weight)
        exact = torch.equal(weight.to(torch.bfloat16).float(), weight.float())
        format = "bfloat16" if exact else "float32"
    return pack_plain(weight, format)


def _fits_fp16(weight: Tensor) -> bool:
    """Whether all values lie in the range of fp16; NaN does not."""
    low, high = weight.aminmax()
    most = torch.finfo(torch.float16).max
    return bool(low >= -most) and bool(high <= most)


def _divided(values: Tensor, scale: Tensor) -> Tensor:
    """Divide groups by their scales; groups of scale 0 give 0."""
    return torch.where(scale[..., None] > 0, values / scale[..., None], torch.zeros(()))


def _padded(matrix: Tensor, multiple: int) -> Tensor:
    """Add rows of zeros up to a multiple."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, -len(matrix) % multiple))


def _blocked(values: Tensor) -> Tensor:
    """Return fp16 values (n, g) as bytes (blocks, g, 32)."""
    half = _padded(values.to(torch.float16), BLOCK)
    blocks = half.reshape(-1, BLOCK, half.shape[1]).transpose(1, 2).contiguous()
    return blocks.view(torch.uint8)
