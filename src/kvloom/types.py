"""The nouns that every room shares, as plain data and protocols.

Knows: what a layer is, what rows are, what a runner, codec, policy or edit must offer.
Does not know: how any of them works; torch is imported for type checking only.

Shape letters: b batch, s query rows, t key slots, h query heads, g KV heads, d head dim,
l layers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from kvloom.kv.doc import KVDoc
    from kvloom.kv.plan import EditPlan

RopeLayout = Literal["half", "interleaved"]
Positions = Literal["movable", "opaque", "absolute"]
WriteMode = Literal["append", "overlay", "none"]
LogitsMode = Literal["none", "last", "all"]
WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
KVLayout = Literal["plain", "tiled"]


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary position embedding as data.

    Attributes:
        inv_freq: radians per position of each rotated pair, as fp32 values.
        scaling: factor on cos and sin (YaRN); a shift uses pure cos and sin.
        layout: `half` pairs dimension i with i + n, `interleaved` pairs 2i with 2i + 1.
        first_dim: first rotated dimension of a head.
    """

    inv_freq: tuple[float, ...]
    scaling: float
    layout: RopeLayout
    first_dim: int

    @property
    def num_dims(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What the probe found out about one attention layer.

    Attributes:
        index: order of the layer in a forward pass.
        heads: query heads.
        kv_heads: key and value heads.
        k_dim: head dimension of queries and keys.
        v_dim: head dimension of values.
        rope: the rotation kvloom applies; None where there is none or the model keeps its own.
        window: number of positions a query sees, itself included; None sees all.
        softcap: bound of the logits, cap * tanh(logit / cap); None for none.
        sinks: whether the layer adds a learned sink logit per head.
    """

    index: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the probe found out about a model.

    Attributes:
        layers: one entry per attention layer, in order.
        vocab_size: rows of the output projection.
        max_positions: positions the model may be asked for.
        positions: `movable` (kvloom rotates; spans may shift), `opaque` (the model rotates),
            `absolute` (positions are baked into hidden states).
        notes: what a user should know, for example why positions are not movable.
    """

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    max_positions: int
    positions: Positions
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KV:
    """Dense keys and values of one layer: the common currency.

    Attributes:
        k: keys, shape (g, t, d).
        v: values, shape (g, t, dv).
        pos: int32 positions the keys were rotated at, shape (t,).
        bias: fp32 added to the logits, shape (t,); None for zeros.
        base: keys are rotated at base + slot; None if at `pos` only.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    bias: Tensor | None = None
    base: int | None = None


class Partial(NamedTuple):
    """The result of attention over some of the slots; partials merge in any order.

    Attributes:
        o: weighted values, normalised over the slots seen, shape (h, s, dv).
        lse: fp32 logarithm of the sum of exponentials, shape (h, s); -inf where nothing was seen.
    """

    o: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class QueryInfo:
    """Where the queries of a fold stand and how they score.

    Attributes:
        pos: int64 positions of the query rows, shape (s,).
        scale: factor on q·k.
        shift: position of the keys now minus the position they were rotated at.
        rope: the rotation that turns the query by -shift; None for a layer without one.
        window: number of positions a query sees, itself included; None sees all.
        softcap: bound of the logits; None for none.
    """

    pos: Tensor
    scale: float
    shift: int = 0
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None


class LayerSegment(Protocol):
    """One layer of a segment; may cover only some KV heads."""

    @property
    def heads(self) -> slice:
        """The KV heads covered."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the layer occupies."""
        ...

    def partial(self, q: Tensor, at: QueryInfo) -> Partial:
        """Attend with q of shape (h, s, d), rotated at `at.pos`, over all slots of the layer."""
        ...

    def dense(self) -> KV:
        """Return the layer as dense keys and values, to edit, merge or store."""
        ...


class SlotRange(NamedTuple):
    """Slots start to stop - 1 of a segment."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.stop - self.start


class Taint(Flag):
    """Why a span differs from what a fresh prefill would hold; derived, never stored."""

    EXACT = 0
    MOVED = auto()
    FOREIGN = auto()
    MERGED = auto()
    PRUNED = auto()
    LOSSY = auto()
    REPAIRED = auto()


@dataclass(frozen=True, slots=True)
class Rows:
    """What one document asks of a forward pass.

    Attributes:
        doc: the document the rows read, and write to.
        tokens: int64 token ids, shape (s,).
        pos: int64 positions, shape (s,).
        logits: which rows' logits are wanted.
        write: `append` keeps K and V at the document's end, where `pos` must go on; `overlay` keeps
            them in place of what stands at these positions, each once; `none` leaves no trace, and
            its rows may stand anywhere, each position once.
    """

    doc: KVDoc
    tokens: np.ndarray
    pos: np.ndarray
    logits: LogitsMode = "none"
    write: WriteMode = "append"


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a forward pass gives back.

    Attributes:
        logits: per `Rows`, fp32 of shape (wanted rows, v); None where none was wanted.
        likeliest: per `Rows`, the token of the largest logit in its last wanted row, the first of
            equals; empty from a runner that does not look for it.
    """

    logits: tuple[Tensor | None, ...]
    likeliest: tuple[int | None, ...] = ()


class Observer(Protocol):
    """Sees queries and keys while a forward pass runs."""

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Called once per layer with this step's q (h, s, d), k and v (g, s, d), after rotation."""
        ...


class Forward(Protocol):
    """Runs rows through a model: the runners of `kvloom.model`, and test doubles."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        ...

    @property
    def scales(self) -> Sequence[float]:
        """Factor on q·k of every layer, known at the latest when a pass comes to the layer."""
        ...

    def forward(
        self,
        rows: Sequence[Rows],
        observe: Observer | None = None,
        stop_after: int | None = None,
    ) -> StepOutput:
        """Run one step; with `stop_after`, end behind that layer and return no logits."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A closed span in a codec's own form.

    Attributes:
        codec: id of the codec that can decode it.
        arrays: named tensors.
        nbytes: sum of the tensors' bytes.
    """

    codec: str
    arrays: Mapping[str, Tensor]
    nbytes: int


class Codec(Protocol):
    """Encodes closed spans; pure, and stateless apart from a frozen calibration."""

    @property
    def id(self) -> str:
        """Name with parameters, part of a chunk's key."""
        ...

    @property
    def space(self) -> Literal["rotated", "unrotated"]:
        """Whether keys are encoded with or without their rotation."""
        ...

    def encode(self, kvs: Sequence[KV], specs: Sequence[LayerSpec]) -> Encoded:
        """Encode the layers of one unit."""
        ...

    def decode(self, encoded: Encoded) -> Sequence[KV]:
        """Return what `encode` was given, within the codec's declared error."""
        ...


class Policy(Protocol):
    """Chooses which slots of a document stay visible."""

    @property
    def id(self) -> str:
        """Name with parameters, part of a span's recipe."""
        ...

    def keep(self, num_slots: int, budget: int) -> Sequence[SlotRange]:
        """Return the slots to keep, ascending and disjoint, at most `budget` in all."""
        ...


class Edit(Protocol):
    """A change of a document as data: printable and testable without a model."""

    def plan(self, doc: KVDoc) -> EditPlan:
        """Say what the edit does to the document; pure."""
        ...
