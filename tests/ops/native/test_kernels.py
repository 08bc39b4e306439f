"""Every compiled operation equals its plain twin, at every CPU level, on awkward input."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kv.pool import PAGE_SLOTS, Pool, block_bytes
from kvloom.ops import rope as rope_module
from kvloom.ops import rows
from kvloom.ops.decoder import Norm
from kvloom.ops.native.kernels import Kernels, aligned
from kvloom.ops.native.library import LIBRARY_FOLDER, load_library
from kvloom.ops.packing import GROUP, PackedWeight, quantize, unpack
from kvloom.types import LayerSpec, Rope
from tests.ops.matrices import (
    FORMATS,
    KINDS,
    exact_product,
    product_bound,
    rows_of_kinds,
    seeds,
    values,
    weights,
)
from tests.tolerances import RELATIVE, TOLERANCE

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
row_kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)
threads = st.sampled_from([1, 2, 3])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def optional(present: bool, width: int, seed: int) -> Tensor | None:
    return values("plain", 1, width, seed)[0] if present else None


@given(
    kind=st.sampled_from(["rms", "layer"]),
    width=st.sampled_from([1, 3, 15, 16, 17, 32, 47, 64, 100]),
    parts=st.integers(1, 3),
    kinds=row_kinds,
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    seed=seeds,
    count=threads,
)
def test_norms(library, kind, width, parts, kinds, has_weight, has_bias, seed, count):
    weight, bias = optional(has_weight, width, seed), optional(has_bias, width, seed + 1)
    norm = Norm(kind, width, 1e-5, weight, bias)
    x = rows_of_kinds(kinds, parts * width, seed + 2)
    out, expected = Kernels(library, count).normalize(norm, x), rows.normalize(norm, x)
    # What a mean takes away comes back as an error that the division by a small deviation enlarges.
    stretches = x.reshape(-1, width)
    centred = stretches - stretches.mean(-1, keepdim=True) if kind == "layer" else stretches
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    enters = (
        stretches.abs().amax(-1, keepdim=True) * factor * (1 if weight is None else weight.abs())
    )
    enters = enters + (torch.zeros(width) if bias is None else bias.abs())
    share = RELATIVE["norm"] * (width if kind == "layer" else 1)
    assert ((out - expected).abs() <= share * enters.reshape(x.shape) + 1e-30).all()


def test_no_norm_changes_nothing(library):
    x = values("plain", 2, 8, 0)
    assert Kernels(library, 1).normalize(Norm(), x) is x


@given(kinds=row_kinds, groups=st.integers(1, 4), seed=seeds)
def test_rows_are_coded_like_the_twin(library, kinds, groups, seed):
    x = rows_of_kinds(kinds, groups * GROUP, seed)
    out, expected = Kernels(library, 1).quantize_rows(x), rows.quantize_rows(x)
    assert same_bits(out.scales, expected.scales)
    assert (out.codes.int() - expected.codes.int()).abs().max() <= 1, "ties may round either way"
    assert torch.equal(out.counts, out.codes.int().reshape(len(x), -1, GROUP).sum(-1).int())


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data(), num_rows=st.integers(1, 20), kinds=row_kinds, seed=seeds, count=threads)
def test_products(library, format, data, num_rows, kinds, seed, count):
    weight = aligned(data.draw(weights(format)))
    check_product(library, weight, (kinds * num_rows)[:num_rows], seed, count)


@pytest.mark.parametrize("format", FORMATS)
def test_products_of_more_rows_than_stay_in_cache(library, format):
    weight = aligned(quantize(values("plain", 70, 96, 1), format))
    check_product(library, weight, ["plain"] * 130, 2, 2)


def lost_subnormals(weight: PackedWeight, x: Tensor) -> Tensor:
    """Return what a product misses where an instruction takes subnormal numbers for zero.

    That is factors, products, and the sum behind every input.
    """
    tiny = torch.finfo(torch.float32).tiny
    outer = unpack(weight).double().abs().sum(-1)
    return tiny * (weight.inputs + x.double().abs().sum(-1, keepdim=True) + outer)


def check_product(library, weight: PackedWeight, kinds: list[str], seed: int, count: int) -> None:
    x = rows_of_kinds(kinds, weight.inputs, seed)
    kernels = Kernels(library, count)
    out = kernels.linear(weight, x)
    coded = weight.format in {"int8", "int4"}
    # The kernel's own codes: a tie that rounds the other way is no error of the product.
    operand = kernels.quantize_rows(x) if coded else rows.as_operand(x, weight)
    enters = product_bound(weight, rows.dequantize_rows(operand) if coded else operand)
    share = RELATIVE["bfloat16 product" if weight.format == "bfloat16" else "product"]
    assert out.isfinite().all()
    error = (out.double() - exact_product(weight, operand)).abs()
    assert (error <= share * enters + lost_subnormals(weight, x)).all(), float(
        (error / enters).max()
    )
    alone = torch.cat([kernels.linear(weight, row[None].clone()) for row in x])
    assert same_bits(out, alone), "rows depend on their neighbours"
    assert same_bits(out, Kernels(library, 1).linear(weight, x)), "or on the number of threads"


@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
@given(data=st.data(), kinds=row_kinds, seed=seeds)
def test_levels_that_fuse_products_and_sums_give_the_same_bits(library, format, data, kinds, seed):
    weight = aligned(data.draw(weights(format)))
    x = rows_of_kinds(kinds, weight.inputs, seed)
    if library.level == "plain" or library.path.parent != LIBRARY_FOLDER:
        return  # it rounds twice, as builds for sanitizers may at any level
    avx2 = load_library("avx2", library.path.parent)
    out, other = (Kernels(each, 2).linear(weight, x) for each in (library, avx2))
    assert same_bits(out, other)


@pytest.mark.parametrize("format", FORMATS)
def test_products_of_no_rows(library, format):
    weight = aligned(quantize(values("plain", 5, 32, 0), format))
    assert Kernels(library, 2).linear(weight, torch.empty(0, 32)).shape == (0, 5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 20, 63])
def test_broken_rows_stay_broken(library, format, broken, at):
    weight = aligned(quantize(values("plain", 5, 64, 0), format))
    x = values("plain", 2, 64, 1)
    x[0, at] = broken
    out = Kernels(library, 1).linear(weight, x)
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(width=st.integers(1, 50), kinds=row_kinds, gated=st.booleans(), seed=seeds, count=threads)
def test_gates(library, activation, width, kinds, gated, seed, count):
    x = rows_of_kinds(kinds, width, seed, huge=1e8) * 4
    up = values("plain", len(x), width, seed + 1)
    first, second = (x, up) if gated else (None, x)
    out = Kernels(library, count).gate(activation, first, second)
    expected = rows.gate(activation, first, second)
    enters = x.abs() * (up.abs() if gated else 1)
    assert ((out - expected).abs() <= RELATIVE["gate"] * enters + 1e-37).all()


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data(), seed=seeds, scale=st.sampled_from([1.0, 24.0]))
def test_embedded_rows(library, format, data, seed, scale):
    weight = aligned(data.draw(weights(format, bias=False)))
    tokens = torch.randint(weight.outputs, (5,), generator=torch.Generator().manual_seed(seed))
    out, matrix = Kernels(library, 1).embed(weight, tokens, scale), unpack(weight)[tokens] * scale
    if format == "int4":  # its sum of two parts may be rounded once or twice
        bound = product_bound(weight, torch.ones(1, weight.inputs)).max() * scale
        assert ((out - matrix).abs() <= RELATIVE["product"] * bound).all()
    else:
        assert same_bits(out, matrix)


@given(
    layout=st.sampled_from(["half", "interleaved"]),
    pairs=st.integers(1, 12),
    first=st.sampled_from([0, 1, 4]),
    behind=st.sampled_from([0, 3]),
    heads=st.integers(1, 3),
    pos=st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    seed=seeds,
)
def test_rotation(library, layout, pairs, first, behind, heads, pos, seed):
    rope = Rope(tuple(2.0**-i for i in range(pairs)), 1.25, layout, first)
    d = first + 2 * pairs + behind
    x = values("plain", len(pos), heads * d, seed).reshape(len(pos), heads, d)
    before = x.clone()
    cos, sin = rope_module.rotation_table(rope, torch.tensor(pos))
    out = Kernels(library, 1).rotate(x, cos, sin, rope)
    expected = rope_module.rotate(x.transpose(0, 1), cos, sin, rope).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE["float32"]["rotation"])
    assert torch.equal(x, before), "the input was written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@given(
    slots=st.lists(st.integers(0, 2 * PAGE_SLOTS - 1), min_size=1, max_size=6, unique=True),
    kinds=st.lists(st.sampled_from([*KINDS, "nan", "infinite"]), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    dims=st.sampled_from([(2, 16), (16, 32), (40, 48), (256, 256)]),
    seed=seeds,
)
def test_keys_and_values_are_put_bit_for_bit(library, dtype, slots, kinds, heads, dims, seed):
    k, v = (broken_rows(kinds, heads * len(slots), d, seed).reshape(-1, heads, d) for d in dims)
    pool, expected = (tiled_pool(heads, dims, dtype) for _ in range(2))
    Kernels(library, 1).put(pool.arenas(0), torch.tensor(slots), k, v)
    expected.write(0, torch.tensor(slots), k.transpose(0, 1), v.transpose(0, 1))
    for found, wanted in zip(pool.arenas(0), expected.arenas(0), strict=True):
        number = ~(found.isnan() & wanted.isnan())  # a NaN may be any
        assert torch.equal(found[number], wanted[number])
        assert torch.equal(found.signbit()[number], wanted.signbit()[number])


def broken_rows(kinds: list[str], count: int, width: int, seed: int) -> Tensor:
    """Return rows of these kinds in turn, of which some hold what is no finite number."""
    found = []
    for row in range(count):
        kind = kinds[row % len(kinds)]
        found.append(values("plain" if kind in BROKEN else kind, 1, width, seed + row))
        if kind in BROKEN:
            found[-1][0, seed % width] = BROKEN[kind]
    return torch.cat(found)


BROKEN = {"nan": torch.nan, "infinite": -torch.inf}


def tiled_pool(heads: int, dims: tuple[int, int], dtype: torch.dtype) -> Pool:
    """Return a pool of one layer and two tiles."""
    spec = LayerSpec(0, heads, heads, *dims, None)
    return Pool([spec], 2 * block_bytes([spec], dtype), dtype, layout="tiled")


def test_rows_that_do_not_fit_an_arena_are_not_put(library, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arenas, put = tiled_pool(2, (8, 16), torch.int8).arenas(0), Kernels(library, 1).put
    k, v, slots = torch.ones(3, 2, 8), torch.ones(3, 2, 16), torch.arange(3)
    put(arenas, slots, k, v)
    before = [arena.clone() for arena in arenas]
    for error, arguments in (
        (IndexError, (arenas, slots - 1, k, v)),
        (IndexError, (arenas, slots + 2 * PAGE_SLOTS - 2, k, v)),
        (ValueError, (arenas, slots, k[:2], v)),
        (ValueError, (arenas, slots, v, v)),
        (ValueError, (arenas[:3], slots, k, v)),
        (ValueError, (arenas[:2], slots, k, v)),
        (ValueError, ((*arenas[:2], arenas[2][:, :64], arenas[3]), slots, k, v)),
        (TypeError, ((*arenas[:2], arenas[2].double(), arenas[3]), slots, k, v)),
    ):
        with pytest.raises(error):
            put(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, arenas, strict=True))


def test_other_dtypes_and_layouts_are_refused(library):
    kernels, norm = Kernels(library, 1), Norm("rms", 4)
    weight = aligned(quantize(torch.ones(3, 4), "float32"))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="the kernel reads"):
            kernels.normalize(norm, torch.ones(2, 4, dtype=dtype))
        with pytest.raises(TypeError):
            kernels.linear(weight, torch.ones(2, 4, dtype=dtype))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.normalize(norm, torch.ones(4, 2).T)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.gate("silu", torch.ones(2, 8)[:, ::2], torch.ones(2, 4))
    with pytest.raises(ValueError, match="contiguous"):
        kernels.linear(weight, torch.ones(2, 4, device="meta"))
    with pytest.raises(TypeError):
        kernels.embed(weight, torch.zeros(1, dtype=torch.int32), 1.0)
    with pytest.raises(TypeError):
        kernels.linear(replace(weight, bias=torch.ones(3, dtype=torch.float64)), torch.ones(1, 4))


def test_other_shapes_are_refused(library, monkeypatch):
    # Tests check shapes on the way in; without that, as users run it, the wrappers must notice.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    kernels, rope = Kernels(library, 1), Rope((1.0, 0.5), 1.0, "half", 0)
    weight = aligned(quantize(torch.ones(3, 4), "float32"))
    table, x = torch.ones(2, 2), torch.ones(2, 4)
    cases = [
        lambda: kernels.linear(weight, torch.ones(2, 5)),
        lambda: kernels.linear(replace(weight, bias=torch.ones(4)), x),
        lambda: kernels.normalize(Norm("rms", 3), x),
        lambda: kernels.normalize(Norm("rms", 0), x),
        lambda: kernels.normalize(Norm("rms", 4, 0.0, torch.ones(3)), x),
        lambda: kernels.normalize(Norm("rms", 4, 0.0, None, torch.ones(5)), x),
        lambda: kernels.normalize(Norm("rms", 2, 0.0, torch.ones(2, 2)), x),
        lambda: kernels.quantize_rows(torch.ones(2, 33)),
        lambda: kernels.gate("silu", torch.ones(2, 3), x),
        lambda: kernels.rotate(x[:, None], table[:1], table[:1], rope),
        lambda: kernels.rotate(x[:, None], table[:, :1], table[:, :1], rope),
        lambda: kernels.rotate(torch.ones(2, 1, 3), table, table, rope),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"\d|own weights"):
            case()


def test_damaged_matrices_are_refused(library):
    kernels, x = Kernels(library, 1), torch.ones(1, 64)
    for format in FORMATS:
        weight = aligned(quantize(torch.ones(17, 64), format))
        moved = torch.cat([weight.codes[:1], weight.codes])[1:]
        with pytest.raises(ValueError, match="multiple of 64"):
            kernels.linear(replace(weight, codes=moved), x)
        assert aligned(replace(weight, codes=moved)).codes.data_ptr() % 64 == 0
        with pytest.raises(ValueError, match="bytes of codes"):
            kernels.linear(replace(weight, codes=weight.codes[:-64]), x)
        with pytest.raises(ValueError, match="bytes of codes"):
            kernels.embed(replace(weight, outputs=16 * 17), torch.tensor([200]), 1.0)
    int8 = aligned(quantize(torch.ones(17, 64), "int8"))
    for scales in (None, int8.scales[:1]):
        with pytest.raises(ValueError, match="scales"):
            kernels.linear(replace(int8, scales=scales), x)
    with pytest.raises(ValueError, match="groups"):
        kernels.linear(replace(int8, inputs=70), torch.ones(1, 70))


def test_tokens_without_a_row_are_refused(library):
    weight = aligned(quantize(torch.ones(17, 64), "int4"))
    for token in (-1, 17, 2**40):
        with pytest.raises(IndexError, match="0 to 16"):
            Kernels(library, 1).embed(weight, torch.tensor([0, token]), 1.0)
    assert Kernels(library, 1).embed(weight, torch.empty(0, dtype=torch.int64), 1.0).shape == (
        0,
        64,
    )


@given(
    data=st.data(),
    width=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 1000, 4096])),
    odd=st.sampled_from([[], [torch.nan], [torch.inf], [-torch.inf], [torch.inf, torch.nan]]),
)
def test_the_likeliest_is_numpys(library, data, width, odd):
    # Few values, so that there are equals, at either zero as well.
    few = torch.tensor([-2.0, -0.0, 0.0, 1.0, 1.0, 3.5, *odd])
    seed, rows_ = data.draw(seeds), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    logits = few[torch.randint(len(few), (rows_, width), generator=generator)]
    if data.draw(st.booleans()):
        logits = torch.randn(rows_, width, generator=generator)
    assert torch.equal(Kernels(library, 1).likeliest(logits), rows.likeliest(logits))
    nothing = torch.full((1, width), -torch.inf)
    assert Kernels(library, 1).likeliest(nothing).tolist() == [0]
