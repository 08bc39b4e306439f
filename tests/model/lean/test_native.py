"""The compiled executor equals the plain one on whatever documents and decoders there may be.

Layers here differ in rotation, window, softcap, sinks, norms and order within one decoder; the
documents are those of `tests.kv.worlds`: forked, cut, moved, overlaid, with holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool, block_bytes
from kvloom.kv.reads import plan_reads
from kvloom.model.lean.executors import Executor, TorchExecutor
from kvloom.model.lean.native import MAX_QUERIES, NativeExecutor, native_obstacle
from kvloom.model.lean.runner import LeanRunner
from kvloom.ops.decoder import Decoder, DecoderLayer, Norm
from kvloom.ops.native.library import NativeLibrary
from kvloom.types import LayerSpec, ModelSpec, Rope, Rows, StepOutput, WeightFormat
from tests.kv.worlds import GARBAGE, HALF, TAIL, Deed, World, layer_spec, littered
from tests.model.lean.decoders import pack
from tests.model.running import ROOT, assert_same
from tests.tolerances import TOLERANCE

HIDDEN, INNER, VOCABULARY = 64, 96, 50
# As most models have it: whole pairs of dimensions, in halves.
WHOLE = Rope((1.0, -0.25, 0.0625, 0.5), 1.0, "half", 2)
SPECS = (
    layer_spec(0, dims=(16, 16), rope=WHOLE),
    layer_spec(1, heads=3, kv_heads=1, dims=(24, 32), rope=TAIL, softcap=3.0),
    layer_spec(2, dims=(32, 16), window=20),
    replace(layer_spec(3, heads=2, dims=(16, 48), rope=None, window=70), sinks=True),
    replace(layer_spec(4, heads=6, dims=(16, 16), rope=HALF, softcap=2.0, window=33), sinks=True),
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(kind: str, width: int, seed: int, stretches: int = 0) -> Norm:
    shape = (stretches, width) if stretches else (width,)
    bias = 0.1 * noise(seed + 1, *shape) if kind == "layer" else None
    return Norm(
        "layer" if kind == "layer" else "rms", width, 1e-5, 1 + 0.2 * noise(seed, *shape), bias
    )


def layer_of(spec: LayerSpec, format: WeightFormat) -> DecoderLayer:
    """Return a random layer; its place decides on norms, order, gate and activation."""
    number, wide = spec.index, spec.heads * spec.k_dim
    narrow = spec.kv_heads * spec.k_dim
    seeds = iter(range(100 * number, 100 * number + 99))

    def matrix(outputs: int, inputs: int) -> Any:
        packed = pack(format)(noise(next(seeds), outputs, inputs) / inputs**0.5)
        return packed.with_bias(0.1 * noise(next(seeds), outputs)) if number % 2 else packed

    parallel = number == 2
    # Of one head, of all heads together, or of each head, for q and for k apart.
    q_norm = (
        Norm(),
        norm("rms", wide if number == 1 else spec.k_dim, 1),
        norm("layer", spec.k_dim, 2, spec.heads),
    )
    k_norm = Norm(), norm("rms", narrow, 3), norm("layer", spec.k_dim, 4, spec.kv_heads)
    return DecoderLayer(
        spec=spec,
        q=matrix(wide, HIDDEN),
        k=matrix(narrow, HIDDEN),
        v=matrix(spec.kv_heads * spec.v_dim, HIDDEN),
        output=matrix(HIDDEN, spec.heads * spec.v_dim),
        gate=None if number == 3 else matrix(INNER, HIDDEN),
        up=matrix(INNER, HIDDEN),
        down=matrix(HIDDEN, INNER),
        scale=spec.k_dim**-0.5,
        activation=("silu", "gelu", "gelu_tanh")[number % 3],
        input_norm=norm("layer" if number == 2 else "rms", HIDDEN, next(seeds)),
        q_norm=q_norm[number % 3],
        k_norm=k_norm[number % 3],
        attention_norm=norm("rms", HIDDEN, 5) if number == 4 else Norm(),
        mlp_norm=Norm() if parallel else norm("rms", HIDDEN, 6),
        output_norm=norm("rms", HIDDEN, 7) if number == 4 else Norm(),
        parallel=parallel,
        residual_scale=0.7 if number == 1 else 1.0,
        sinks=noise(next(seeds), spec.heads) if spec.sinks else None,
    )


@lru_cache
def mixed(format: WeightFormat = "float32", softcap: float | None = 4.0) -> Decoder:
    """Return a decoder of layers that differ in everything."""
    embedding = pack(format)(noise(1, VOCABULARY, HIDDEN))
    return Decoder(
        layers=tuple(layer_of(spec, format) for spec in SPECS),
        embedding=embedding,
        head=embedding,
        final_norm=norm("rms", HIDDEN, 9),
        embedding_scale=1.5,
        logit_scale=0.5,
        logit_softcap=softcap,
    )


def check_likeliest(output: StepOutput) -> None:
    """The likeliest token is that of the last wanted row."""
    for logits, token in zip(output.logits, output.likeliest, strict=True):
        assert token == (None if logits is None else int(logits[-1].numpy().argmax()))


def runner_of(executor: Executor) -> LeanRunner:
    return LeanRunner(ModelSpec(SPECS, VOCABULARY, 10_000, "movable"), executor)


class TiledWorld(World):
    """A world on a tiled pool, littered with numbers that show if they are read."""

    dtype = torch.float32
    litter = GARBAGE

    def __init__(self, seed: int, layers: Sequence[LayerSpec], blocks: int = 40) -> None:
        super().__init__(seed, layers, blocks)
        size = blocks * block_bytes(layers, self.dtype)
        self.pool = littered(Pool(layers, size, self.dtype, layout="tiled"), self.litter)


deeds = st.lists(
    st.builds(
        Deed,
        st.sampled_from(
            ["new", "append", "fork", "truncate", "graft", "scatter", "overlay", "bias"]
        ),
        st.tuples(*[st.integers(0, 200)] * 4),
    ),
    min_size=1,
    max_size=8,
)
kinds = st.lists(
    st.tuples(st.sampled_from(["decode", "chunk", "scattered"]), st.integers(1, 24)),
    min_size=1,
    max_size=5,
)


def rows_of_step(world: World, wanted: list[tuple[str, int]]) -> list[Rows]:
    """Return rows of several kinds over the first documents of a world."""
    random, found = np.random.default_rng(len(wanted)), []
    for doc, (kind, count) in zip(world.docs, wanted, strict=False):
        end = doc.end_pos
        pos = np.arange(end, end + (1 if kind == "decode" else count), dtype=np.int64)
        scattered = kind == "scattered"
        if scattered:
            places = np.arange(min(end, 0) - 3, end + count)
            pos = random.permutation(places)[:count].astype(np.int64)
        tokens = random.integers(0, VOCABULARY, len(pos), dtype=np.int64)
        found.append(Rows(doc, tokens, pos, "all", "none" if scattered else "append"))
    return found


def run_world(
    executor: Executor, kind: type[World], seed: int, done: list[Deed], wanted: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Make a world, run a step over it; return logits, and what documents hold behind it."""
    world = kind(seed, SPECS)
    for deed in done:
        deed.do(world)
    output = runner_of(executor).forward(rows_of_step(world, wanted))
    check_likeliest(output)
    logits = output.logits
    kept = [
        part.float().clone()
        for doc in world.docs
        for span in doc.spans
        for layer in range(len(SPECS))
        for part in world.pool.read(layer, *span.pool_slots)
    ]
    return [x for x in logits if x is not None], kept


