"""Packed linears: a model's linear layers in the blocked weight layout of oneDNN.

Knows: torch's linear modules, and that a packed one must give the numbers of the plain one.
Does not know: what a model uses its linears for.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from kvloom.model.trial import differs

logger = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16)
_TRIED_ROWS = (1, 17)
MOST_ROWS = 512
"""Products of more rows are cut."""


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked layout.

    Unpacked, torch multiplies few rows by a matrix through a library that is slow on some
    processors, and packs the matrix anew for many (ADR 0008).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # No parameter: what is packed can be neither saved nor trained.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> Tensor:
        """The plain weight (out, in), unpacked for models that read it beside the layer."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x · weightᵀ + bias for rows (…, in)."""
        rows = x.reshape(-1, self.in_features)
        parts = [self._multiply(part) for part in torch.split(rows, MOST_ROWS)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        count = len(rows)
        missing = rows_of_kernel(count) - count
        filled = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            filled, self._packed, self.bias, "none", [], ""
        )
        return out[:count]


def rows_of_kernel(count: int) -> int:
    """Return how many rows a product of `count` rows is filled up to.

    oneDNN keeps a kernel for every number of rows that it meets, at about half a megabyte each: a
    few numbers keep memory flat.
    """
    if count <= 16:
        return 1 << (count - 1).bit_length()
    step = 16 if count <= 64 else 32 if count <= 128 else 64
    return -(-count // step) * step


def packing_available() -> bool:
    """Return whether this torch can pack linears."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in names
    )


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Pack the linear layers of a model on the CPU, in place; return how many.

    A layer whose packed form gives other numbers stays as it is.
    """
    if not packing_available():
        logger.warning("this torch cannot pack linear layers; the model runs slower")
        return 0
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()  # a module that stands twice is swapped twice
        if isinstance(child, nn.Linear) and _can_be_packed(child)
    ]
    by_linear: dict[nn.Linear, PackedLinear | None] = {}
    for module, name, linear in places:
        if linear not in by_linear:
            by_linear[linear] = _packed(linear)
        packed = by_linear[linear]
        if packed is None:
            logger.warning("%s gives other numbers when packed; it stays plain", name)
        else:
            setattr(module, name, packed)
    return sum(packed is not None for packed in by_linear.values())


def _can_be_packed(module: nn.Linear) -> bool:
    """Whether a module is a plain linear of the CPU; subclasses and hooks may mean more."""
    return (
        type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in _DTYPES
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _packed(linear: nn.Linear) -> PackedLinear | None:
    packed = PackedLinear(linear)
    dtype = linear.weight.dtype
    generator = torch.Generator().manual_seed(8)
    for rows in _TRIED_ROWS:
        x = torch.randn(rows, linear.in_features, generator=generator).to(dtype)
        if differs(packed(x), linear(x), dtype) > 1:
            return None
    return packed
