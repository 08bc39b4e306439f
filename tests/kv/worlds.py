"""Random documents over one small pool, with the truth about every slot kept beside it.

Knows: which unrotated key, value, position and bias stands in every slot.
Does not know: views, readings or plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes
from kvloom.kv.segment import Segment, SlotArrays
from kvloom.kv.span import Span
from kvloom.ops.partial import MIN_LOGIT
from kvloom.types import KVLayout, LayerSpec, Rope, SlotRange
from tests.oracles import HIDDEN, attend_row, embedded

GARBAGE = 1e30
ROOT = Lineage.root(b"a model")
# Dyadic frequencies: fp32 angles are exact, so that every difference is the fold's own.
HALF = Rope((1.0, -0.25, 0.0625), 1.0, "half", 0)
TAIL = Rope((0.5, 0.125), 1.25, "interleaved", 2)


def layer_spec(
    index: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] = (8, 8),
    rope: Rope | None = HALF,
    window: int | None = None,
    softcap: float | None = None,
) -> LayerSpec:
    return LayerSpec(index, heads, kv_heads, *dims, rope, window, softcap)


PLAIN = (layer_spec(0),)
MIXED = (
    layer_spec(0),
    layer_spec(1, heads=3, kv_heads=1, dims=(8, 6), rope=TAIL, softcap=3.0),
    layer_spec(2, window=20),
    layer_spec(3, heads=2, rope=None, window=70),
)


def small_pool(
    blocks: int,
    layers: Sequence[LayerSpec] = PLAIN,
    dtype: torch.dtype = torch.float32,
    layout: KVLayout = "plain",
) -> Pool:
    """A pool of so many blocks: what is read without having been written shows."""
    pool = Pool(layers, blocks * block_bytes(layers, dtype), dtype, layout=layout)
    # Whole tiles must be numbers.
    return littered(pool, torch.nan if layout == "plain" else GARBAGE)


def littered(pool: Pool, litter: float) -> Pool:
    """Fill a pool with numbers that show if they are read; beside codes they are the scales."""
    for layer in range(len(pool.keys)):
        for arena in pool.arenas(layer):
            arena.fill_(litter if arena.is_floating_point() else 127)
    return pool


def shown_slots(doc: KVDoc) -> Iterator[tuple[int, int]]:
    """Yield (pool slot, shift) of every token that a document shows, in order."""
    for span in doc.spans:
        for token in range(span.start, span.stop):
            if not any(cut.start <= token < cut.stop for cut in span.hidden):
                yield span.segment.first_slot + token, span.shift


def check_books(pool: Pool, docs: Sequence[KVDoc]) -> None:
    """Every block has one owner per document that holds it, and is free if it has none."""
    owners = np.zeros(pool.num_blocks, dtype=np.int64)
    for doc in docs:
        for start, stop in doc.owned_ranges():
            for block in range(start // 64, -(-stop // 64)):
                owners[block] += 1
    assert pool.owners().tolist() == owners.tolist()
    assert pool.free_blocks == int((owners == 0).sum())
    assert pool.used_bytes == int((owners > 0).sum()) * pool.block_bytes
    assert pool.free_pages == pool.free_blocks * pool.pages_per_block
    assert pool.nbytes == arena_bytes(pool)


def arena_bytes(pool: Pool) -> int:
    """Return the bytes of all tensors of a pool."""
    lists = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    return sum(arena.nbytes for arenas in lists for arena in arenas)


class World:
    """Documents over one pool, and what was written where.

    Attributes:
        layers: the model's layers.
        pool: the slots.
        docs: all documents.
        overlays: segments whose slots stand at positions of their own.
        pos: position that the key of each slot was rotated at.
        bias: what is added to the logit of each slot.
        k: unrotated keys by layer, (g, slots, d).
        v: values by layer.
    """

    def __init__(
        self,
        seed: int,
        layers: Sequence[LayerSpec] = MIXED,
        blocks: int = 40,
        layout: KVLayout = "plain",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = layers
        self.pool = small_pool(blocks, layers, dtype, layout)
        self.docs: list[KVDoc] = []
        self.overlays: set[Segment] = set()
        self.random = np.random.default_rng(seed)
        slots = blocks * 64
        self.pos = np.zeros(slots, dtype=np.int64)
        self.bias = np.zeros(slots)
        self.k = [np.full((x.kv_heads, slots, x.k_dim), np.nan) for x in layers]
        self.v = [np.full((x.kv_heads, slots, x.v_dim), np.nan) for x in layers]

    def new(self, start_pos: int, num_tokens: int) -> KVDoc:
        doc = KVDoc(self.pool, ROOT, start_pos=start_pos)
        self.docs.append(doc)
        self.append(doc, num_tokens)
        return doc

    def append(self, doc: KVDoc, num_tokens: int) -> None:
        """Append random tokens, and write their keys and values into the pool."""
        self._write(self.append_unwritten(doc, num_tokens))

    def append_unwritten(self, doc: KVDoc, num_tokens: int) -> np.ndarray:
        """Append random tokens and decide on their keys and values; return their slots."""
        return self._append(doc, self.random.integers(0, 50, num_tokens).tolist())

    def append_tokens(self, doc: KVDoc, tokens: Sequence[int]) -> np.ndarray:
        """Append these tokens with random keys and values; return their slots."""
        slots = self._append(doc, tokens)
        self._write(slots)
        return slots

    def _append(self, doc: KVDoc, tokens: Sequence[int]) -> np.ndarray:
        position = self.end_pos(doc)
        slots = doc.append(tokens)
        self._decide(slots, np.arange(position, position + len(tokens)))
        return slots

    def _decide(self, slots: np.ndarray, pos: np.ndarray) -> None:
        self.pos[slots] = pos
        self.bias[slots] = 0.0
        for x in (*self.k, *self.v):
            x[:, slots] = self.random.standard_normal((x.shape[0], len(slots), x.shape[2]))

    def _write(self, slots: np.ndarray) -> None:
        for layer in range(len(self.layers)):
            self.pool.write(layer, torch.from_numpy(slots), *self.fresh(layer, slots))

    def end_pos(self, doc: KVDoc) -> int:
        """Return the position behind the last plain slot and behind every overlay's."""
        end = doc.start_pos
        for span in doc.spans:
            if span.segment not in self.overlays:
                end = int(self.pos[span.pool_slots[1] - 1]) + span.shift + 1
        over = [span for span in doc.spans if span.segment in self.overlays]
        return max([end, *(int(self.pos[slice(*x.pool_slots)].max()) + x.shift + 1 for x in over)])

    def fresh(self, layer: int, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the rotated keys and the values of these slots, as a forward pass has them."""
        k = embedded(self.k[layer][:, slots], self.pos[slots], self.layers[layer].rope)
        return torch.tensor(k).float(), torch.tensor(self.v[layer][:, slots]).float()

    def graft(self, parts: Sequence[tuple[Span, int, tuple[SlotRange, ...]]]) -> KVDoc:
        """A document of stretches of others, each with its own shift and hidden slots."""
        spans = [Span(span.segment, span.start, span.stop, *rest) for span, *rest in parts]
        doc = KVDoc(self.pool, ROOT, spans)
        self.docs.append(doc)
        return doc

    def overlay(
        self, doc: KVDoc, pos: np.ndarray, tokens: Sequence[int] | None = None
    ) -> np.ndarray:
        """Put tokens over a document, random ones if none are given; return their slots."""
        tokens = self.random.integers(0, 50, len(pos)).tolist() if tokens is None else tokens
        slots = doc.overlay(tokens, pos)
        self._decide(slots, pos)
        self._write(slots)
        firsts = set(slots.tolist())
        self.overlays |= {x.segment for x in doc.spans if x.pool_slots[0] in firsts}
        return slots

    def bias_slots(self, segment: Segment) -> None:
        """Give a segment's slots biases, with holes among them."""
        bias = self.random.standard_normal(segment.length).astype(np.float32)
        bias[self.random.random(segment.length) < 0.3] = MIN_LOGIT
        for doc in self.docs:
            for span in doc.spans:
                if span.segment is segment:  # slots that nobody shows may be another's by now
                    self.bias[slice(*span.pool_slots)] = bias[span.start : span.stop]
        pos = None if segment.arrays is None else segment.arrays.pos
        segment.arrays = SlotArrays(pos=pos, bias=torch.from_numpy(bias))

    def query(self, layer: int, pos: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Return random queries (h, s, d): unrotated in fp64, and rotated at `pos` in fp32."""
        spec = self.layers[layer]
        q = self.random.standard_normal((spec.heads, len(pos), spec.k_dim))
        return q, torch.tensor(embedded(q, pos, spec.rope)).float()

    def attended(
        self,
        doc: KVDoc,
        layer: int,
        q: np.ndarray,
        pos: np.ndarray,
        sink: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (h, s, dv): each row over all it may see, keys rotated one by one where they are.

        A row sees the slots at positions from pos - window + 1 to pos, without holes.
        """
        spec = self.layers[layer]
        shown = np.array(list(shown_slots(doc)), dtype=np.int64).reshape(-1, 2)
        slots, key_pos = shown[:, 0], self.pos[shown[:, 0]] + shown[:, 1]
        keys = embedded(self.k[layer][:, slots], key_pos, spec.rope)
        values, bias = self.v[layer][:, slots], self.bias[slots]
        rows = []
        for row, position in enumerate(pos):
            seen = (key_pos <= position) & (bias > HIDDEN)
            if spec.window is not None:
                seen &= key_pos > position - spec.window
            attended = attend_row(
                embedded(q[:, row], float(position), spec.rope),
                keys[:, seen],
                values[:, seen],
                scale=self.scale(layer),
                bias=bias[seen],
                softcap=spec.softcap,
                sink=sink,
            )
            rows.append(attended.o)
        return np.stack(rows, axis=1)

    def scale(self, layer: int) -> float:
        return 1.0 / math.sqrt(self.layers[layer].k_dim)


@dataclass(frozen=True)
class Deed:
    """One step in the making of a world; numbers are taken modulo what there is."""

    name: str
    numbers: tuple[int, ...]

    def do(self, world: World) -> None:
        a, b, c, d = self.numbers
        if self.name == "new" or not world.docs:
            world.new(start_pos=a % 8, num_tokens=1 + b % 150)
            return
        doc = world.docs[a % len(world.docs)]
        deeds: dict[str, Callable[[], object]] = {
            "append": lambda: world.append(doc, 1 + b % 90),
            "fork": lambda: world.docs.append(doc.fork()),
            "truncate": lambda: doc.truncate(doc.length * (b % 11) // 11),
            "graft": lambda: _graft(world, doc, world.docs[d % len(world.docs)], b, c),
            "scatter": lambda: _scatter(world, doc, b, c),
            "overlay": lambda: _overlay(world, doc, b, c),
            "bias": lambda: _bias(world, doc, b),
        }
        deeds[self.name]()


def _graft(world: World, first: KVDoc, second: KVDoc, b: int, c: int) -> None:
    """Join stretches of two documents; no slot is shown twice at one position."""
    parts = []
    taken: set[tuple[int, int]] = set()
    for number, doc in enumerate((first, second)):
        doc.close_tail()
        for span in doc.spans:
            low = b * (number + 1) % span.length
            piece = span.sub(low, low + 1 + c % (span.length - low))
            middle = piece.start + piece.length // 3
            cuts = [SlotRange(middle, min(middle + 1 + b % 5, piece.stop))]
            if piece.length > 20:
                cuts.append(SlotRange(piece.stop - 3, piece.stop - c % 3))
            hidden = tuple(cut for cut in cuts if cut.length > 0) if c % 2 else ()
            shift = (b + 7 * number) % 70 - 30 if b % 3 else 0
            places = {(slot, shift) for slot in range(*piece.pool_slots)}
            if not places & taken:
                taken |= places
                parts.append((piece, shift, hidden))
    world.graft(parts)


def _scatter(world: World, doc: KVDoc, b: int, c: int) -> None:
    """Show short stretches of a document, each at a shift of its own, and leave others out."""
    doc.close_tail()
    parts, size = [], 2 + b % 9
    for span in doc.spans:
        for low in range(0, span.length, size):
            number = len(parts) + low
            if number % (3 + c % 5):
                piece = span.sub(low, min(low + size, span.length))
                parts.append((piece, (7 * number + b) % 23 - c % 40, piece.hidden))
    world.graft(parts)


def _overlay(world: World, doc: KVDoc, b: int, c: int) -> None:
    copy = doc.fork()
    world.docs.append(copy)
    world.overlay(copy, world.random.permutation(1 + doc.length + b % 9)[: 1 + c % 40])


def _bias(world: World, doc: KVDoc, b: int) -> None:
    doc.close_tail()
    if doc.spans:
        world.bias_slots(doc.spans[b % len(doc.spans)].segment)


_numbers = st.tuples(*[st.integers(0, 200)] * 4)
_deeds = st.builds(
    Deed,
    st.sampled_from(["new", "append", "fork", "truncate", "graft", "scatter", "overlay", "bias"]),
    _numbers,
)
written = st.lists(_deeds, min_size=1, max_size=8)
"""How a world comes about."""


@st.composite
def worlds(draw: st.DrawFn, layers: Sequence[LayerSpec] = MIXED) -> World:
    """Worlds of documents that were written, forked, cut, grafted and overlaid."""
    world = World(draw(st.integers(0, 2**16)), layers)
    for deed in draw(written):
        deed.do(world)
    return world
