"""The C structs of `csrc/abi.h`, field by field.

Knows: the order and width of fields.
Does not know: what they point at, or who keeps that alive.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

ABI = 5
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Weight(Structure):
    """A packed matrix."""

    _fields_ = (
        ("format", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("reserved", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
    )


class Norm(Structure):
    """A normalisation."""

    _fields_ = (
        ("kind", c_int32),
        ("width", c_int32),
        ("epsilon", c_float),
        ("stretches", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
    )


class Layer(Structure):
    """A decoder layer with its arena."""

    _fields_ = (
        ("input_norm", Norm),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("output_norm", Norm),
        ("projections", Weight * 3),
        ("output", Weight),
        ("gate", Weight),
        ("up", Weight),
        ("down", Weight),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("k_dim", c_int32),
        ("v_dim", c_int32),
        ("rope", c_int32),
        ("window", c_int32),
        ("reads", c_int32),
        ("activation", c_int32),
        ("parallel", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("residual_scale", c_float),
        ("sinks", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
    )


class Model(Structure):
    """A decoder."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("kv_format", c_int32),
        ("reserved", c_int32),
        ("slots", c_int64),
        ("layers", POINTER(Layer)),
        ("embedding", Weight),
        ("head", Weight),
        ("final_norm", Norm),
        ("embedding_scale", c_float),
        ("logit_scale", c_float),
        ("logit_softcap", c_float),
        ("reserved2", c_int32),
    )


class RopeTable(Structure):
    """Cos and sin per packed row and pair."""

    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("pairs", c_int32),
        ("first_dim", c_int32),
        ("interleaved", c_int32),
        ("reserved", c_int32),
    )


class Piece(Structure):
    """A stretch of slots."""

    _fields_ = (
        ("first_slot", c_int64),
        ("stop_slot", c_int64),
        ("first_pos", c_int64),
        ("shift", c_int64),
        ("turn", c_void_p),
        ("bias", c_void_p),
        ("pos", c_void_p),
        ("turns", c_void_p),
    )


class Item(Structure):
    """Rows that read the same pieces."""

    _fields_ = (
        ("first_row", c_int32),
        ("num_rows", c_int32),
        ("first_piece", c_int32),
        ("num_pieces", c_int32),
        ("partial", c_int32),
        ("reserved", c_int32),
    )


class Reads(Structure):
    """What the rows of a step read under one window and rotation."""

    _fields_ = (
        ("num_items", c_int32),
        ("num_partials", c_int32),
        ("items", c_void_p),
        ("pieces", c_void_p),
        ("row_index", c_void_p),
        ("merge_offsets", c_void_p),
        ("merge_partials", c_void_p),
    )


class Step(Structure):
    """One forward pass."""

    _fields_ = (
        ("num_rows", c_int32),
        ("first_layer", c_int32),
        ("stop_layer", c_int32),
        ("num_logits", c_int32),
        ("tokens", c_void_p),
        ("pos", c_void_p),
        ("write_slots", c_void_p),
        ("ropes", POINTER(RopeTable)),
        ("reads", POINTER(Reads)),
        ("hidden", c_void_p),
        ("qkv", c_void_p),
        ("logit_rows", c_void_p),
        ("logits", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("only_keys", c_int32),
        ("reserved", c_int32),
        ("likeliest", c_void_p),
    )


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the library's functions take and return."""
    pointer, i32, i64, f32 = c_void_p, c_int32, c_int64, c_float
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "kvloom_abi": (i32, ()),
        "kvloom_level": (ctypes.c_char_p, ()),
        "kvloom_runs_here": (i32, ()),
        "kvloom_workspace_bytes": (i64, (POINTER(Model), i64, i64)),
        "kvloom_step": (i32, (POINTER(Model), POINTER(Step), i32)),
        "kvloom_norm": (None, (POINTER(Norm), pointer, i64, pointer, i32)),
        "kvloom_quantize_rows": (None, (pointer, i64, i32, pointer, pointer, pointer, pointer)),
        "kvloom_operand_bytes": (i64, (i64, i32, i32)),
        "kvloom_linear": (
            None,
            (POINTER(Weight), pointer, i64, pointer, i32, f32, pointer, i32),
        ),
        "kvloom_gate": (None, (i32, pointer, pointer, i64, i32, pointer, i32)),
        "kvloom_likeliest": (None, (pointer, i64, i64, pointer)),
        "kvloom_embed": (None, (POINTER(Weight), pointer, i64, f32, pointer)),
        "kvloom_put": (None, (POINTER(Layer), i32, i64, pointer, i64, pointer, pointer)),
        "kvloom_rotate": (None, (POINTER(RopeTable), pointer, i64, i32, i32)),
        "kvloom_attend": (
            None,
            (
                POINTER(Layer),
                i32,
                i64,
                POINTER(Reads),
                POINTER(RopeTable),
                pointer,
                pointer,
                i64,
                pointer,
                pointer,
                i32,
            ),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
