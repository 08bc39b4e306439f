"""Small chunks for the store's tests, their comparison bit by bit, and ways to damage files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from kvloom.kv.lineage import Lineage
from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey, Place, context_of, hash_tenant, hash_tokens

FINGERPRINT = b"f" * 32
ROOT = Lineage.root(FINGERPRINT)
ALICE = hash_tenant("alice")


def place_of(
    origin: Lineage | None = ROOT,
    *,
    fingerprint: bytes = FINGERPRINT,
    recipe: str = "",
    tenant: str = ALICE,
) -> Place:
    context = None if origin is None else context_of(origin)
    return Place(fingerprint, recipe, context, tenant)


def make_chunk(
    tokens: list[int],
    origin: Lineage = ROOT,
    *,
    key: ChunkKey | None = None,
    width: int = 4,
    **parts: Any,
) -> Chunk:
    """Return a chunk whose values follow from its key, so that any two differ."""
    key = key or place_of(origin).key(hash_tokens(tokens))
    generator = torch.Generator().manual_seed(int.from_bytes(bytes.fromhex(key.name)[:7], "big"))

    def values() -> torch.Tensor:
        return torch.randn(2, len(tokens), width, generator=generator)

    defaults: dict[str, Any] = {
        "base": 0,
        "layout": "plain",
        "dtype": "float32",
        "num_slots": len(tokens),
        "tensors": {"0.k": values(), "0.v": values()},
        "origin": origin,
        "facts": {"note": "é"},
    }
    return Chunk(key=key, tokens=np.array(tokens, dtype=np.int64), **(defaults | parts))


def assert_same(found: Chunk | None, expected: Chunk) -> None:
    """Equal in every part, tensors bit by bit."""
    assert found is not None
    for name in ("key", "base", "layout", "dtype", "num_slots", "origin", "facts"):
        assert getattr(found, name) == getattr(expected, name), name
    assert np.array_equal(found.tokens, expected.tokens)
    for group in ("tensors", "statistics"):
        ours, theirs = getattr(found, group), getattr(expected, group)
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape
            assert raw(ours[name]) == raw(theirs[name]), name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=150)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32)
DTYPES += (torch.int64, torch.float64, torch.bool)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any storable kind, zeros and strides included."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return values.transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else values


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    """Any chunk."""
    tokens = draw(TOKENS)
    origin = ROOT.extend(draw(TOKENS)) if draw(st.booleans()) else ROOT
    place = place_of(
        origin if draw(st.booleans()) else None,
        fingerprint=draw(st.binary(max_size=40)),
        recipe=draw(NAMES),
        tenant=hash_tenant(draw(NAMES)),
    )
    return make_chunk(
        tokens,
        origin,
        key=place.key(hash_tokens(tokens)),
        base=draw(st.integers(0, 2**31)),
        layout=draw(st.sampled_from(["plain", "tiled"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "int8"])),
        num_slots=len(tokens) + draw(st.integers(0, 64)),
        tensors=draw(st.dictionaries(NAMES, tensors(), min_size=1, max_size=4)),
        statistics=draw(st.dictionaries(NAMES, tensors(), max_size=2)),
        facts=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    )
