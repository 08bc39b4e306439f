"""The lean runner: rows through a decoder that was proved equal to the seam.

Knows: how rows are placed and which executor runs them.
Does not know: transformers; what it runs was found and proved before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvloom.model.lean.executors import Executor, PackedStep
from kvloom.model.placing import placed, split_logits, wanted_rows
from kvloom.types import KVLayout, ModelSpec, Observer, Rows, StepOutput


class LeanRunner:
    """Runs rows through an executor; one forward pass at a time.

    Args:
        spec: what the probe found.
        executor: runs the layers.
    """

    def __init__(self, spec: ModelSpec, executor: Executor) -> None:
        self._spec = spec
        self.executor = executor

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._spec

    @property
    def scales(self) -> list[float]:
        """Factor on q·k of every layer."""
        return [layer.scale for layer in self.executor.decoder.layers]

    @property
    def layout(self) -> KVLayout:
        """The layout of the pools it works on."""
        return self.executor.layout

    def forward(
        self,
        rows: Sequence[Rows],
        observe: Observer | None = None,
        stop_after: int | None = None,
    ) -> StepOutput:
        """Run one step; a failed step leaves every document as it was.

        Raises:
            CapacityError: the pool is too small for the rows.
        """
        num_layers = len(self._spec.layers)
        with placed(rows) as (docs, slots):
            counts, logit_rows = wanted_rows(rows)
            if stop_after is not None:
                counts, logit_rows = [0] * len(rows), logit_rows[:0]
            likeliest = np.empty(len(logit_rows), dtype=np.int32)
            step = PackedStep(
                docs=docs,
                pos=[entry.pos for entry in rows],
                slots=slots,
                tokens=np.concatenate([entry.tokens for entry in rows]),
                logit_rows=logit_rows,
                stop_layer=num_layers if stop_after is None else min(stop_after + 1, num_layers),
                observe=observe,
                likeliest=likeliest,
            )
            with torch.inference_mode():
                logits = self.executor.run(step)
        return split_logits(logits, counts, likeliest)
