"""The compiled operations on tensors: same names and results as `ops.rows`.

Knows: which tensors the library may be given, and holds them while it runs.
Does not know: documents or layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvloom.ops.decoder import Activation, Norm
from kvloom.ops.native import abi
from kvloom.ops.native.library import NativeLibrary
from kvloom.ops.native.memory import ALIGNMENT, aligned_bytes
from kvloom.ops.packing import GROUP, PackedWeight, can_be_coded, codes_bytes
from kvloom.ops.rows import CodedRows
from kvloom.types import Rope


def pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Return a tensor's address; the caller keeps the tensor alive.

    Raises:
        TypeError: another dtype.
        ValueError: not contiguous, or not in the CPU's memory.
    """
    if tensor is None:
        return None
    if tensor.dtype is not dtype:
        raise TypeError(f"a tensor is {tensor.dtype}; the kernel reads {dtype}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("the kernel reads contiguous tensors in the CPU's memory")
    return tensor.data_ptr()


def weight_struct(weight: PackedWeight | None) -> abi.Weight:
    """Return a packed matrix as the library reads it; its tensors must outlive the struct.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: the codes do not start at a multiple of a cache line, or a tensor has another
            size.
    """
    if weight is None:
        return abi.Weight()
    if weight.codes.data_ptr() % ALIGNMENT:
        raise ValueError(f"packed codes must start at a multiple of {ALIGNMENT} bytes")
    size = codes_bytes(weight.format, weight.outputs, weight.inputs)
    if weight.codes.numel() != size:
        raise ValueError(f"{weight.codes.numel()} bytes of codes where there must be {size}")
    if weight.format in {"int4", "int8"} and not can_be_coded(weight.inputs):
        raise ValueError(f"{weight.inputs} inputs are no whole groups of {GROUP}")
    if weight.format == "int8":
        scales = 0 if weight.scales is None else weight.scales.numel()
        if scales != size // GROUP:
            raise ValueError(f"{scales} scales where there must be {size // GROUP}")
    if weight.bias is not None and weight.bias.shape != (weight.outputs,):
        raise ValueError(f"a bias of shape {tuple(weight.bias.shape)} for {weight.outputs} outputs")
    return abi.Weight(
        format=abi.FORMATS[weight.format],
        outputs=weight.outputs,
        inputs=weight.inputs,
        codes=pointer(weight.codes, torch.uint8),
        scales=pointer(weight.scales, torch.float16),
        bias=pointer(weight.bias),
    )


def norm_struct(norm: Norm) -> abi.Norm:
    """Return a norm as the library reads it; its tensors must outlive the struct.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another size.
    """
    for values in (norm.weight, norm.bias):
        if values is not None and values.shape not in {(norm.width,), (norm.stretches, norm.width)}:
            raise ValueError(f"values of shape {tuple(values.shape)} for a norm of {norm.width}")
    return abi.Norm(
        kind=abi.NORMS[norm.kind],
        width=norm.width,
        epsilon=norm.epsilon,
        stretches=norm.stretches,
        weight=pointer(norm.weight),
        bias=pointer(norm.bias),
    )


def aligned(weight: PackedWeight) -> PackedWeight:
    """Return the same matrix with its codes at a multiple of a cache line."""
    if weight.codes.data_ptr() % ALIGNMENT == 0:
        return weight
    codes = aligned_bytes(weight.codes.numel()).copy_(weight.codes)
    return PackedWeight(
        weight.format, weight.outputs, weight.inputs, codes, weight.scales, weight.bias
    )


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of one library.

    Attributes:
        library: what is called.
        threads: of every call.
    """

    library: NativeLibrary
    threads: int

    def normalize(self, norm: Norm, x: Float[Tensor, "s k"]) -> Float[Tensor, "s k"]:
        """Normalise rows in stretches of the norm's width.

        Raises:
            ValueError: the rows are no whole number of stretches.
        """
        if norm.kind == "none":
            return x
        if norm.width <= 0 or x.shape[-1] % norm.width:
            raise ValueError(f"rows of {x.shape[-1]} values for a norm of {norm.width}")
        out = torch.empty_like(x)
        rows, struct = x.numel() // norm.width, norm_struct(norm)
        if norm.stretches > 1:
            raise ValueError("the op norms rows alike; a step norms heads with their own weights")
        self._call("kvloom_norm")(struct, pointer(x), rows, pointer(out), self.threads)
        return out

    def quantize_rows(self, x: Float[Tensor, "s k"]) -> CodedRows:
        """Round rows to int8 with a scale per group of 32.

        Raises:
            ValueError: the rows are no whole number of groups.
        """
        rows, inputs = x.shape
        if not can_be_coded(inputs):
            raise ValueError(f"rows of {inputs} values are no whole groups of {GROUP}")
        codes = torch.empty(rows, inputs, dtype=torch.int8)
        scales = torch.empty(rows, inputs // GROUP)
        counts = torch.empty(rows, inputs // GROUP, dtype=torch.int32)
        sums = torch.empty_like(scales)
        self._call("kvloom_quantize_rows")(
            pointer(x),
            rows,
            inputs,
            pointer(codes, torch.int8),
            pointer(scales),
            pointer(counts, torch.int32),
            pointer(sums),
        )
        return CodedRows(codes, scales, counts)

    def linear(self, weight: PackedWeight, x: Float[Tensor, "s k"]) -> Float[Tensor, "s n"]:
        """Return x · weightᵀ + bias.

        Raises:
            ValueError: the rows have another width than the matrix.
        """
        if x.shape[-1] != weight.inputs:
            raise ValueError(f"rows of {x.shape[-1]} values for {weight.inputs} inputs")
        struct, out = weight_struct(weight), torch.empty(len(x), weight.outputs)
        size = self._call("kvloom_operand_bytes")(len(x), struct.format, weight.inputs)
        workspace = aligned_bytes(size)
        self._call("kvloom_linear")(
            struct,
            pointer(x),
            len(x),
            pointer(out),
            0,
            1.0,
            pointer(workspace, torch.uint8),
            self.threads,
        )
        return out

    def gate(
        self, activation: Activation, gated: Float[Tensor, "s k"] | None, up: Float[Tensor, "s k"]
    ) -> Float[Tensor, "s k"]:
        """Return activation(gated) * up, or activation(up) where nothing gates.

        Raises:
            ValueError: the two have different shapes.
        """
        if gated is not None and gated.shape != up.shape:
            raise ValueError(f"shapes {tuple(gated.shape)} and {tuple(up.shape)} do not fit")
        out = torch.empty_like(up)
        self._call("kvloom_gate")(
            abi.ACTIVATIONS[activation],
            pointer(gated),
            pointer(up),
            len(up),
            up.shape[-1],
            pointer(out),
            self.threads,
        )
        return out

    def embed(
        self, weight: PackedWeight, tokens: Int[Tensor, " s"], scale: float
    ) -> Float[Tensor, "s k"]:
        """Return the rows of a packed matrix for tokens.

        Raises:
            IndexError: a token has no row.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < weight.outputs:
            raise IndexError(f"tokens outside of 0 to {weight.outputs - 1}")
        out, struct = torch.empty(len(tokens), weight.inputs), weight_struct(weight)
        ids = pointer(tokens, torch.int64)
        self._call("kvloom_embed")(struct, ids, len(tokens), scale, pointer(out))
        return out

    def put(
        self,
        arenas: tuple[Tensor, ...],
        slots: Int[Tensor, " s"],
        k: Float[Tensor, "s g d"],
        v: Float[Tensor, "s g dv"],
    ) -> None:
        """Write rotated keys and values into a layer's tiles, as `Pool.write` does.

        Args:
            arenas: keys (g, slots, d), values (g, slots, dv), and fp32 scales (g, slots) of codes.
            slots: where the rows go.
            k: keys.
            v: values.

        Raises:
            IndexError: a slot is outside of the arenas.
            ValueError: the rows do not fit the arenas.
        """
        keys, values, *scales = arenas
        for rows, arena in ((k, keys), (v, values)):
            if rows.shape != (len(slots), arena.shape[0], arena.shape[2]):
                raise ValueError(f"rows of shape {tuple(rows.shape)} for {tuple(arena.shape)}")
        wanted = [keys.shape[:2]] * (2 if keys.dtype is torch.int8 else 0)
        if [part.shape for part in scales] != wanted:
            raise ValueError(f"{len(scales)} arenas of scales do not fit {keys.dtype}")
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < keys.shape[1]:
            raise IndexError(f"slots outside of 0 to {keys.shape[1] - 1}")
        key_scales, value_scales = scales or (None, None)
        layer = abi.Layer(
            kv_heads=keys.shape[0],
            k_dim=keys.shape[2],
            v_dim=values.shape[2],
            keys=pointer(keys, keys.dtype),
            values=pointer(values, keys.dtype),
            key_scales=pointer(key_scales),
            value_scales=pointer(value_scales),
        )
        place = pointer(slots, torch.int64)
        format = abi.FORMATS[str(keys.dtype).removeprefix("torch.")]
        self._call("kvloom_put")(
            ctypes.byref(layer), format, keys.shape[1], place, len(slots), pointer(k), pointer(v)
        )

    def likeliest(self, logits: Float[Tensor, "s v"]) -> Int[Tensor, " s"]:
        """Return the index of every row's largest logit, the first of equals; NaN counts as it.

        Raises:
            ValueError: rows are empty.
        """
        if not logits.shape[1]:
            raise ValueError("rows without logits")
        out = torch.empty(len(logits), dtype=torch.int64)
        rows, width = logits.shape
        self._call("kvloom_likeliest")(pointer(logits), rows, width, pointer(out, torch.int64))
        return out

    def rotate(
        self,
        x: Float[Tensor, "s h d"],
        cos: Float[Tensor, "s n"],
        sin: Float[Tensor, "s n"],
        rope: Rope,
    ) -> Float[Tensor, "s h d"]:
        """Return x with its rotated dimensions turned.

        Raises:
            ValueError: the tables have another shape than the rows and the rotation, or a head has
                fewer dimensions than are rotated.
        """
        if not cos.shape == sin.shape == (len(x), len(rope.inv_freq)):
            raise ValueError(
                f"tables of shape {tuple(cos.shape)} for {len(x)} rows of this rotation"
            )
        if rope.first_dim + rope.num_dims > x.shape[-1]:
            raise ValueError(f"heads of {x.shape[-1]} dimensions for this rotation")
        out = x.clone()
        table = rope_struct(rope, pointer(cos), pointer(sin))
        self._call("kvloom_rotate")(table, pointer(out), len(x), x.shape[1], x.shape[2])
        return out

    def _call(self, name: str) -> Callable[..., int]:
        function: Callable[..., int] = getattr(self.library.functions, name)
        return function


def rope_struct(rope: Rope, cos: int | None, sin: int | None) -> abi.RopeTable:
    """Return a rotation as the library reads it, from the addresses of its fp32 tables."""
    return abi.RopeTable(
        cos=cos,
        sin=sin,
        pairs=len(rope.inv_freq),
        first_dim=rope.first_dim,
        interleaved=rope.layout == "interleaved",
    )


def run_step(library: NativeLibrary, model: abi.Model, step: abi.Step, threads: int) -> None:
    """Run layers of a model.

    Raises:
        ValueError: the workspace is too small.
    """
    status = library.functions.kvloom_step(ctypes.byref(model), ctypes.byref(step), threads)
    if status:
        raise ValueError("the workspace of a step is too small")
