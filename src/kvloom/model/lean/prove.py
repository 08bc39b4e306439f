"""Proves a packed decoder against the seam as a whole, and measures what its formats cost.

Knows: the seam's logits on a text, the tolerance of each format, and the measures of a receipt.
Does not know: how the decoder was assembled.
"""

from __future__ import annotations

import inspect
import textwrap

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes, blocks_for
from kvloom.model.lean.assemble import self_attention
from kvloom.model.lean.executors import Executor, PackedStep
from kvloom.model.lean.explain import UnexplainedError
from kvloom.model.lean.record import Recording
from kvloom.ops.decoder import Decoder
from kvloom.ops.reference import run_layer
from kvloom.types import Forward, KVLayout, Rows, WeightFormat

LAYER_TOLERANCE: dict[WeightFormat, float] = {
    "float32": 1e-4,
    "bfloat16": 1e-2,
    "int8": 1e-2,
    "int4": 1e-2,
}
"""Largest distance of what a layer adds, by format, relative to its length (2-norm over a text).

Both sides round rows and weights alike and read the same input, so little is left: values that lie
on the edge of two codes.
"""
CHAIN_TOLERANCE: dict[WeightFormat, float] = {
    "float32": 1e-4,
    "bfloat16": 5e-2,
    "int8": 1e-1,
    "int4": 1e-1,
}
"""Largest distance of logits from those of the model's own weights: what is above is not worth
running."""
RECEIPT_TOKENS = 384


def logits_of(
    runner: Forward, tokens: Tensor, dtype: torch.dtype, layout: KVLayout, chunk: int | None = None
) -> Tensor:
    """Return the logits (s, v) of a text, computed in chunks of rows."""
    layers = runner.spec.layers
    size = (blocks_for(len(tokens)) + 1) * block_bytes(layers, dtype)
    doc = KVDoc(Pool(layers, size, dtype, layout=layout), Lineage.root(b"prove"))
    parts: list[Tensor] = []
    step = chunk or len(tokens)
    for start in range(0, len(tokens), step):
        ids = tokens[start : start + step].numpy()
        pos = np.arange(start, start + len(ids), dtype=np.int64)
        (logits,) = runner.forward([Rows(doc, ids, pos, "all")]).logits
        assert logits is not None
        parts.append(logits)
    doc.close()
    return torch.cat(parts)


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far logits lie apart, relative to the length of the expected ones."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


def check_layers(executor: Executor, decoder: Decoder, recording: Recording) -> None:
    """Hold every layer of an executor against plain torch, each fed the seam's own input.

    Raises:
        UnexplainedError: a layer differs; the text names the first.
    """
    layers, pos = decoder.layers, np.arange(len(recording.tokens), dtype=np.int64)
    specs = [layer.spec for layer in layers]
    size = (blocks_for(len(pos)) + 1) * block_bytes(specs, torch.float32)
    doc = KVDoc(Pool(specs, size, layout=executor.layout), Lineage.root(b"prove"))
    slots = doc.append(recording.tokens.tolist())
    for index, (layer, entry) in enumerate(zip(layers, recording.layers, strict=True)):
        hidden = entry.before.clone()
        step = PackedStep(
            docs=[doc],
            pos=[pos],
            slots=[slots],
            tokens=recording.tokens.numpy(),
            logit_rows=pos[:0],
            first_layer=index,
            stop_layer=index + 1,
            hidden=hidden,
        )
        executor.run(step)
        attend = self_attention(layer, recording.pos)
        expected = run_layer(layer, entry.before, recording.pos, attend)
        off = distance(hidden - entry.before, expected - entry.before)
        limit = max(LAYER_TOLERANCE[weight.format] for _, weight in layer.weights())
        if off > limit:
            raise UnexplainedError(
                f"layer {index} differs on {executor.name}: what it adds lies {off:.2g} of its "
                f"length off, limit {limit:.2g}"
            )
    doc.close()


def check_chain(found: Tensor, expected: Tensor, formats: set[WeightFormat]) -> float:
    """Return the distance of a packed decoder's logits from the seam's.

    Raises:
        UnexplainedError: it is above the tolerance of the coarsest format.
    """
    limit = max(CHAIN_TOLERANCE[format] for format in formats)
    off = distance(found, expected)
    if off > limit:
        raise UnexplainedError(f"its logits lie {off:.2g} of their length off, limit {limit:.2g}")
    return off


def receipt_text() -> str:
    """Return the default text that receipts are measured on: source code that Python brings."""
    return inspect.getsource(textwrap)


def receipt(found: Tensor, source: Tensor, tokens: Tensor) -> dict[str, float]:
    """Measure what packed weights cost on a text.

    Args:
        found: logits (s, v) of the packed decoder.
        source: logits (s, v) of the model's own weights in fp32.
        tokens: the text (s,).
    """
    mine, theirs = found.log_softmax(-1), source.log_softmax(-1)
    next_tokens = tokens[1:, None]
    nll, source_nll = (-x[:-1].gather(1, next_tokens).mean() for x in (mine, theirs))
    return {
        "tokens": float(len(tokens)),
        "nll": float(nll),
        "source_nll": float(source_nll),
        "kl": float((theirs.exp() * (theirs - mine)).sum(-1).mean()),
        "top1": float((mine.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
