"""Compilers are found or not, and what they say when they fail reaches whoever asked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvloom.ops.native import compile as compiling
from kvloom.ops.native.compile import (
    CompileError,
    Compiler,
    compile_library,
    find_compiler,
    levels_of,
    main,
)
from kvloom.ops.native.library import LEVELS, LIBRARY_FOLDER, library_path, load_library

SHELL = Path("/bin/sh")
WORKING = """
case "$*" in
  *--version*) echo "a compiler";;
  *) while [ "$1" != -o ]; do shift; done; echo made > "$2";;
esac
"""
CLANG = """
echo "Some clang version 14.0.6"
"""
FAILING_AT_AVX2 = """
case "$*" in *x86-64-v3*) echo "kvloom.cpp:1: unknown target" >&2; exit 1;; esac
while [ "$1" != -o ]; do shift; done; echo made > "$2"
"""
PRETENDING = "exit 0\n"


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!{SHELL}\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_named_compiler_comes_first(tmp_path):
    named = script(tmp_path, "c++-x", WORKING)
    script(tmp_path, "g++", WORKING)
    path = {"PATH": str(tmp_path)}
    found = find_compiler({**path, "CXX": f"{named} -m64"})
    assert found == Compiler((str(named), "-m64"), ("-fopenmp",))
    assert find_compiler({**path, "CXX": "c++-x"}).command == (str(named),)
    assert find_compiler(path).command == (str(tmp_path / "g++"),)


def test_clang_gets_no_second_openmp_runtime(tmp_path):
    path = {"PATH": str(tmp_path)}
    assert find_compiler(path) is None
    clang = script(tmp_path, "clang++", CLANG)
    assert find_compiler(path) == Compiler((str(clang),), ())
    script(tmp_path, "g++", CLANG)
    assert find_compiler(path).openmp == (), "clang under another's name"


def test_a_compiler_that_is_not_there_is_none(tmp_path):
    script(tmp_path, "g++", WORKING)
    assert find_compiler({"PATH": str(tmp_path), "CXX": "none"}) is None
    assert find_compiler({"PATH": ""}) is None


def test_architectures_have_their_levels():
    assert tuple(levels_of("x86_64")) == tuple(levels_of("AMD64")) == LEVELS
    assert dict(levels_of("aarch64")) == dict(levels_of("riscv64")) == {"plain": ()}


def test_the_folder_and_names_are_those_that_are_loaded(tmp_path):
    compiler = find_compiler({"CXX": str(script(tmp_path, "g++", WORKING))})
    built = compile_library(tmp_path / "lib", compiler, levels_of("x86_64"))
    assert built == [library_path(level, tmp_path / "lib") for level in LEVELS]
    assert all(path.read_text() == "made\n" for path in built)
    assert sorted((tmp_path / "lib").iterdir()) == sorted(built), "nothing else is left"
    assert compiling.FOLDER == LIBRARY_FOLDER


def test_a_failing_level_is_reported_and_removed(tmp_path):
    compiler = Compiler((str(script(tmp_path, "g++", FAILING_AT_AVX2)),), ())
    for level in LEVELS:
        library_path(level, tmp_path).write_text("old")
    with pytest.raises(CompileError, match=r"level avx2: .*\nkvloom.cpp:1: unknown") as raised:
        compile_library(tmp_path, compiler, levels_of("x86_64"))
    assert [path.name for path in raised.value.built] == [
        "libkvloom-avx512.so",
        "libkvloom-plain.so",
    ]
    assert not library_path("avx2", tmp_path).exists()
    assert library_path("plain", tmp_path).read_text() == "made\n"


def test_a_compiler_that_makes_nothing_or_vanishes_is_an_error(tmp_path):
    pretending = Compiler((str(script(tmp_path, "g++", PRETENDING)),), ())
    with pytest.raises(CompileError, match="exit status 0"):
        compile_library(tmp_path, pretending, {"plain": ()})
    with pytest.raises(CompileError, match="No such file"):
        compile_library(tmp_path, Compiler((str(tmp_path / "gone"),), ()), {"plain": ()})


def test_the_command_says_what_came_of_it(tmp_path, monkeypatch, capsys):
    arguments = ["--machine", "x86_64", "--folder", str(tmp_path / "lib")]
    monkeypatch.setenv("CXX", "none")
    assert main(arguments) == 0
    assert "No C++ compiler" in capsys.readouterr().out
    monkeypatch.setenv("CXX", str(script(tmp_path, "g++", WORKING)))
    assert main(arguments) == 0
    assert "Compiled libkvloom-avx512.so, libkvloom-avx2.so" in capsys.readouterr().out
    monkeypatch.setenv("CXX", str(script(tmp_path, "bad", FAILING_AT_AVX2)))
    assert main(arguments) == 1
    assert "unknown target" in capsys.readouterr().err


def test_the_real_source_compiles(tmp_path):
    compiler = find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler")
    # Warnings would be errors here; optimising takes the time, and is left out.
    flags = ("-O0", "-Werror")
    compile_library(tmp_path, compiler, {"plain": ()}, flags=flags)
    assert load_library(folder=tmp_path).level == "plain"
