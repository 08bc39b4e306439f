"""The seam runner on the embedded model gives transformers' logits of a real text."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes
from kvloom.model.probe import probe
from kvloom.model.seam import SeamRunner
from kvloom.types import Rows
from tests.tolerances import TOLERANCE

ROOT = Lineage.root(b"test")


@pytest.fixture(scope="module")
def tokens(default_model_path: Path) -> np.ndarray:
    """The first 300 tokens of a real module's source."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    source = inspect.getsource(textwrap)
    return np.array(tokenizer(source)["input_ids"][:300], dtype=np.int64)


@pytest.fixture(scope="module")
def model(default_model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def truth(model: Any, tokens: np.ndarray) -> Tensor:
    """Transformers' own logits, taken before the model is probed."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    return logits


@pytest.fixture(scope="module")
def runner(model: Any, truth: Tensor) -> SeamRunner:
    return probe(model)


@pytest.fixture
def pool(runner: SeamRunner) -> Pool:
    return Pool(runner.spec.layers, 12 * block_bytes(runner.spec.layers, torch.float32))


def assert_same(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    difference = float((found - expected).abs().max()) / float(expected.abs().max())
    assert difference <= TOLERANCE["float32"]["logits"]
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def prefill(runner: SeamRunner, doc: KVDoc, tokens: np.ndarray, chunk: int) -> Tensor:
    parts = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        pos = np.arange(start, start + len(part), dtype=np.int64)
        (logits,) = runner.forward([Rows(doc, part, pos, "all")]).logits
        assert logits is not None
        parts.append(logits)
    return torch.cat(parts)


def test_probe_finds_a_llama(runner: SeamRunner) -> None:
    spec = runner.spec
    assert (len(spec.layers), spec.positions, spec.max_positions) == (30, "movable", 8192)
    layer = spec.layers[0]
    assert (layer.heads, layer.kv_heads, layer.k_dim) == (9, 3, 64)
    assert layer.rope is not None
    assert (layer.rope.layout, layer.rope.num_dims, len(set(spec.layers))) == ("half", 64, 30)


@pytest.mark.parametrize("chunk", [300, 47])
def test_prefill_in_any_chunks(
    runner: SeamRunner, pool: Pool, tokens: np.ndarray, truth: Tensor, chunk: int
) -> None:
    doc = KVDoc(pool, ROOT)
    assert_same(prefill(runner, doc, tokens, chunk), truth)
    assert doc.exact_length() == 300


def test_chunk_decode_and_scattered_rows_packed(
    runner: SeamRunner, pool: Pool, tokens: np.ndarray, truth: Tensor
) -> None:
    docs = [KVDoc(pool, ROOT) for _ in range(3)]
    for doc, length in zip(docs, (299, 150, 64), strict=True):
        prefill(runner, doc, tokens[:length], 300)
    scattered = np.random.default_rng(3).permutation(150)[:40]
    found = runner.forward(
        [
            Rows(docs[0], tokens[299:], np.array([299]), "all"),
            Rows(docs[1], tokens[scattered], scattered, "all", "none"),
            Rows(docs[2], tokens[64:101], np.arange(64, 101), "all"),
        ]
    ).logits
    assert_same(found[0], truth[299:])
    assert_same(found[1], truth[scattered])
    assert_same(found[2], truth[64:101])
