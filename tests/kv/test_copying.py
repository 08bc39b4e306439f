"""Copies hold the same bits under the same lineage, in slots of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.copying import append_copies
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, block_bytes
from kvloom.types import LayerSpec

LAYERS = tuple(LayerSpec(index, 4, 2, 8, 6, None) for index in range(2))
ROOT = Lineage.root(b"copying")


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@given(parts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=90), min_size=1, max_size=3))
def test_a_copy_has_the_bits_tokens_and_lineage_and_owns_its_slots(dtype, layout, parts):
    pool = Pool(LAYERS, 40 * block_bytes(LAYERS, dtype), dtype, layout=layout)
    doc = KVDoc(pool, ROOT)
    for part in parts:
        slots = doc.append(part)
        for layer in range(len(LAYERS)):
            k, v = torch.randn(2, len(slots), 8), torch.randn(2, len(slots), 6)
            pool.write(layer, torch.from_numpy(slots), k, v)
        doc.close_tail()
    copy = KVDoc(pool, ROOT)
    append_copies(copy, doc.spans)
    theirs, ours = _slots(doc), _slots(copy)
    for layer in range(len(LAYERS)):
        for rows in pool.read(layer, 0, pool.num_blocks * PAGE_SLOTS):
            assert torch.equal(rows[:, theirs], rows[:, ours])
        for scales in pool.arenas(layer)[2:]:
            assert torch.equal(scales[:, theirs], scales[:, ours])
    assert copy.tokens == doc.tokens
    assert copy.lineage() == doc.lineage()
    assert copy.exact_length() == doc.length
    assert not set(ours.tolist()) & set(theirs.tolist())
    doc.close()
    copy.close()
    assert pool.free_blocks == pool.num_blocks


def _slots(doc: KVDoc) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.arange(*span.pool_slots) for span in doc.spans]))
