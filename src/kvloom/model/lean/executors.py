"""Executors: run a decoder's layers for packed rows, in plain torch or in the compiled library.

Knows: what a step hands over, and how each executor reads and writes the pool.
Does not know: requests, or how the decoder was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.fold import fold, plan_fold, write
from kvloom.ops.decoder import Decoder, DecoderLayer
from kvloom.ops.packing import PackedWeight, unpack
from kvloom.ops.reference import run_embedding, run_head, run_layer
from kvloom.ops.rows import likeliest, linear
from kvloom.types import KVLayout, Observer


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The rows of one step.

    Attributes:
        docs: one document per entry; they show the rows that are about to be written.
        pos: int64 positions of each document's rows.
        slots: int64 slots of each document's rows.
        tokens: int64 token ids of all rows.
        logit_rows: int64 packed rows whose logits are wanted.
        stop_layer: layers that run.
        observe: sees queries and keys of every layer, or None.
        first_layer: the first layer that runs.
        hidden: fp32 residual (s, e) that enters it, for proofs of single layers; the residual that
            leaves the last one stands there afterwards. None embeds the tokens.
        likeliest: int32 (wanted rows,), filled with the token of each one's largest logit, the
            first of equals; None if nobody asks.
    """

    docs: Sequence[KVDoc]
    pos: Sequence[np.ndarray]
    slots: Sequence[np.ndarray]
    tokens: np.ndarray
    logit_rows: np.ndarray
    stop_layer: int
    observe: Observer | None = None
    first_layer: int = 0
    hidden: Tensor | None = None
    likeliest: np.ndarray | None = None


class Executor(Protocol):
    """Runs steps of one decoder."""

    @property
    def name(self) -> str:
        """How doctor and the passport call it."""
        ...

    @property
    def decoder(self) -> Decoder:
        """What is run."""
        ...

    @property
    def layout(self) -> KVLayout:
        """The layout of the pools it works on."""
        ...

    def run(self, step: PackedStep) -> Tensor:
        """Write K and V of the rows and return fp32 logits (wanted rows, v)."""
        ...


class TorchExecutor:
    """Plain torch: the oracle of the compiled executor.

    Args:
        decoder: what is run.
        layout: of the pools it works on.
    """

    name = "torch"

    def __init__(self, decoder: Decoder, layout: KVLayout = "plain") -> None:
        self.decoder = decoder
        self.layout: KVLayout = layout
        self._windows = {layer.spec.window for layer in decoder.layers}
        self._matrices: dict[int, Tensor] = {}

    @torch.inference_mode()
    def run(self, step: PackedStep) -> Tensor:
        """Write K and V of the rows and return fp32 logits (wanted rows, v)."""
        plan = plan_fold(step.docs, step.pos, step.slots, self._windows)
        x = step.hidden
        if x is None:
            x = run_embedding(self.decoder, torch.from_numpy(step.tokens))
        for layer in self.decoder.layers[step.first_layer : step.stop_layer]:

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: DecoderLayer = layer) -> Tensor:
                write(plan, layer.spec.index, k, v)
                if step.observe is not None:
                    step.observe.observe(layer.spec.index, q, k, v)
                return fold(plan, layer.spec, q, scale=layer.scale, sink=layer.sinks)

            x = run_layer(layer, x, plan.pos, attend, self._multiply)
        if step.hidden is not None:
            step.hidden.copy_(x)
        rows = torch.from_numpy(step.logit_rows)
        if not len(rows):
            return x.new_empty(0, self.decoder.vocab_size)
        logits = run_head(self.decoder, x[rows], self._multiply)
        if step.likeliest is not None:
            step.likeliest[:] = likeliest(logits).numpy()
        return logits

    def _multiply(self, weight: PackedWeight, x: Tensor) -> Tensor:
        key = weight.codes.data_ptr()
        if key not in self._matrices:
            self._matrices[key] = unpack(weight)
        return linear(weight, x, unpacked=self._matrices[key])
