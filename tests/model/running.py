"""What the tests of the model room share: plain logits, documents, rows and comparisons.

Knows: how to ask transformers and a runner for the same numbers.
Does not know: any test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, block_bytes, blocks_for
from kvloom.model.probe import probe
from kvloom.model.seam import SeamRunner
from kvloom.types import Forward, LogitsMode, Rows, WriteMode
from tests.model.families import FAMILIES, VOCABULARY, build
from tests.tolerances import TOLERANCE

ROOT = Lineage.root(b"test")
BY_NAME = {entry.name: entry for entry in FAMILIES}


def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, SeamRunner]:
    """Return a family's plain model, and a runner of another copy of it."""
    plain, other = (build(BY_NAME[name]) for _ in range(2))
    for model in (plain, other):
        for weight in model.parameters():  # rotary buffers stay fp32, as in a loaded model
            weight.data = weight.data.to(dtype)
    return plain, probe(other)


@torch.inference_mode()
def plain_logits(model: Any, tokens: np.ndarray, pos: np.ndarray | None = None) -> Tensor:
    """Return transformers' own logits (s, v) of one sequence in one pass, in fp32."""
    given = {} if pos is None else {"position_ids": torch.from_numpy(pos)[None]}
    ids = torch.from_numpy(tokens)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False, **given).logits[0]
    return logits.float()


def some_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Return random token ids that no family reserves."""
    return np.random.default_rng(seed).integers(5, VOCABULARY, count, dtype=np.int64)


def pool_for(runner: Forward, num_blocks: int = 16, dtype: torch.dtype = torch.float32) -> Pool:
    """Return a pool of this many blocks."""
    layers = runner.spec.layers
    return Pool(layers, num_blocks * block_bytes(layers, dtype), dtype)


def rows_of(
    doc: KVDoc,
    tokens: np.ndarray,
    pos: Sequence[int] | np.ndarray | None = None,
    logits: LogitsMode = "all",
    write: WriteMode = "append",
) -> Rows:
    """Return rows that continue a document, or stand at the positions given."""
    if pos is None:
        pos = np.arange(doc.end_pos, doc.end_pos + len(tokens))
    return Rows(doc, tokens, np.asarray(pos, dtype=np.int64), logits, write)


def cached(runner: Forward, pool: Pool, tokens: np.ndarray, chunk: int = PAGE_SLOTS) -> KVDoc:
    """Return a document of these tokens, computed in chunks."""
    doc = KVDoc(pool, ROOT)
    for start in range(0, len(tokens), chunk):
        runner.forward([rows_of(doc, tokens[start : start + chunk], logits="none")])
    return doc


def assert_same(found: Tensor | None, expected: Tensor, kind: str = "float32") -> None:
    """Check logits within the table's share of the largest expected logit."""
    assert found is not None
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert difference <= TOLERANCE[kind]["logits"]


def owned_blocks(pool: Pool, docs: Sequence[KVDoc]) -> np.ndarray:
    """Return how often each block is owned, counted from the documents."""
    owners = np.zeros(pool.num_blocks, dtype=np.int32)
    for doc in docs:
        for first, stop in doc.owned_ranges():
            owners[first // PAGE_SLOTS : blocks_for(stop)] += 1
    return owners
