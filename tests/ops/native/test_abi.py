"""The structs of Python lie in memory as the C compiler lays them out."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from kvloom.ops.native import abi
from kvloom.ops.native.compile import SOURCE, find_compiler

HEADER = SOURCE.parent / "abi.h"
STRUCTS = (
    *(abi.Weight, abi.Norm, abi.Layer, abi.Model, abi.RopeTable),
    *(abi.Piece, abi.Item, abi.Reads, abi.Step),
)
NUMBERS = {
    "FORMAT": {"F32": "float32", "BF16": "bfloat16", "INT8": "int8", "INT4": "int4"},
    "NORM": {"NONE": "none", "RMS": "rms", "LAYER": "layer"},
    "ACTIVATION": {"SILU": "silu", "GELU": "gelu", "GELU_TANH": "gelu_tanh"},
}


def without_comments() -> str:
    return re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))


def test_every_struct_has_the_fields_of_the_header_in_order():
    text = without_comments()
    found = dict(re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL))
    assert found.keys() == {struct.__name__ for struct in STRUCTS}
    for struct in STRUCTS:
        names = re.findall(r"(\w+)(?:\[\d+\])?;", found[struct.__name__])
        assert names == [name for name, _ in struct._fields_], struct.__name__


def test_sizes_and_offsets_equal_the_compilers(tmp_path):
    compiler = find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler")
    lines = []
    for struct in STRUCTS:
        name = struct.__name__
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in struct._fields_:
            lines.append(f'std::printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    program = "\n".join(
        [f'#include "{HEADER}"', "#include <cstddef>", "#include <cstdio>", "int main() {", *lines]
    )
    source, binary = Path(tmp_path, "layout.cpp"), Path(tmp_path, "layout")
    source.write_text(program + "\n}\n")
    subprocess.run([*compiler.command, "-std=c++17", str(source), "-o", str(binary)], check=True)
    said = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout
    laid = {name: int(number) for name, number in map(str.split, said.splitlines())}
    for struct in STRUCTS:
        name = struct.__name__
        assert ctypes.sizeof(struct) == laid[name], name
        for field, _ in struct._fields_:
            assert getattr(struct, field).offset == laid[f"{name}.{field}"], f"{name}.{field}"


def test_numbers_equal_those_of_the_header():
    text = without_comments()
    (version,) = re.findall(r"#define KVLOOM_ABI (\d+)", text)
    assert int(version) == abi.ABI
    for prefix, ours in (
        ("FORMAT", abi.FORMATS),
        ("NORM", abi.NORMS),
        ("ACTIVATION", abi.ACTIVATIONS),
    ):
        found = re.findall(rf"{prefix}_(\w+) = (\d+)", text)
        assert {NUMBERS[prefix][name]: int(number) for name, number in found} == ours


def test_every_declared_function_is_in_the_library(library):
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.parent.iterdir())
    exported = set(re.findall(r"^EXPORT [\w ]+?[ *](kvloom_\w+)\(", text, re.MULTILINE))
    assert exported
    for name in exported:
        assert getattr(library.functions, name).argtypes is not None, name
