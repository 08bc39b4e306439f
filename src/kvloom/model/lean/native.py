"""The compiled executor: hands a step to the library in one call, on memory that torch owns.

Knows: how decoders, pools and read plans become C structs, and keeps alive what they point at.
Does not know: how the library computes, or who asked.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.growth import Growth
from kvloom.kv.pool import Pool
from kvloom.kv.reads import ReadPlan, plan_reads
from kvloom.kv.views import View, row_ranges
from kvloom.model.lean.executors import PackedStep
from kvloom.ops.decoder import Decoder, DecoderLayer
from kvloom.ops.native import abi
from kvloom.ops.native.kernels import (
    norm_struct,
    pointer,
    rope_struct,
    run_step,
    weight_struct,
)
from kvloom.ops.native.library import NativeLibrary
from kvloom.ops.native.memory import ReusedMemory
from kvloom.ops.rope import shift_table, shift_tables
from kvloom.ops.tiles import TILE as TILE_SLOTS
from kvloom.types import KVLayout, Rope, WeightFormat

MAX_QUERIES = 96
"""Query vectors that the kernel takes at most: rows times the heads of one KV head."""
GOOD_QUERIES = 24
"""Query vectors of an item of many rows: four kernel heights, and units small enough to share."""
MAX_DIM = 256
"""Largest head that the kernel takes."""
# Pointers and numbers of a piece all take eight bytes.
_PIECE = np.dtype([(field[0], np.int64) for field in abi.Piece._fields_])
_KV_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


@dataclass(frozen=True, slots=True)
class _Bound:
    """A decoder on one pool, and the structs that say so."""

    model: abi.Model
    layers: ctypes.Array[abi.Layer]


def native_obstacle(decoder: Decoder, kv_dtype: torch.dtype) -> str | None:
    """Say what the compiled executor cannot do for a decoder; None if nothing."""
    if kv_dtype not in _KV_DTYPES:
        return f"KV in {kv_dtype}"
    for layer in decoder.layers:
        spec = layer.spec
        if spec.k_dim > MAX_DIM or spec.v_dim > MAX_DIM:
            return f"heads of {max(spec.k_dim, spec.v_dim)} dimensions"
        if spec.v_dim % 16 or spec.k_dim % 2:
            return f"heads of {spec.k_dim} and {spec.v_dim} dimensions"
        if spec.heads // spec.kv_heads > MAX_QUERIES:
            return f"{spec.heads // spec.kv_heads} heads on one KV head"
        for weights in ((layer.q, layer.k, layer.v), (layer.gate or layer.up, layer.up)):
            forms = {_row_form(weight.format) for weight in weights}
            if len(forms) > 1:
                return f"{' beside '.join(sorted(forms))} matrices in one product"
    return None


def _row_form(format: WeightFormat) -> str:
    """Return the form in which a product reads rows; its matrices must agree on it."""
    return "coded" if format in {"int4", "int8"} else format


class NativeExecutor:
    """Runs steps of one decoder in the compiled library.

    Args:
        decoder: what is run; its codes start at multiples of a cache line.
        library: what is called.
    """

    layout: KVLayout = "tiled"

    def __init__(self, decoder: Decoder, library: NativeLibrary) -> None:
        self.decoder = decoder
        self.library = library
        specs = [layer.spec for layer in decoder.layers]
        self._ropes: dict[Rope, np.ndarray] = {
            spec.rope: np.array(spec.rope.inv_freq, dtype=np.float32)
            for spec in specs
            if spec.rope is not None
        }
        self._reads = list(dict.fromkeys((spec.window, spec.rope) for spec in specs))
        self._rows_per_item = min(
            max(1, GOOD_QUERIES // (spec.heads // spec.kv_heads)) for spec in specs
        )
        self._qkv_width = max(
            (s.heads + s.kv_heads) * s.k_dim + s.kv_heads * s.v_dim for s in specs
        )
        self._bound: weakref.WeakKeyDictionary[Pool, _Bound] = weakref.WeakKeyDictionary()
        self._growth = Growth()
        self._planned: dict[int, _ReadStructs] = {}
        self._workspace, self._rows, self._logits = (ReusedMemory() for _ in range(3))

    @property
    def name(self) -> str:
        """How doctor and the passport call it."""
        return f"native ({self.library.level})"

    def run(self, step: PackedStep) -> Tensor:
        """Write K and V of the rows and return fp32 logits (wanted rows, v)."""
        bound = self._bind(step.docs[0].pool)
        num_rows, num_logits = len(step.tokens), len(step.logit_rows)
        pos, slots = _joined(step.pos), _joined(step.slots)
        ropes, tables = self._rope_tables(pos)
        reads = self._plan(step)
        hidden, qkv = self._row_buffers(num_rows)
        if step.hidden is not None:
            hidden = step.hidden
        logits = self._logits.take(4 * num_logits * self.decoder.vocab_size).view(torch.float32)
        logits = logits.view(num_logits, self.decoder.vocab_size)
        logit_rows = step.logit_rows.astype(np.int32)
        partials = max(read.struct.num_partials for read in reads)
        workspace = self._space(bound.model, max(num_rows, num_logits), partials)
        call = abi.Step(
            num_rows=num_rows,
            first_layer=step.first_layer,
            stop_layer=step.stop_layer,
            num_logits=num_logits,
            tokens=step.tokens.ctypes.data if step.hidden is None else None,
            pos=pos.ctypes.data,
            write_slots=slots.ctypes.data,
            ropes=ropes,
            reads=(abi.Reads * len(reads))(*(read.struct for read in reads)),
            hidden=pointer(hidden),
            qkv=qkv.data_ptr(),
            logit_rows=logit_rows.ctypes.data,
            logits=logits.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
            only_keys=num_logits == 0 and step.hidden is None,
            likeliest=None if step.likeliest is None else step.likeliest.ctypes.data,
        )
        threads = torch.get_num_threads()
        if step.observe is None:
            run_step(self.library, bound.model, call, threads)
        else:
            self._run_observed(step, bound.model, call, qkv, threads)
        del tables
        return logits

    def _run_observed(
        self, step: PackedStep, model: abi.Model, call: abi.Step, qkv: Tensor, threads: int
    ) -> None:
        """Run layer by layer, and show what each attended with; the same bits as in one call."""
        assert step.observe is not None
        tokens, num_logits, only_keys = call.tokens, call.num_logits, call.only_keys
        for index, layer in enumerate(self.decoder.layers[: step.stop_layer]):
            call.first_layer, call.stop_layer = index, index + 1
            call.tokens = tokens if index == 0 else None
            last = index + 1 == step.stop_layer
            call.num_logits, call.only_keys = num_logits if last else 0, only_keys and last
            run_step(self.library, model, call, threads)
            step.observe.observe(index, *_split_qkv(qkv, len(step.tokens), layer))

    def _plan(self, step: PackedStep) -> list[_ReadStructs]:
        """Return what every kind of layer reads: the last step's plans where they only grow."""
        in_tile = any(read.by_tiles for read in self._planned.values())
        grows = self._growth.follows(step.docs, len(step.tokens), in_tile=in_tile)
        plans: dict[int | None, ReadPlan] = {}
        for index, (window, rope) in enumerate(self._reads):
            if grows and window is None:
                self._planned[index].grow()
                continue
            if window not in plans:
                ranges = row_ranges(step.pos)
                plans[window] = plan_reads(step.docs, ranges, window, self._rows_per_item)
            self._planned[index] = _ReadStructs(plans[window], rope, step.docs)
        return list(self._planned.values())

    def _rope_tables(self, pos: np.ndarray) -> tuple[ctypes.Array[abi.RopeTable], list[np.ndarray]]:
        """Return the tables of every rotation, and the arrays they point into.

        In numpy, whose calls cost a few microseconds less than torch's.
        """
        positions = pos.astype(np.float32)[:, None]
        structs = (abi.RopeTable * max(len(self._ropes), 1))()
        arrays: list[np.ndarray] = []
        for index, (rope, frequencies) in enumerate(self._ropes.items()):
            angles = positions * frequencies
            cos, sin = np.cos(angles), np.sin(angles)
            if rope.scaling != 1.0:
                cos, sin = cos * np.float32(rope.scaling), sin * np.float32(rope.scaling)
            arrays += [cos, sin]
            structs[index] = rope_struct(rope, cos.ctypes.data, sin.ctypes.data)
        return structs, arrays

    def _row_buffers(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return memory for the residual and for q, k and v."""
        edge = num_rows * self.decoder.hidden
        stop = edge + num_rows * self._qkv_width
        rows = self._rows.take(4 * stop).view(torch.float32)
        return rows[:edge], rows[edge:]

    def _space(self, model: abi.Model, rows: int, partials: int) -> Tensor:
        size = self.library.functions.kvloom_workspace_bytes(ctypes.byref(model), rows, partials)
        return self._workspace.take(size)

    def _bind(self, pool: Pool) -> _Bound:
        bound = self._bound.get(pool)
        if bound is None:
            assert pool.layout == "tiled", "a compiled executor on a plain pool"
            bound = self._bound[pool] = self._structs(pool)
        return bound

    def _structs(self, pool: Pool) -> _Bound:
        decoder = self.decoder
        layers = (abi.Layer * len(decoder.layers))()
        for index, layer in enumerate(decoder.layers):
            layers[index] = self._layer_struct(layer, pool)
        model = abi.Model(
            num_layers=len(decoder.layers),
            hidden=decoder.hidden,
            kv_format=abi.FORMATS[_KV_DTYPES[pool.dtype]],
            slots=pool.keys[0].shape[1],
            layers=layers,
            embedding=weight_struct(decoder.embedding),
            head=weight_struct(decoder.head),
            final_norm=norm_struct(decoder.final_norm),
            embedding_scale=decoder.embedding_scale,
            logit_scale=decoder.logit_scale,
            logit_softcap=decoder.logit_softcap or 0.0,
        )
        return _Bound(model, layers)

    def _layer_struct(self, layer: DecoderLayer, pool: Pool) -> abi.Layer:
        spec = layer.spec
        keys, values, *scales = pool.arenas(spec.index)
        key_scales, value_scales = scales or (None, None)
        return abi.Layer(
            input_norm=norm_struct(layer.input_norm),
            q_norm=norm_struct(layer.q_norm),
            k_norm=norm_struct(layer.k_norm),
            attention_norm=norm_struct(layer.attention_norm),
            mlp_norm=norm_struct(layer.mlp_norm),
            output_norm=norm_struct(layer.output_norm),
            projections=(abi.Weight * 3)(*map(weight_struct, (layer.q, layer.k, layer.v))),
            output=weight_struct(layer.output),
            gate=weight_struct(layer.gate),
            up=weight_struct(layer.up),
            down=weight_struct(layer.down),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            k_dim=spec.k_dim,
            v_dim=spec.v_dim,
            rope=-1 if spec.rope is None else list(self._ropes).index(spec.rope),
            window=spec.window or 0,
            reads=self._reads.index((spec.window, spec.rope)),
            activation=abi.ACTIVATIONS[layer.activation],
            parallel=layer.parallel,
            scale=layer.scale,
            softcap=spec.softcap or 0.0,
            residual_scale=layer.residual_scale,
            sinks=pointer(layer.sinks),
            keys=pointer(keys, pool.dtype),
            values=pointer(values, pool.dtype),
            key_scales=pointer(key_scales),
            value_scales=pointer(value_scales),
        )


class _ReadStructs:
    """A read plan as C arrays, and the memory they point into."""

    def __init__(self, plan: ReadPlan, rope: Rope | None, docs: Sequence[KVDoc]) -> None:
        views = [view for item in plan.items for view in item.views]
        ends = {doc.spans[-1].pool_slots[1] for doc in docs}
        growing = [index for index, view in enumerate(views) if view.stop in ends]
        self._kept: list[Tensor] = []
        turns = self._turns(views, rope)
        self._pieces = np.zeros(len(views), dtype=_PIECE)
        for index, view in enumerate(views):
            bias, pos = self._arrays(view)
            turn, slot_turns = turns.get(view.shift, 0), self._slot_turns(view, rope)
            place = view.start, view.stop, view.first_pos, view.shift
            self._pieces[index] = (*place, turn, bias, pos, slot_turns)
        self._growing = np.array(growing, dtype=np.intp)
        self._stops = self._pieces["stop_slot"]
        self._items = np.zeros((len(plan.items), 6), dtype=np.int32)
        row = piece = 0
        for index, item in enumerate(plan.items):
            num_rows, num_views = len(item.rows), len(item.views)
            self._items[index] = (row, num_rows, piece, num_views, item.partial, 0)
            row, piece = row + num_rows, piece + num_views
        rows = [item.rows for item in plan.items]
        self._row_index = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
        self._plan = plan
        self.by_tiles = plan.by_tiles
        self.struct = abi.Reads(
            num_items=len(plan.items),
            num_partials=plan.num_partials,
            items=self._items.ctypes.data,
            pieces=self._pieces.ctypes.data,
            row_index=self._row_index.ctypes.data,
            merge_offsets=plan.merge_offsets.ctypes.data,
            merge_partials=plan.merge_partials.ctypes.data,
        )

    def grow(self) -> None:
        """Let every document show one slot more."""
        self._stops[self._growing] += 1

    def _turns(self, views: Sequence[View], rope: Rope | None) -> dict[int, int]:
        """Return by shift where its cosines and sines lie."""
        turns: dict[int, int] = {}
        for view in views:
            if rope is not None and view.shift and view.shift not in turns:
                table = torch.cat(shift_table(rope, -view.shift), dim=-1).contiguous()
                self._kept.append(table)
                turns[view.shift] = table.data_ptr()
        return turns

    def _slot_turns(self, view: View, rope: Rope | None) -> int:
        """Return where the cosines and sines lie that turn a view's keys slot by slot; 0 for none.

        They are those of whole tiles (tiles, 2, pairs, 64).
        """
        shifts = view.slot_shifts
        if shifts is None or rope is None:
            return 0
        before, behind = view.start % TILE_SLOTS, -view.stop % TILE_SLOTS
        distinct, index = np.unique(np.pad(shifts, (before, behind)), return_inverse=True)
        tables = torch.stack(shift_tables(rope, torch.from_numpy(distinct)))
        chosen = tables[:, torch.from_numpy(index.reshape(-1, TILE_SLOTS))]
        table = chosen.permute(1, 0, 3, 2).contiguous()
        self._kept.append(table)
        return table.data_ptr()

    def _arrays(self, view: View) -> tuple[int, int]:
        """Return where a view's biases and positions lie; 0 for none."""
        if view.arrays is None:
            return 0, 0
        arrays, first_slot = view.arrays
        places = []
        for values, dtype in ((arrays.bias, torch.float32), (arrays.pos, torch.int32)):
            if values is None:
                places.append(0)
                continue
            part = values[view.start - first_slot : view.stop - first_slot].to(dtype).contiguous()
            self._kept.append(part)
            places.append(part.data_ptr())
        return places[0], places[1]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays one behind the other, in memory that is contiguous."""
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)


def _split_qkv(qkv: Tensor, num_rows: int, layer: DecoderLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of q, k and v (heads, s, d) of the layer that ran last."""
    spec = layer.spec
    widths = (spec.heads * spec.k_dim, spec.kv_heads * spec.k_dim, spec.kv_heads * spec.v_dim)
    rows = qkv[: num_rows * sum(widths)].reshape(num_rows, -1)
    q, k, v = torch.split(rows, list(widths), dim=-1)
    return (
        q.reshape(num_rows, spec.heads, -1).transpose(0, 1).clone(),
        k.reshape(num_rows, spec.kv_heads, -1).transpose(0, 1).clone(),
        v.reshape(num_rows, spec.kv_heads, -1).transpose(0, 1).clone(),
    )
