"""Chooses the number formats of a model: weights, activations and KV.

Knows: what a user may ask for, what contradicts itself, and what `auto` means for a stored model.
Does not know: how weights are packed or which runner computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kvloom.config import DType, KVDType, Quantization
from kvloom.errors import RequestError
from kvloom.types import WeightFormat


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """The formats that a model is to run in.

    Attributes:
        weights: what matrices are packed to on the lean runner; None takes the seam, which computes
            in the dtype of its weights.
        keep_codes: take a GGUF file's own codes where it has them.
        dtype: of the model where the seam runs it.
        kv: of keys and values on the lean runner; the seam keeps them in the dtype of its weights,
            but for int8.
    """

    weights: WeightFormat | None
    keep_codes: bool
    dtype: DType
    kv: WeightFormat


def choose_formats(
    dtype: DType,
    quantization: Quantization | None,
    kv_dtype: KVDType,
    *,
    stored: str,
    is_gguf: bool,
) -> FormatChoice:
    """Return the formats that settings ask for.

    Args:
        dtype: `float32` is the reference: no quantisation, fp32 KV, on the seam.
        quantization: `auto` keeps what the file holds, None dequantises.
        kv_dtype: `auto` is bfloat16, beside fp32 weights float32; int8 goes with all but
            `dtype="float32"`.
        stored: dtype of the stored weights, as safetensors names it.
        is_gguf: whether the model comes from a GGUF file.

    Raises:
        RequestError: a value is unknown, or two contradict each other.
    """
    _check("dtype", dtype, get_args(DType))
    _check("quantization", quantization, (*get_args(Quantization), None))
    _check("kv_dtype", kv_dtype, get_args(KVDType))
    if dtype != "auto" and quantization in {"int8", "int4"}:
        raise RequestError(
            f"dtype={dtype!r} and quantization={quantization!r} contradict each other; "
            "leave one of them at auto.",
            param="quantization",
        )
    reference = FormatChoice(None, False, dtype, "int8" if kv_dtype == "int8" else "float32")
    if dtype == "float32":
        if kv_dtype not in {"auto", "float32"}:
            raise RequestError(
                f"dtype='float32' keeps KV in float32, so kv_dtype={kv_dtype!r} contradicts it; "
                "leave one of them at auto.",
                param="kv_dtype",
            )
        return reference
    kv: WeightFormat = "bfloat16" if kv_dtype == "auto" else kv_dtype
    if quantization in {"int8", "int4"}:
        return FormatChoice(quantization, is_gguf, "auto", kv)
    if dtype == "bfloat16":
        return FormatChoice("bfloat16", False, "bfloat16", kv)
    if is_gguf and quantization == "auto":
        # What has no codes of a known kind is rounded to 8 bits, and the receipt says so.
        return FormatChoice("int8", True, "auto", kv)
    if stored == "BF16":
        return FormatChoice("bfloat16", False, "auto", kv)
    if kv_dtype == "bfloat16":
        raise RequestError(
            "this model's weights run as they are stored, with KV of the same dtype or int8; "
            "ask for quantization='int8' or dtype='bfloat16' beside kv_dtype='bfloat16'.",
            param="kv_dtype",
        )
    return reference


def _check(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = ", ".join("None" if choice is None else str(choice) for choice in known)
        raise RequestError(f"{name} is {value!r}; it must be one of {choices}.", param=name)
