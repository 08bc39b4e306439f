"""The seam runner: transformers' modules run, with our positions, our memory and our fold.

Knows: how packed rows become one forward pass of a transformers model.
Does not know: requests, sampling, or why a document is shaped as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvloom.errors import UnsupportedModelError
from kvloom.kv.fold import FoldPlan, fold, plan_fold, write
from kvloom.model.hooks import AttentionCall, AttentionHook
from kvloom.model.placing import placed, split_logits, wanted_rows
from kvloom.ops.rope import rotate, rotation_table
from kvloom.types import LayerSpec, ModelSpec, Observer, Rope, Rows, StepOutput


class _EndOfPass(Exception):  # noqa: N818
    """Ends a forward pass behind the last layer that is wanted."""


@dataclass(slots=True)
class _Step:
    """The state of one forward pass."""

    plan: FoldPlan
    observe: Observer | None
    stop_after: int | None
    calls: int = 0
    rotations: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)


class SeamRunner:
    """Runs rows through a transformers model; one forward pass at a time.

    Args:
        model: a causal language model in eval mode.
        spec: what the probe found.
        hook: the model's attention hook, which the runner takes over.

    Attributes:
        scales: factor on q·k of every layer, not a number before a pass has shown it.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, hook: AttentionHook) -> None:
        self.model = model
        self._spec = spec
        self._hook = hook
        self._step: _Step | None = None
        self._watch: Callable[[AttentionCall], object] | None = None
        self._windows = {layer.window for layer in spec.layers}
        self.scales = [math.nan] * len(spec.layers)
        self._picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._spec

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
        with placed(rows) as (docs, slots):
            plan = plan_fold(docs, [entry.pos for entry in rows], slots, self._windows)
            return self._run(rows, _Step(plan, observe, stop_after))

    @contextmanager
    def watching(self, watch: Callable[[AttentionCall], object]) -> Iterator[None]:
        """Show every attention call of the passes that run meanwhile."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def _run(self, rows: Sequence[Rows], step: _Step) -> StepOutput:
        wanted, keep_rows = wanted_rows(rows)
        keep = torch.from_numpy(keep_rows)
        logits = self._forward_model(rows, step, keep)
        if logits is None:
            return StepOutput(tuple(None for _ in rows))
        return split_logits(logits.float(), wanted)

    @torch.inference_mode()
    def _forward_model(self, rows: Sequence[Rows], step: _Step, keep: Tensor) -> Tensor | None:
        """Return the logits of the kept packed rows, (rows, v); None if the pass ended early."""
        tokens = torch.from_numpy(np.concatenate([entry.tokens for entry in rows]))
        arguments: dict[str, Any] = {
            "input_ids": tokens[None],
            "position_ids": step.plan.pos[None],
            "use_cache": False,
        }
        if self._picks_rows:
            arguments["logits_to_keep"] = keep
        self._step = step
        self._hook.handler = self._attend
        try:
            logits: Tensor = self.model(**arguments).logits[0]
        except _EndOfPass:
            return None
        finally:
            self._step = None
        return logits if self._picks_rows else logits[keep]

    def _attend(self, call: AttentionCall) -> Tensor:
        step = self._step
        assert step is not None, "attention outside of a step"
        if call.mask is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} made a mask of its own in the middle of a step, "
                "which kvloom would ignore. It cannot be run."
            )
        if self._watch is not None:
            self._watch(call)
        # Layers are told apart by the order of their calls: some modules are called twice a pass.
        layer = self._spec.layers[step.calls]
        step.calls += 1
        self.scales[layer.index] = call.scale
        q, k = self._rotate(step, layer, call.q), self._rotate(step, layer, call.k)
        write(step.plan, layer.index, k, call.v)
        if step.observe is not None:
            step.observe.observe(layer.index, q, k, call.v)
        out = fold(step.plan, layer, q, scale=call.scale, sink=call.sink)
        if step.stop_after is not None and layer.index >= step.stop_after:
            raise _EndOfPass
        return out

    def _rotate(self, step: _Step, layer: LayerSpec, x: Tensor) -> Tensor:
        if layer.rope is None:
            return x
        if layer.rope not in step.rotations:
            step.rotations[layer.rope] = rotation_table(layer.rope, step.plan.pos)
        return rotate(x, *step.rotations[layer.rope], layer.rope)
