"""Attention mass against the whole matrix, however documents are cut, moved and edited."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvloom.reuse.mass as room
from kvloom.errors import UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import placed_at
from kvloom.kv.span import cut
from kvloom.model.lean.runner import LeanRunner
from kvloom.model.seam import SeamRunner
from kvloom.ops.native.library import NativeLibrary
from kvloom.reuse.mass import MassObserver, RowMass, chunk_statistics
from kvloom.types import KVLayout, LayerSpec, ModelSpec, Rows, SlotRange
from tests.kv.worlds import HALF
from tests.model.lean.decoders import Side, native_side, torch_side
from tests.model.running import ROOT, cached, pool_for, prepared, rows_of, some_tokens
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]


def watched(
    runner: SeamRunner, doc: KVDoc, pos: np.ndarray, parts: list[SlotRange]
) -> tuple[RowMass, list[Any]]:
    """Run rows that a document has once more; return their mass and the pass's attention calls."""
    tokens = np.array(doc.tokens, dtype=np.int64)[pos]
    calls: list[Any] = []
    with runner.watching(calls.append):
        runner.forward([Rows(doc, tokens, pos, "none", "none")])
    observer = MassObserver(doc, pos, parts, runner.spec, [call.scale for call in calls])
    runner.forward([Rows(doc, tokens, pos, "none", "none")], observe=observer)
    return observer.found, calls


@torch.inference_mode()
def whole_matrices(model: Any, tokens: np.ndarray) -> list[Tensor]:
    """Return transformers' own attention weights (h, s, t) per layer."""
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(tokens)[None]
    attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [one[0].float() for one in attentions]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_sums_are_those_of_the_whole_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_ROWS", 17)
    monkeypatch.setattr(room, "BLOCK_KEYS", 11)
    plain, runner = prepared(name)
    tokens = some_tokens(90)
    doc = cached(runner, pool_for(runner), tokens, chunk=37)
    parts = [SlotRange(4, 30), SlotRange(30, 61), SlotRange(70, 90)]
    found, _ = watched(runner, doc, np.arange(90), parts)
    for layer, weights in enumerate(whole_matrices(plain, tokens)):
        mean = weights.mean(dim=0)
        expected = [mean[:, part.start : part.stop].sum(dim=1) for part in parts]
        expected.append(mean[:, :4].sum(dim=1) + mean[:, 61:70].sum(dim=1))
        difference = torch.from_numpy(found.mass[layer]) - torch.stack(expected, dim=1)
        assert float(difference.abs().max()) <= NEAR


def test_statistics_are_the_papers_sums() -> None:
    plain, runner = prepared("llama")
    tokens = some_tokens(60)
    doc = cached(runner, pool_for(runner), tokens)
    parts = [SlotRange(4, 20), SlotRange(20, 33), SlotRange(33, 60)]
    found = [watched(runner, doc, pos, parts)[0] for pos in (np.arange(40, 60), np.arange(40))]
    chunk = chunk_statistics(found, parts, "ABC", 2)
    assert chunk.behind.names == ("A", "B")
    assert chunk.behind.lengths == (16, 13)
    weights = torch.stack([w.mean(dim=0) for w in whole_matrices(plain, tokens)])[:, 33:60]
    inter = torch.stack([weights[..., 4:20].sum((1, 2)), weights[..., 20:33].sum((1, 2))], dim=1)
    assert np.allclose(chunk.inter, inter, atol=27 * NEAR)
    assert np.allclose(chunk.intra, weights[..., 33:60].sum((1, 2)), atol=27 * NEAR)
    assert np.allclose(chunk.row_inter, weights[..., 4:33].sum(2).mean(0), atol=NEAR)
    rest = weights[..., :4].sum((1, 2)).numpy()
    assert np.allclose(chunk.inter.sum(axis=1) + chunk.intra + rest, 27, atol=27 * NEAR)


def test_every_row_of_a_chunk_must_have_run() -> None:
    _, runner = prepared("llama")
    doc = cached(runner, pool_for(runner), some_tokens(30))
    parts = [SlotRange(0, 15), SlotRange(15, 30)]
    found, _ = watched(runner, doc, np.arange(16, 30), parts)
    with pytest.raises(AssertionError, match="every row"):
        chunk_statistics([found], parts, "AB", 1)


