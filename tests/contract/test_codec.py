"""What every codec must do: give back what it took, say its size, and be the same every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.types import KV, Encoded
from tests.contract.cases import CODECS, dense, spec_of

every_codec = pytest.mark.parametrize("case", CODECS, ids=lambda case: case.codec.id)
units = st.lists(dense(), min_size=1, max_size=3)


def encode(codec, kvs: list[KV]) -> Encoded:
    return codec.encode(kvs, [spec_of(kv) for kv in kvs])


def assert_same_bits(a: Encoded, b: Encoded) -> None:
    assert a.codec == b.codec
    assert a.nbytes == b.nbytes
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype
        assert torch.equal(a.arrays[name], b.arrays[name]), name


@every_codec
@given(kvs=units)
def test_round_trip_stays_within_the_declared_error(case, kvs):
    decoded = case.codec.decode(encode(case.codec, kvs))
    assert len(decoded) == len(kvs)
    for found, kv in zip(decoded, kvs, strict=True):
        for x, y in ((found.k, kv.k), (found.v, kv.v)):
            allowed = y.abs().amax(dim=1, keepdim=True) * case.relative_error
            assert x.shape == y.shape
            assert ((x.float() - y).abs() <= allowed).all()
        assert torch.equal(found.pos, kv.pos)
        assert found.pos.dtype == kv.pos.dtype
        assert found.base == kv.base
        assert (found.bias is None) == (kv.bias is None)
        assert found.bias is None or torch.equal(found.bias, kv.bias)


@every_codec
@given(kvs=units)
def test_declared_bytes_are_the_bytes_held(case, kvs):
    encoded = encode(case.codec, kvs)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage() for x in encoded.arrays.values()
    }
    assert encoded.nbytes == sum(x.nbytes for x in encoded.arrays.values())
    assert encoded.nbytes == sum(storage.nbytes() for storage in storages.values())
    inputs = {x.untyped_storage().data_ptr() for kv in kvs for x in (kv.k, kv.v, kv.pos)}
    assert not inputs & storages.keys(), "an encoded span keeps its source alive"


@every_codec
@given(kvs=units)
def test_encoding_is_deterministic_and_leaves_its_input_alone(case, kvs):
    before = [(kv.k.clone(), kv.v.clone()) for kv in kvs]
    assert_same_bits(encode(case.codec, kvs), encode(case.codec, kvs))
    for kv, (k, v) in zip(kvs, before, strict=True):
        assert torch.equal(kv.k, k)
        assert torch.equal(kv.v, v)


@every_codec
@given(kvs=units)
def test_decoding_is_deterministic_and_does_not_touch_the_code(case, kvs):
    encoded = encode(case.codec, kvs)
    first, second = case.codec.decode(encoded), case.codec.decode(encoded)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
    assert_same_bits(encoded, encode(case.codec, kvs))


@every_codec
@given(kvs=units)
def test_strides_do_not_matter(case, kvs):
    def strided(kv: KV) -> KV:
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (kv.k, kv.v))
        return KV(k, v, kv.pos, kv.bias, kv.base)

    assert_same_bits(encode(case.codec, [strided(kv) for kv in kvs]), encode(case.codec, kvs))


@every_codec
@given(kv=dense())
def test_an_encoded_span_names_its_codec(case, kv):
    assert case.codec.id
    assert encode(case.codec, [kv]).codec == case.codec.id
    assert case.codec.space in ("rotated", "unrotated")


@every_codec
@given(data=st.data())
def test_zeros_and_extremes_survive(case, data):
    kv = data.draw(dense())
    magnitude = data.draw(st.sampled_from([0.0, 1e-20, 1e4]))
    large = KV(kv.k * magnitude, kv.v * magnitude, kv.pos, kv.bias, kv.base)
    (found,) = case.codec.decode(encode(case.codec, [large]))
    allowed = large.k.abs().amax(dim=1, keepdim=True) * case.relative_error
    assert ((found.k.float() - large.k).abs() <= allowed).all()


@given(data=st.data())
def test_a_16_bit_codec_is_the_identity_on_16_bit_values(data):
    kv = data.draw(dense(torch.bfloat16))
    (found,) = CODECS[0].codec.decode(encode(CODECS[0].codec, [kv]))
    assert torch.equal(found.k, kv.k)
    assert torch.equal(found.v, kv.v)
