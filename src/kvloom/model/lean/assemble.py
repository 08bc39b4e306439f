"""Assembles a decoder from a model on the seam, and proves it layer by layer.

Knows: hypotheses about how the parts of a layer follow each other, and the seam's own numbers.
Does not know: model names, number formats or executors. Nothing is believed that was not seen to
reproduce what the seam computed from the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import torch
from torch import Tensor, nn

from kvloom.kv.segment import visibility_mask
from kvloom.model.digest import Progress
from kvloom.model.lean.explain import (
    TOLERANCE,
    Matrix,
    MlpFacts,
    UnexplainedError,
    config_numbers,
    difference,
    equal,
    explain_mlp,
    explain_norm,
    matrix_of,
)
from kvloom.model.lean.record import LayerRecord, Recording
from kvloom.ops.decoder import Decoder, DecoderLayer, Norm
from kvloom.ops.packing import PackedWeight, pack_plain
from kvloom.ops.partial import add_sink, attend_plain
from kvloom.ops.reference import Attend, run_layer
from kvloom.ops.rows import normalize

Pack = Callable[[Tensor], PackedWeight]
"""Packs a matrix of the model, fp32 (outputs, inputs), in the format wanted."""
_PLACES = ("input_norm", "attention_norm", "mlp_norm", "output_norm")


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the parts of a layer follow each other.

    Attributes:
        places: for each norm of the layer, in the order of its children, where it stands.
        parallel: MLP and attention read the same rows.
        residual_scale: factor on what is added to the residual.
    """

    places: tuple[str, ...]
    parallel: bool
    residual_scale: float


@torch.inference_mode()
def assemble_decoder(recording: Recording, pack: Pack, progress: Progress | None = None) -> Decoder:
    """Return the decoder that reproduces what the seam computed.

    Args:
        recording: the seam's numbers on a probe text, in fp32.
        pack: gives each matrix its format.
        progress: is told about every layer.

    Raises:
        UnexplainedError: some part is not reproduced; the text names the first layer that differs.
    """
    numbers = config_numbers(recording.config)
    layers: list[DecoderLayer] = []
    arrangement: Arrangement | None = None
    for index, record in enumerate(recording.layers):
        if progress is not None:
            progress("Proving the lean runner", index, len(recording.layers))
        try:
            parts = _Parts.of(record)
            arrangement = _arrange(parts, record, recording, numbers, arrangement)
        except UnexplainedError as error:
            raise UnexplainedError(f"layer {index} differs: {error}") from error
        layers.append(parts.layer(arrangement, pack))
    return _with_ends(recording, layers, numbers, pack)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of one layer before they are arranged."""

    record: LayerRecord
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    q_norm: Norm
    k_norm: Norm
    mlp: MlpFacts
    norms: tuple[Norm, ...]

    @classmethod
    def of(cls, record: LayerRecord) -> _Parts:
        """Explain a layer's modules.

        Raises:
            UnexplainedError: a module is of no known kind, or left over.
        """
        spec, attention = record.spec, record.attention
        widths = (
            spec.heads * spec.k_dim,
            spec.kv_heads * spec.k_dim,
            spec.kv_heads * spec.v_dim,
        )
        linears = {n: m for n, m in attention.named_modules() if type(m) is nn.Linear}
        q, k, v, output = _projections(linears, widths, spec.heads * spec.v_dim)
        norms = {
            name[0]: explain_norm(module)
            for name, module in attention.named_children()
            if "norm" in name and list(module.parameters())
        }
        if set(norms) - {"q", "k"}:
            raise UnexplainedError("its attention has a norm that is neither of q nor of k")
        mlp = [
            module
            for module in record.module.children()
            if module is not attention and any(type(m) is nn.Linear for m in module.modules())
        ]
        if len(mlp) != 1:
            raise UnexplainedError(f"it has {len(mlp)} modules with linears beside its attention")
        return cls(
            record=record,
            q=q,
            k=k,
            v=v,
            output=output,
            q_norm=norms.get("q", Norm()),
            k_norm=norms.get("k", Norm()),
            mlp=explain_mlp(mlp[0], record.before.shape[-1]),
            norms=tuple(
                explain_norm(module)
                for module in record.module.children()
                if list(module.parameters())
                and not any(type(m) is nn.Linear for m in module.modules())
            ),
        )

    def layer(self, arrangement: Arrangement, pack: Pack) -> DecoderLayer:
        """Return the layer with its matrices packed."""

        def packed(matrix: Matrix) -> PackedWeight:
            return pack(matrix.weight).with_bias(matrix.bias)

        mlp = self.mlp
        norms = dict(zip(arrangement.places, self.norms, strict=True))
        return DecoderLayer(
            spec=self.record.spec,
            q=packed(self.q),
            k=packed(self.k),
            v=packed(self.v),
            output=packed(self.output),
            gate=None if mlp.gate is None else packed(mlp.gate),
            up=packed(mlp.up),
            down=packed(mlp.down),
            scale=self.record.scale,
            activation=mlp.activation,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            parallel=arrangement.parallel,
            residual_scale=arrangement.residual_scale,
            sinks=self.record.sinks,
            **norms,
        )


def _projections(
    linears: dict[str, nn.Linear], widths: tuple[int, int, int], mixed: int
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Return q, k, v and output among an attention's linears."""
    outputs = [m for n, m in linears.items() if m.in_features == mixed and n[0] not in "qkv"]
    inner = [(n, m) for n, m in linears.items() if m not in outputs]
    if len(outputs) != 1:
        raise UnexplainedError(f"its attention has linears {', '.join(linears)}")
    if len(inner) == 1 and inner[0][1].out_features == sum(widths):
        whole, (a, b, _) = matrix_of(inner[0][1]), widths
        parts = whole.rows(0, a), whole.rows(a, a + b), whole.rows(a + b, sum(widths))
        return (*parts, matrix_of(outputs[0]))
    named = {name[0]: module for name, module in inner}
    if len(inner) != 3 or set(named) != set("qkv"):
        raise UnexplainedError(f"its attention has linears {', '.join(linears)}")
    if tuple(named[letter].out_features for letter in "qkv") != widths:
        raise UnexplainedError("its projections have other widths than its heads")
    q, k, v = (matrix_of(named[letter]) for letter in "qkv")
    return q, k, v, matrix_of(outputs[0])