def check_lean(side: Side) -> None:
    """Rows that are appended while they are watched, in two passes, behind cached ones."""
    truth, runner = prepared("gemma2")[1], side.runner
    assert isinstance(runner, LeanRunner)
    scales = [layer.scale for layer in runner.executor.decoder.layers]  # type: ignore[attr-defined]
    tokens, parts = some_tokens(80), [SlotRange(2, 40), SlotRange(40, 80)]
    doc = cached(runner, side.pool(), tokens[:20])
    expected, _ = watched(truth, cached(truth, pool_for(truth), tokens), np.arange(20, 80), parts)
    for start, stop in ((20, 45), (45, 80)):
        pos = np.arange(start, stop)
        observer = MassObserver(doc, pos, parts, runner.spec, scales)
        runner.forward([rows_of(doc, tokens[pos], logits="none")], observe=observer)
        difference = observer.found.mass - expected.mass[:, start - 20 : stop - 20]
        assert np.abs(difference).max() <= 10 * NEAR


@pytest.mark.parametrize("layout", ["plain", "tiled"])
def test_on_plain_torch(layout: KVLayout) -> None:
    check_lean(torch_side("gemma2", layout))


def test_on_the_compiled_executor(library: NativeLibrary) -> None:
    check_lean(native_side("gemma2", library))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 99),
    overlaid=st.lists(st.integers(0, 59), max_size=12, unique=True),
    start=st.integers(1, 30),
)
def test_moved_and_repaired_documents(seed: int, overlaid: list[int], start: int) -> None:
    """Rows that see moved spans and overlays; the oracle is the seam's own fold.

    With values that say which stretch a key is of, a row's output is its mass.
    """
    _, runner = prepared("llama")
    pool = pool_for(runner, 24)
    tokens = some_tokens(70, seed)
    source = cached(runner, pool, tokens)
    doc = KVDoc(pool, ROOT)
    source.close_tail()
    order = [*cut(source.order, start, 40), *cut(source.order, 10, 40 + start)]
    doc.extend(placed_at(order, 0))
    if overlaid:
        pos = np.array(overlaid, dtype=np.int64) % doc.length
        pos = np.unique(pos)
        runner.forward([rows_of(doc, some_tokens(len(pos), seed + 1), pos, "none", "overlay")])
    parts = [SlotRange(3, 17), SlotRange(17, doc.length)]
    rows = np.random.default_rng(seed).permutation(doc.length)[:20].astype(np.int64)
    found, calls = watched(runner, doc, rows, parts)
    assert np.allclose(found.mass.sum(axis=2), 1.0, atol=NEAR)
    for layer, call in enumerate(calls):
        expected = oracle(doc, runner.spec.layers[layer], call, rows, parts)
        assert np.allclose(found.mass[layer], expected, atol=NEAR)


def oracle(
    doc: KVDoc, spec: LayerSpec, call: Any, rows: np.ndarray, parts: list[SlotRange]
) -> np.ndarray:
    """Return the mass of rows by one softmax over all keys, each key turned to where it stands."""
    from kvloom.ops.rope import rotate, rotation_table, shift_table

    assert spec.rope is not None
    keys = []
    for span in doc.order:  # an overlay's slots are found in place of what they hide
        k, _ = doc.pool.read(spec.index, *span.pool_slots)
        keys.append(rotate(k, *shift_table(spec.rope, span.shift), spec.rope))
    k = torch.cat(keys, dim=1).repeat_interleave(spec.heads // spec.kv_heads, dim=0)
    q = rotate(call.q, *rotation_table(spec.rope, torch.from_numpy(rows)), spec.rope)
    logits = torch.einsum("hsd,htd->hst", q, k) * call.scale
    pos = torch.arange(k.shape[1])
    logits = logits.masked_fill(pos > torch.from_numpy(rows)[:, None], -torch.inf)
    weights = logits.softmax(dim=-1).mean(dim=0)
    columns = [weights[:, part.start : part.stop].sum(dim=1) for part in parts]
    columns.append(1 - sum(columns))
    return torch.stack(columns, dim=1).numpy()


def test_learned_sinks_are_refused() -> None:
    spec = ModelSpec((LayerSpec(0, 1, 1, 8, 8, HALF, sinks=True),), 10, 10, "movable")
    _, runner = prepared("llama")
    doc = cached(runner, pool_for(runner), some_tokens(4))
    with pytest.raises(UnsupportedModelError, match="sinks"):
        MassObserver(doc, np.arange(4), [], spec, [1.0])
