"""Plain data with tensors as JSON and one flat file of bytes, and back.

Knows: dataclasses of a few known kinds, and tensors that start at multiples of 64 bytes.
Does not know: what a decoder means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.ops.decoder import Decoder, DecoderLayer, Norm
from kvloom.ops.packing import PackedWeight
from kvloom.types import LayerSpec, ModelSpec, Rope

ALIGNMENT = 64
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Decoder, DecoderLayer, LayerSpec, ModelSpec, Norm, PackedWeight, Rope)
}
_DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.uint8)}


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return data as JSON; its tensors are added to `tensors`, each once, as padded bytes (n,)."""
    if isinstance(value, Tensor):
        name = f"{value.data_ptr():x}-{value.numel()}"
        if name not in tensors:
            raw = value.detach().contiguous().flatten().view(torch.uint8)
            tensors[name] = torch.nn.functional.pad(raw, (0, -len(raw) % ALIGNMENT))
        return {"tensor": name, "dtype": str(value.dtype), "shape": list(value.shape)}
    if is_dataclass(value) and not isinstance(value, type):
        content = {
            field.name: encode(getattr(value, field.name), tensors) for field in fields(value)
        }
        return {"kind": type(value).__name__, "fields": content}
    if isinstance(value, list | tuple):
        return [encode(inner, tensors) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot be stored")


def decode(content: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `encode` was given; tensors are views of `tensors`.

    Raises:
        ValueError: the content is no such data, or a tensor is missing or too short.
    """
    if isinstance(content, list):
        return tuple(decode(inner, tensors) for inner in content)
    if not isinstance(content, dict):
        return content
    if "tensor" in content:
        return _view(content, tensors)
    kind = _KINDS.get(content.get("kind", ""))
    if kind is None:
        raise ValueError(f"unknown kind {content.get('kind')!r}")
    values = {name: decode(inner, tensors) for name, inner in content["fields"].items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _view(content: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    dtype, raw = _DTYPES.get(content["dtype"]), tensors.get(content["tensor"])
    if dtype is None or raw is None:
        raise ValueError(f"tensor {content['tensor']} is missing or of unknown type")
    nbytes = math.prod(content["shape"]) * dtype.itemsize
    if len(raw) < nbytes:
        raise ValueError(f"tensor {content['tensor']} has {len(raw)} bytes, not {nbytes}")
    return raw[:nbytes].view(dtype).reshape(content["shape"])


def renamed(content: Any, names: dict[str, str]) -> Any:
    """Return JSON with its tensors under other names."""
    if isinstance(content, list):
        return [renamed(inner, names) for inner in content]
    if not isinstance(content, dict):
        return content
    if "tensor" in content:
        return content | {"tensor": names[content["tensor"]]}
    return {key: renamed(inner, names) for key, inner in content.items()}


def numbered(names: Iterable[str]) -> dict[str, str]:
    """Return names that say nothing about addresses and sort in the order given."""
    return {name: f"t{index:05d}" for index, name in enumerate(names)}
