"""Records what the seam computes on a probe text: the truth that a lean decoder must reproduce.

Knows: where a transformers model keeps its layers, found from the attention calls it makes.
Does not know: what the layers compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes, blocks_for
from kvloom.model.hooks import AttentionCall
from kvloom.model.lean.explain import Matrix, UnexplainedError, matrix_of
from kvloom.model.seam import SeamRunner
from kvloom.types import LayerSpec, Rows


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer and its numbers.

    Attributes:
        spec: what the probe found.
        module: the decoder layer.
        attention: its attention module.
        scale: factor on q·k.
        sinks: fp32 sink logits per head, or None.
        before: fp32 residual (s, e) that entered.
        after: fp32 residual (s, e) that left.
    """

    spec: LayerSpec
    module: nn.Module
    attention: nn.Module
    scale: float
    sinks: Tensor | None
    before: Tensor
    after: Tensor


@dataclass(frozen=True, slots=True)
class Recording:
    """A model and its numbers on a probe text.

    Attributes:
        config: of the model, whose numbers are hypotheses.
        tokens: int64 (s,).
        pos: int64 (s,).
        layers: in order.
        embedding: fp32 rows per token.
        head: the matrix of the logits.
        end_norms: norms beside the layers, one of which may stand before the head.
        logits: fp32 (s, v).
    """

    config: Any
    tokens: Tensor
    pos: Tensor
    layers: tuple[LayerRecord, ...]
    embedding: Tensor
    head: Matrix
    end_norms: tuple[nn.Module, ...]
    logits: Tensor


@torch.inference_mode()
def record(runner: SeamRunner, tokens: Tensor) -> Recording:
    """Run a text through the seam in one pass, and note what enters and leaves every layer.

    Raises:
        UnexplainedError: the model is no series of decoder layers with one attention each.
    """
    model: Any = runner.model
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise UnexplainedError("it can be proved in float32 only")
    calls: list[AttentionCall] = []
    _run(runner, tokens, calls)
    attentions = [call.module for call in calls]
    names = {module: name for name, module in model.named_modules()}
    if len(set(attentions)) != len(runner.spec.layers):
        raise UnexplainedError("its layers are not one attention module each")
    modules = [model.get_submodule(names[module].rpartition(".")[0]) for module in attentions]
    if len(set(modules)) != len(modules) or model in modules:
        raise UnexplainedError("its attention modules do not stand in a layer each")
    before: dict[nn.Module, Tensor] = {}
    after: dict[nn.Module, Tensor] = {}
    handles = [
        module.register_forward_hook(_noting(before, after), with_kwargs=True) for module in modules
    ]
    try:
        logits = _run(runner, tokens, [])
    finally:
        for handle in handles:
            handle.remove()
    body = model.get_submodule(names[modules[0]].rpartition(".")[0].rpartition(".")[0])
    layers = [
        LayerRecord(
            spec=spec,
            module=module,
            attention=call.module,
            scale=call.scale,
            sinks=None if call.sink is None else call.sink.detach().float().contiguous(),
            before=before[module],
            after=after[module],
        )
        for spec, module, call in zip(runner.spec.layers, modules, calls, strict=True)
    ]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or not isinstance(embedding.weight, Tensor):
        raise UnexplainedError("its head or embedding is no plain matrix")
    return Recording(
        config=model.config.get_text_config(decoder=True),
        tokens=tokens,
        pos=torch.arange(len(tokens)),
        layers=tuple(layers),
        embedding=embedding.weight.detach(),
        head=matrix_of(head),
        end_norms=tuple(_norms(body, modules)),
        logits=logits,
    )


def _norms(body: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    return [
        child
        for child in body.children()
        if child not in layers
        and not isinstance(child, nn.ModuleList | nn.Embedding)
        and 1 <= len(list(child.parameters())) <= 2
    ]


def _noting(before: dict[nn.Module, Tensor], after: dict[nn.Module, Tensor]) -> Any:
    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        left = output[0] if isinstance(output, tuple) else output
        before[module], after[module] = entered[0].clone(), left[0].clone()

    return note


def _run(runner: SeamRunner, tokens: Tensor, calls: list[AttentionCall]) -> Tensor:
    """Return the logits of a text in one pass, and note the attention calls it makes."""
    layers = runner.spec.layers
    size = (blocks_for(len(tokens)) + 1) * block_bytes(layers, torch.float32)
    doc = KVDoc(Pool(layers, size), Lineage.root(b"record"))
    rows = Rows(doc, tokens.numpy(), np.arange(len(tokens), dtype=np.int64), "all")
    with runner.watching(calls.append):
        (logits,) = runner.forward([rows]).logits
    doc.close()
    assert logits is not None
    return logits