def close(found: list[Tensor], expected: list[Tensor], near: float) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert bool(x.isfinite().all())
        assert float((x - y).abs().max()) <= near * max(1.0, float(y.abs().max()))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), done=deeds, wanted=kinds)
def test_any_step_over_any_documents_equals_plain_torch(library, seed, done, wanted):
    expected, kept = run_world(TorchExecutor(mixed()), World, seed, done, wanted)
    executor = NativeExecutor(mixed(), library)
    found, mine = run_world(executor, TiledWorld, seed, done, wanted)
    close(found, expected, TOLERANCE["float32"]["logits"])
    close(mine, kept, TOLERANCE["float32"]["logits"])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), done=deeds, wanted=kinds)
def test_plain_torch_reads_tiles_alike(seed, done, wanted):
    expected, kept = run_world(TorchExecutor(mixed()), World, seed, done, wanted)
    found, mine = run_world(TorchExecutor(mixed(), "tiled"), TiledWorld, seed, done, wanted)
    close(found, expected, TOLERANCE["float32"]["logits"])
    close(mine, kept, TOLERANCE["float32"]["logits"])


class HalfWorld(TiledWorld):
    dtype = torch.bfloat16


class CodedWorld(TiledWorld):
    """Here even the scales of slots that hold nothing are no numbers."""

    dtype = torch.int8
    litter = torch.nan


