"""Inspection: how a document lies in memory, and how far its KV is from another one's.

Knows: spans, shifts and views, and how a key is turned to where it stands.
Does not know: why two documents may differ. Nothing that an engine does needs any of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.views import views_of
from kvloom.ops.rope import rotate, shift_table
from kvloom.outputs import DocumentLayout
from kvloom.types import LayerSpec


def layout_of(doc: KVDoc) -> DocumentLayout:
    """Return how a document lies in memory."""
    return DocumentLayout(
        nbytes=doc.nbytes,
        blocks=doc.nbytes // doc.pool.block_bytes,
        spans=len(doc.spans),
        views=len(views_of(doc)),
    )


def keys_and_values(doc: KVDoc, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return fp32 keys (g, t, d), turned to where they stand now, and values (g, t, dv)."""
    keys = [torch.empty(layer.kv_heads, 0, layer.k_dim)]
    values = [torch.empty(layer.kv_heads, 0, layer.v_dim)]
    for piece in doc.order:
        k, v = doc.pool.read(layer.index, *piece.pool_slots)
        k = k.float()
        if piece.shift and layer.rope is not None:
            k = rotate(k, *shift_table(layer.rope, piece.shift), layer.rope)
        keys.append(k)
        values.append(v.float())
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def deviation(doc: KVDoc, other: KVDoc, layer: LayerSpec) -> tuple[float, float]:
    """Return the largest difference of keys and of values, as shares of the other's largest number.

    Both have the same number of tokens, one at least.
    """
    pairs = zip(keys_and_values(doc, layer), keys_and_values(other, layer), strict=True)
    keys, values = (float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return keys, values
