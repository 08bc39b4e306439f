"""What a user may ask for, what it means for a stored model, and what contradicts itself."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.config import DType, KVDType, Quantization
from kvloom.errors import RequestError
from kvloom.model.formats import FormatChoice, choose_formats

STORED = ["F32", "BF16", "F16"]


def choose(
    dtype: Any = "auto",
    quantization: Any = "auto",
    kv_dtype: Any = "auto",
    *,
    stored: str = "BF16",
    gguf: bool = False,
) -> FormatChoice:
    return choose_formats(dtype, quantization, kv_dtype, stored=stored, is_gguf=gguf)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, FormatChoice("bfloat16", False, "auto", "bfloat16")),
        ({"kv_dtype": "float32"}, FormatChoice("bfloat16", False, "auto", "float32")),
        ({"kv_dtype": "int8"}, FormatChoice("bfloat16", False, "auto", "int8")),
        (
            {"kv_dtype": "int8", "gguf": True, "stored": "F32"},
            FormatChoice("int8", True, "auto", "int8"),
        ),
        (
            {"kv_dtype": "int8", "quantization": "int4"},
            FormatChoice("int4", False, "auto", "int8"),
        ),
        ({"kv_dtype": "int8", "stored": "F32"}, FormatChoice(None, False, "auto", "int8")),
        ({"stored": "F32"}, FormatChoice(None, False, "auto", "float32")),
        ({"stored": "F16"}, FormatChoice(None, False, "auto", "float32")),
        ({"stored": "F32", "gguf": True}, FormatChoice("int8", True, "auto", "bfloat16")),
        (
            {"stored": "F32", "gguf": True, "quantization": None},
            FormatChoice(None, False, "auto", "float32"),
        ),
        ({"dtype": "float32"}, FormatChoice(None, False, "float32", "float32")),
        ({"dtype": "float32", "gguf": True}, FormatChoice(None, False, "float32", "float32")),
        (
            {"dtype": "bfloat16", "stored": "F32"},
            FormatChoice("bfloat16", False, "bfloat16", "bfloat16"),
        ),
        (
            {"dtype": "bfloat16", "gguf": True},
            FormatChoice("bfloat16", False, "bfloat16", "bfloat16"),
        ),
        (
            {"quantization": "int4", "stored": "F32"},
            FormatChoice("int4", False, "auto", "bfloat16"),
        ),
        ({"quantization": "int4", "gguf": True}, FormatChoice("int4", True, "auto", "bfloat16")),
        ({"quantization": "int8"}, FormatChoice("int8", False, "auto", "bfloat16")),
        (
            {"quantization": "int8", "kv_dtype": "float32"},
            FormatChoice("int8", False, "auto", "float32"),
        ),
    ],
    ids=str,
)
def test_what_settings_mean(asked: dict[str, Any], expected: FormatChoice) -> None:
    assert choose(**asked) == expected


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"dtype": "float32", "quantization": "int8"}, "quantization"),
        ({"dtype": "bfloat16", "quantization": "int4"}, "quantization"),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"stored": "F32", "kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"stored": "F32", "gguf": True, "quantization": None, "kv_dtype": "bfloat16"}, "kv_dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"quantization": "int2"}, "quantization"),
        ({"quantization": False}, "quantization"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"dtype": "float32", "kv_dtype": "int8"}, "kv_dtype"),
        ({"kv_dtype": None}, "kv_dtype"),
    ],
    ids=str,
)
def test_contradictions_name_the_field(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        choose(**asked)
    assert caught.value.param == param


@given(
    dtype=st.sampled_from(get_args(DType)),
    quantization=st.sampled_from([*get_args(Quantization), None]),
    kv_dtype=st.sampled_from(get_args(KVDType)),
    stored=st.sampled_from(STORED),
    gguf=st.booleans(),
)
def test_every_setting_is_obeyed_or_refused(dtype, quantization, kv_dtype, stored, gguf):
    try:
        choice = choose(dtype, quantization, kv_dtype, stored=stored, gguf=gguf)
    except RequestError:
        assert dtype != "auto" or kv_dtype != "auto", "what is left at auto contradicts nothing"
        return
    if quantization in {"int8", "int4"}:
        assert choice.weights == quantization
    if quantization is None:
        assert choice.weights in {None, "bfloat16"}
        assert not choice.keep_codes
    if dtype != "auto":
        assert choice.dtype == dtype
        assert choice.weights == (None if dtype == "float32" else dtype)
    if kv_dtype != "auto":
        assert choice.kv == kv_dtype
    assert choice.kv in set(get_args(KVDType)) - {"auto"}
    assert dtype != "float32" or choice.kv == "float32", "the reference keeps all in fp32"
    assert not choice.keep_codes or gguf