@pytest.mark.parametrize(("kind", "near"), [(HalfWorld, "bfloat16"), (CodedWorld, "int8 KV")])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**16), done=deeds, wanted=kinds)
def test_coarser_slots_are_as_near_as_their_rounding(library, kind, near, seed, done, wanted):
    expected, _ = run_world(TorchExecutor(mixed(), "tiled"), kind, seed, done, wanted)
    found, _ = run_world(NativeExecutor(mixed(), library), kind, seed, done, wanted)
    close(found, expected, TOLERANCE[near]["logits"])


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    done=deeds,
    between=st.dictionaries(st.integers(0, 90), deeds.map(lambda some: some[0]), max_size=3),
)
def test_plans_that_grow_give_the_bits_of_fresh_ones(library, seed, done, between):
    worlds_of_both = [HalfWorld(seed, SPECS, 60) for _ in range(2)]
    for world in worlds_of_both:
        for deed in done:
            deed.do(world)
    kept = NativeExecutor(mixed(), library)
    wanted = [("decode", 1)] * 12
    for number in range(90):
        found = []
        executors = (kept, NativeExecutor(mixed(), library))
        for world, executor in zip(worlds_of_both, executors, strict=True):
            if number in between:
                between[number].do(world)
            found.append(runner_of(executor).forward(rows_of_step(world, wanted)).logits)
        for x, y in zip(*found, strict=True):
            assert torch.equal(x, y)


def test_a_growing_text_is_planned_once_a_tile(library, monkeypatch):
    windows: list[int | None] = []

    def counted(docs: Any, ranges: Any, window: int | None, most: int) -> Any:
        windows.append(window)
        return plan_reads(docs, ranges, window, most)

    monkeypatch.setattr("kvloom.model.lean.native.plan_reads", counted)
    world = TiledWorld(3, SPECS)
    for length in (10, 70, 130):
        world.new(0, length)
    executor = NativeExecutor(mixed(), library)
    for _ in range(128):
        runner_of(executor).forward(rows_of_step(world, [("decode", 1)] * 3))
    # The first step, and then every document enters a new tile twice.
    assert windows.count(None) <= 1 + 3 * 2


