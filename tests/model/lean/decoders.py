"""Decoders of tiny families and the runners that execute them, for the tests of the lean runner.

Knows: how a family on the seam becomes a decoder, and which executors there are.
Does not know: any test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool, block_bytes
from kvloom.model.lean.assemble import assemble_decoder
from kvloom.model.lean.executors import TorchExecutor
from kvloom.model.lean.native import NativeExecutor
from kvloom.model.lean.record import Recording, record
from kvloom.model.lean.runner import LeanRunner
from kvloom.model.probe import probe_tokens
from kvloom.model.seam import SeamRunner
from kvloom.ops.decoder import Decoder
from kvloom.ops.native.kernels import aligned
from kvloom.ops.native.library import NativeLibrary
from kvloom.ops.packing import PackedWeight, quantize
from kvloom.types import Forward, KVLayout, WeightFormat
from tests.model.running import ROOT, prepared, rows_of

# The families that every executor of the lean runner must run.
REQUIRED = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi3"),
    *("granite", "olmo2", "starcoder2", "cohere"),
)
PROBE_LENGTH = 40


@dataclass(frozen=True)
class Side:
    """A runner and the pools it works on."""

    name: str
    runner: Forward
    layout: KVLayout

    def pool(self, num_blocks: int = 16, dtype: torch.dtype = torch.float32) -> Pool:
        """Return a pool of this many blocks."""
        layers = self.runner.spec.layers
        return Pool(layers, num_blocks * block_bytes(layers, dtype), dtype, layout=self.layout)


def pack(format: WeightFormat) -> Any:
    """Return the function that packs matrices of the model in a format."""

    def packed(weight: Tensor) -> PackedWeight:
        return aligned(quantize(weight, format))

    return packed


def recorded(seam: SeamRunner, count: int = PROBE_LENGTH) -> Recording:
    """Return the seam's numbers on a probe text."""
    return record(seam, probe_tokens(seam.spec.vocab_size, count))


@lru_cache(maxsize=8)
def family(name: str) -> tuple[Any, SeamRunner, Recording]:
    """Return a family's plain model, its seam and its recording."""
    plain, seam = prepared(name)
    return plain, seam, recorded(seam)


@lru_cache(maxsize=8)
def decoder_of(name: str, format: WeightFormat = "float32") -> Decoder:
    """Return the decoder of a family, its matrices in a format."""
    return assemble_decoder(family(name)[2], pack(format))


def torch_side(name: str, layout: KVLayout = "plain", format: WeightFormat = "float32") -> Side:
    """Return a family on the executor in plain torch."""
    executor = TorchExecutor(decoder_of(name, format), layout)
    return Side(f"torch on {layout}", LeanRunner(family(name)[1].spec, executor), layout)


def native_side(name: str, library: NativeLibrary, format: WeightFormat = "float32") -> Side:
    """Return a family on the compiled executor."""
    executor = NativeExecutor(decoder_of(name, format), library)
    return Side(executor.name, LeanRunner(family(name)[1].spec, executor), executor.layout)


def run_all(side: Side, tokens: np.ndarray, chunks: Sequence[int] = ()) -> Tensor:
    """Return the logits (s, v) of a text on a pool of its own, computed in chunks."""
    doc = KVDoc(side.pool(), ROOT)
    parts, start = [], 0
    for count in (*chunks, len(tokens)):
        part = tokens[start : start + count]
        if len(part):
            (logits,) = side.runner.forward([rows_of(doc, part)]).logits
            assert logits is not None
            parts.append(logits)
        start += count
    doc.close()
    return torch.cat(parts)
