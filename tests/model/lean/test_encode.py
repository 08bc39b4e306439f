"""Data with tensors comes back from its JSON and bytes as it was."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.model.lean.encode import ALIGNMENT, decode, encode, numbered, renamed
from kvloom.ops.decoder import Norm
from kvloom.ops.packing import PackedWeight
from kvloom.types import LayerSpec, ModelSpec, Rope
from tests.model.lean.decoders import decoder_of


def same(x: Any, y: Any) -> bool:
    """Whether data is equal, tensors bit for bit, sequences as tuples."""
    if isinstance(x, Tensor):
        return (
            isinstance(y, Tensor)
            and (x.dtype, x.shape) == (y.dtype, y.shape)
            and x.contiguous().flatten().view(torch.uint8).tolist()
            == y.contiguous().flatten().view(torch.uint8).tolist()
        )
    if is_dataclass(x):
        return type(x) is type(y) and all(
            same(getattr(x, f.name), getattr(y, f.name)) for f in fields(x)
        )
    if isinstance(x, list | tuple):
        return (
            isinstance(y, tuple)
            and len(x) == len(y)
            and all(same(a, b) for a, b in zip(x, y, strict=True))
        )
    return bool(x == y) and type(x) is type(y)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    content = encode(value, tensors)
    names = numbered(tensors)
    content = json.loads(json.dumps(renamed(content, names)))
    return decode(content, {names[name]: tensor.clone() for name, tensor in tensors.items()})


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.uint8]))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = (100 * torch.randn(shape, generator=generator)).to(dtype)
    return x.transpose(0, 1) if x.dim() > 1 and draw(st.booleans()) else x


numbers = st.floats(allow_nan=False, allow_infinity=False)
ropes = st.builds(
    Rope,
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4).map(tuple),
    numbers,
    st.sampled_from(["half", "interleaved"]),
    st.integers(0, 9),
)
layers = st.builds(
    LayerSpec,
    *[st.integers(0, 99)] * 5,
    st.none() | ropes,
    st.none() | st.integers(1, 9),
    st.none() | numbers,
    st.booleans(),
)
leaves = (
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=5) | tensors() | ropes
)
norms = st.builds(
    Norm,
    st.sampled_from(["none", "rms", "layer"]),
    st.integers(0, 9),
    numbers,
    st.none() | tensors(),
    st.none() | tensors(),
)
models = st.builds(
    ModelSpec,
    st.lists(layers, max_size=3).map(tuple),
    st.integers(0, 9),
    st.integers(0, 9),
    st.just("movable"),
    st.lists(st.text(max_size=5), max_size=2).map(tuple),
)
data = st.recursive(leaves | norms | models, lambda inner: st.lists(inner, max_size=4))


@given(value=data)
def test_data_comes_back(value):
    assert same(value, there_and_back(value))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_a_decoder_comes_back(format: Any) -> None:
    for name in ("llama", "cohere"):
        decoder = decoder_of(name, format)
        assert same(decoder, there_and_back(decoder))


def test_a_tensor_that_is_shared_is_stored_once_and_shared_again() -> None:
    shared, own = torch.arange(7.0), torch.arange(7.0)
    stored: dict[str, Tensor] = {}
    content = encode([shared, own, shared], stored)
    assert len(stored) == 2
    first, other, again = decode(content, stored)
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()


def test_tied_weights_are_stored_once() -> None:
    stored: dict[str, Tensor] = {}
    decoder = decode(encode(decoder_of("gemma2"), stored), stored)
    assert decoder.head.codes.data_ptr() == decoder.embedding.codes.data_ptr()
    untied = decode(encode(decoder_of("llama"), stored), stored)
    assert untied.head.codes.data_ptr() != untied.embedding.codes.data_ptr()


@given(value=st.lists(tensors(), max_size=5))
def test_stored_tensors_are_whole_lines(value):
    stored: dict[str, Tensor] = {}
    encode(value, stored)
    assert all(x.dtype == torch.uint8 and x.dim() == 1 for x in stored.values())
    assert all(len(x) % ALIGNMENT == 0 for x in stored.values())


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1}, 1j, b"bytes", [object()]])
def test_other_data_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        encode(value, {})


def damaged() -> list[tuple[str, Any]]:
    stored: dict[str, Tensor] = {}
    content = encode(PackedWeight("float32", 1, 4, torch.arange(100).to(torch.uint8)), stored)
    codes = content["fields"]["codes"]
    return [
        ("unknown kind", content | {"kind": "Popen"}),
        ("unknown kind", {"fields": {}}),
        ("unexpected keyword", content | {"fields": content["fields"] | {"more": 1}}),
        ("missing", content | {"fields": {"format": "int8"}}),
        ("is missing", content | {"fields": {"codes": codes | {"tensor": "other"}}}),
        ("unknown type", content | {"fields": {"codes": codes | {"dtype": "torch.int64"}}}),
        ("has 128 bytes", content | {"fields": {"codes": codes | {"shape": [129]}}}),
    ]


@pytest.mark.parametrize("number", range(7))
def test_damaged_content_is_a_value_error(number: int) -> None:
    words, content = damaged()[number]
    stored: dict[str, Tensor] = {}
    weight = PackedWeight("float32", 1, 4, torch.arange(100).to(torch.uint8))
    name = encode(weight, stored)["fields"]["codes"]["tensor"]
    content = renamed(content, dict.fromkeys(names_in(content), name) | {"other": "other"})
    with pytest.raises(ValueError, match=words):
        decode(content, stored)


def names_in(content: Any) -> set[str]:
    if isinstance(content, dict):
        own = {content["tensor"]} if "tensor" in content else set()
        return own.union(*(names_in(inner) for inner in content.values()))
    return set()
