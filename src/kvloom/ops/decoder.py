"""A decoder as plain data: packed matrices, norms, and the few facts in which families differ.

Knows: what a straight-line decoder layer computes, in which order, with which weights.
Does not know: where the facts came from, or who executes them: `ops.reference` in plain torch, and
`ops.native` compiled.

A layer computes, with x the residual:

    h = input_norm(x);  a = output(attention(rotate(q_norm(q h)), rotate(k_norm(k h)), v h))
    serial:    x += residual_scale * attention_norm(a);  m = mlp_norm(x)
    parallel:  m = h, and x += residual_scale * attention_norm(a)
    x += residual_scale * output_norm(down(activation(gate m) * up m))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvloom.ops.packing import PackedWeight
from kvloom.types import LayerSpec

NormKind = Literal["none", "rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation of the last dimension.

    Attributes:
        kind: `rms` divides by the root of the mean square, `layer` subtracts the mean first.
        width: values normalised together.
        epsilon: added to the mean square.
        weight: fp32 factors (width,) or (stretches, width), or None.
        bias: fp32 summands of the same shape, or None.
    """

    kind: NormKind = "none"
    width: int = 0
    epsilon: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def stretches(self) -> int:
        """How many stretches have values of their own."""
        weight = self.weight
        return len(weight) if weight is not None and weight.dim() == 2 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer; the module says how its parts follow each other.

    Attributes:
        spec: shapes, rotation, window and softcap of the attention.
        q, k, v, output: projections of the attention.
        gate: of the MLP; None where the activation is not gated.
        up, down: of the MLP.
        input_norm, q_norm, k_norm, attention_norm, mlp_norm, output_norm: norms, by their place.
            q_norm and k_norm are as wide as a head, or as all heads together.
        scale: factor on q·k.
        activation: of the MLP.
        parallel: MLP and attention read the same rows.
        residual_scale: factor on what is added to the residual.
        sinks: fp32 logits per head, or None.
    """

    spec: LayerSpec
    q: PackedWeight
    k: PackedWeight
    v: PackedWeight
    output: PackedWeight
    gate: PackedWeight | None
    up: PackedWeight
    down: PackedWeight
    scale: float
    activation: Activation
    input_norm: Norm = Norm()
    q_norm: Norm = Norm()
    k_norm: Norm = Norm()
    attention_norm: Norm = Norm()
    mlp_norm: Norm = Norm()
    output_norm: Norm = Norm()
    parallel: bool = False
    residual_scale: float = 1.0
    sinks: Tensor | None = None

    def weights(self) -> Iterator[tuple[str, PackedWeight]]:
        """Yield the layer's matrices by name."""
        for name in ("q", "k", "v", "output", "gate", "up", "down"):
            weight = getattr(self, name)
            if weight is not None:
                yield name, weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A whole decoder.

    Attributes:
        layers: in order.
        embedding: one row per token.
        head: one row per token; may be the embedding.
        final_norm: before the head.
        embedding_scale: factor on embedded rows.
        logit_scale: factor on logits.
        logit_softcap: bound of the logits; None for none.
    """

    layers: tuple[DecoderLayer, ...]
    embedding: PackedWeight
    head: PackedWeight
    final_norm: Norm
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def hidden(self) -> int:
        """Values of a row between the layers."""
        return self.embedding.inputs

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.head.outputs

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, each counted once."""
        weights = [weight for layer in self.layers for _, weight in layer.weights()]
        weights += [self.embedding, self.head]
        return sum({weight.codes.data_ptr(): weight.nbytes for weight in weights}.values())