class Text:
    """A long text on a pool of its own: a chunk, single rows, and scattered ones."""

    def __init__(self, executor: Executor, dtype: torch.dtype = torch.float32) -> None:
        size = 14 * block_bytes(SPECS, dtype)
        self.pool = Pool(SPECS, size, dtype, layout=executor.layout)
        self.runner = runner_of(executor)

    def run(self) -> list[Tensor]:
        random = np.random.default_rng(0)
        doc, other = (KVDoc(self.pool, ROOT) for _ in range(2))
        found = []
        for count in (200, 1, 130, 1, 1):
            pos = np.arange(doc.length, doc.length + count, dtype=np.int64)
            tokens = random.integers(0, VOCABULARY, count, dtype=np.int64)
            rows = [Rows(doc, tokens, pos, "all")]
            if count == 130:
                rows.append(Rows(other, tokens[:50], np.arange(50), "all"))
            found += [x for x in self.runner.forward(rows).logits if x is not None]
        pos = random.permutation(doc.length)[:60].astype(np.int64)
        tokens = random.integers(0, VOCABULARY, 60, dtype=np.int64)
        found += self.runner.forward([Rows(doc, tokens, pos, "all", "none")]).logits
        return found


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_coded_weights_equal_their_twin(library: NativeLibrary, format: WeightFormat) -> None:
    expected = Text(TorchExecutor(mixed(format))).run()
    found = Text(NativeExecutor(mixed(format), library)).run()
    for x, y in zip(found, expected, strict=True):
        share = float((x - y).norm() / y.norm())
        assert share <= TOLERANCE[format]["twin logits"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_threads_change_no_bit(
    library: NativeLibrary, format: WeightFormat, dtype: torch.dtype
) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(Text(NativeExecutor(mixed(format), library), dtype).run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_one_executor_works_on_several_pools(library: NativeLibrary) -> None:
    executor = NativeExecutor(mixed(), library)
    expected = Text(TorchExecutor(mixed())).run()
    dtypes = (torch.float32, torch.bfloat16, torch.int8, torch.float32)
    texts = [Text(executor, dtype) for dtype in dtypes]
    kinds = ("float32", "bfloat16", "int8 KV", "float32")
    for text, kind in zip(texts, kinds, strict=True):
        for x, y in zip(text.run(), expected, strict=True):
            assert_same(x, y, kind)


def changed(**facts: Any) -> Decoder:
    """Return the mixed decoder with another first layer."""
    decoder = mixed()
    first = decoder.layers[0]
    return replace(decoder, layers=(replace(first, spec=replace(first.spec, **facts)),))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"v_dim": 24}, "heads of 16 and 24"),
        ({"k_dim": 15}, "heads of 15 and 16"),
        ({"k_dim": 258}, "heads of 258"),
        ({"v_dim": 272}, "heads of 272"),
        ({"heads": 2 * (MAX_QUERIES + 1)}, "97 heads on one KV head"),
    ],
)
def test_what_it_cannot_do_is_said(facts: dict[str, Any], words: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert native_obstacle(mixed(), dtype) is None
    assert "KV in torch.float16" in str(native_obstacle(mixed(), torch.float16))
    assert words in str(native_obstacle(changed(**facts), torch.float32))


@pytest.mark.parametrize(("format", "form"), [("int8", "coded"), ("bfloat16", "bfloat16")])
def test_products_of_several_forms_are_an_obstacle(format: WeightFormat, form: str) -> None:
    first, other = mixed().layers[0], mixed(format).layers[0]
    for parts in ({"k": other.k}, {"up": other.up}):
        decoder = replace(mixed(), layers=(replace(first, **parts),))
        assert f"{form} beside float32" in str(native_obstacle(decoder, torch.float32))
    assert native_obstacle(replace(mixed(), layers=(between(first, other),)), torch.float32) is None


def between(first: DecoderLayer, other: DecoderLayer) -> DecoderLayer:
    """Return a layer with two matrices of another."""
    return replace(first, output=other.output, down=other.down)


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_coded_and_plain_products_go_together(library: NativeLibrary, format: WeightFormat) -> None:
    pairs = zip(mixed("int8").layers, mixed(format).layers, strict=True)
    layers = tuple(between(*pair) for pair in pairs)
    decoder = replace(mixed("int8"), layers=layers, head=mixed(format).head)
    expected = Text(TorchExecutor(decoder)).run()
    for x, y in zip(Text(NativeExecutor(decoder, library)).run(), expected, strict=True):
        assert float((x - y).norm() / y.norm()) <= TOLERANCE["int8"]["twin logits"]


def test_a_plain_pool_is_refused(library: NativeLibrary) -> None:
    pool = Pool(SPECS, 4 * block_bytes(SPECS, torch.float32))
    rows = Rows(KVDoc(pool, ROOT), np.arange(3), np.arange(3), "all")
    with pytest.raises(AssertionError, match="plain pool"):
        runner_of(NativeExecutor(mixed(), library)).forward([rows])