def _arrange(
    parts: _Parts,
    record: LayerRecord,
    recording: Recording,
    numbers: Sequence[float],
    guess: Arrangement | None,
) -> Arrangement:
    """Return the arrangement that reproduces the layer's output from its input."""
    layer: DecoderLayer | None = None
    best = float("inf")
    for arrangement in _arrangements(len(parts.norms), numbers, guess):
        layer = _rearranged(layer, parts, arrangement)
        found = run_layer(layer, record.before, recording.pos, self_attention(layer, recording.pos))
        off = difference(found - record.before, record.after - record.before)
        if off <= TOLERANCE:
            return arrangement
        best = min(best, off)
    raise UnexplainedError(
        f"no arrangement of its parts gives its output (nearest: {best:.2g} of the largest value)"
    )


def _rearranged(
    layer: DecoderLayer | None, parts: _Parts, arrangement: Arrangement
) -> DecoderLayer:
    """Return the layer in fp32 under an arrangement; matrices are packed once."""
    if layer is None:
        return parts.layer(arrangement, _plain)
    norms = dict(zip(arrangement.places, parts.norms, strict=True))
    return replace(
        layer,
        parallel=arrangement.parallel,
        residual_scale=arrangement.residual_scale,
        input_norm=norms.get("input_norm", Norm()),
        attention_norm=norms.get("attention_norm", Norm()),
        mlp_norm=norms.get("mlp_norm", Norm()),
        output_norm=norms.get("output_norm", Norm()),
    )


def _plain(weight: Tensor) -> PackedWeight:
    return pack_plain(weight, "float32")


def _arrangements(
    num_norms: int, numbers: Sequence[float], guess: Arrangement | None
) -> Iterator[Arrangement]:
    """Yield arrangements, likely ones first."""
    if guess is not None and len(guess.places) == num_norms:
        yield guess
    orders = [
        order for places in combinations(_PLACES, num_norms) for order in permutations(places)
    ]
    orders.sort(key=lambda order: list(order) != sorted(order, key=_PLACES.index))
    for scale in (1.0, *numbers):
        for order in orders:
            yield Arrangement(order, False, scale)
            if "mlp_norm" not in order:
                yield Arrangement(order, True, scale)


def self_attention(layer: DecoderLayer, pos: Tensor) -> Attend:
    """Return attention of a text to itself."""
    spec = layer.spec

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = visibility_mask(pos, pos, spec.window)
        partial = attend_plain(q, k, v, scale=layer.scale, mask=mask, softcap=spec.softcap)
        return partial.o if layer.sinks is None else add_sink(partial, layer.sinks)

    return attend


def _with_ends(
    recording: Recording, layers: list[DecoderLayer], numbers: Sequence[float], pack: Pack
) -> Decoder:
    """Add embedding, last norm and head."""
    embedding, head = recording.embedding, recording.head
    rows = embedding[recording.tokens]
    first = recording.layers[0].before
    scale = float((first * rows).sum() / rows.square().sum())
    if not equal(rows * scale, first):
        raise UnexplainedError("what enters its first layer is no multiple of its embedding")
    last = recording.layers[-1].after
    for norm in [*map(explain_norm, recording.end_norms), Norm()]:
        raw = head(normalize(norm, last))
        found = _logit_form(raw, recording.logits, numbers)
        if found is not None:
            packed = pack(embedding)
            tied = head.weight is embedding or torch.equal(head.weight, embedding)
            return Decoder(
                layers=tuple(layers),
                embedding=packed,
                head=(packed if tied else pack(head.weight)).with_bias(head.bias),
                final_norm=norm,
                embedding_scale=scale,
                logit_scale=found[0],
                logit_softcap=found[1],
            )
    raise UnexplainedError("its logits are no product of its last layer's rows with its head")


def _logit_form(
    raw: Tensor, logits: Tensor, numbers: Sequence[float]
) -> tuple[float, float | None] | None:
    """Return factor and bound that turn products into logits; None if there are none."""
    for cap in (None, *(number for number in numbers if number > 1)):
        bare = logits if cap is None else torch.atanh((logits / cap).clamp(-0.9999, 0.9999)) * cap
        scale = float((bare * raw).sum() / raw.square().sum())
        found = raw * scale if cap is None else torch.tanh(raw * scale / cap) * cap
        if equal(found, logits):
            return scale, cap
    return None
