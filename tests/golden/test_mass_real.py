"""Attention sums of the embedded model in fp32 against transformers' own attention matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes
from kvloom.model.open import OpenOptions, open_model
from kvloom.reuse.craft import context_impact, fix_overhead, rows_to_fix
from kvloom.reuse.mass import MassObserver, chunk_statistics
from kvloom.types import Rows, SlotRange
from tests.golden.test_generate import source
from tests.tolerances import TOLERANCE

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def test_sums_and_overheads_of_real_chunks(default_model_path: Path) -> None:
    model = open_model("default", OpenOptions(dtype="float32"))
    spec = model.runner.spec
    tokens = np.array(model.tokenizer.encode(source("heapq"))[:200], dtype=np.int64)
    parts = [SlotRange(4, 60), SlotRange(60, 130), SlotRange(130, 200)]
    doc = KVDoc(Pool(spec.layers, 5 * block_bytes(spec.layers, torch.float32)), Lineage.root(b"x"))
    scales = [layer.k_dim**-0.5 for layer in spec.layers]
    observer = MassObserver(doc, np.arange(200), parts, spec, scales)
    model.runner.forward([Rows(doc, tokens, np.arange(200), "none")], observe=observer)

    plain = AutoModelForCausalLM.from_pretrained(
        default_model_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        seen = plain(torch.from_numpy(tokens)[None], output_attentions=True).attentions
    weights = torch.stack([one[0].mean(dim=0) for one in seen])
    columns = [weights[..., part.start : part.stop].sum(dim=2) for part in parts]
    columns.append(weights[..., :4].sum(dim=2))
    expected = torch.stack(columns, dim=2).numpy()
    difference = np.abs(observer.found.mass - expected).max()
    assert difference <= 10 * TOLERANCE["float32"]["attention"]

    chunk = chunk_statistics([observer.found], parts, "ABC", 2)
    overhead = fix_overhead(chunk, type(chunk.behind)(("B", "A"), (70, 56)), alpha=1.0)
    print(
        f"\nlargest difference {difference:.1e}; impact {context_impact(chunk):.3f}, overhead of "
        f"the other order {overhead:.3f}, first rows {rows_to_fix(chunk, overhead)[:6]}, "
        f"{chunk.nbytes} bytes beside {70 * 46080} of KV"
    )
    assert fix_overhead(chunk, chunk.behind) == 0.0
    assert overhead == pytest.approx(context_impact(chunk))
    assert chunk.nbytes < 70 * 46080 / 1000
