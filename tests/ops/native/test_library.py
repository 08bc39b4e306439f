"""The right library is loaded, and whatever cannot be used says why."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest

from kvloom.ops.native import library as module
from kvloom.ops.native.abi import ABI
from kvloom.ops.native.compile import find_compiler
from kvloom.ops.native.library import (
    LEVELS,
    LibraryUnavailableError,
    library_path,
    load_library,
    openmp_runtimes,
)

MAPS = """\
7f1000000000-7f1000001000 r-xp 00000000 fe:01 1234       /env/torch/lib/libgomp.so.1
7f1000001000-7f1000002000 rw-p 00001000 fe:01 1234       /env/torch/lib/libgomp.so.1
7f2000000000-7f2000001000 r-xp 00000000 fe:01 99         /usr/lib/libc.so.6
7f3000000000-7f3000001000 rw-p 00000000 00:00 0
7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0          [stack]
"""
OTHER = "7f4000000000-7f4000001000 r-xp 00000000 fe:01 5   /a folder/libiomp5.so\n"
STUB = """
extern "C" int kvloom_abi() { return VERSION; }
extern "C" const char *kvloom_level() { return "plain"; }
extern "C" int kvloom_runs_here() { return RUNS; }
"""
EVERY = (
    *("workspace_bytes", "step", "norm", "quantize_rows", "operand_bytes", "linear", "gate"),
    *("likeliest", "embed", "put", "rotate", "attend"),
)


def stub(folder: Path, level: str, *, version: int = ABI, runs: bool = True) -> None:
    """Compile a library that computes nothing."""
    compiler = find_compiler(os.environ)
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = folder / "stub.cpp"
    nothing = "".join(f'extern "C" int kvloom_{name}() {{ return 0; }}\n' for name in EVERY)
    source.write_text(STUB + nothing)
    defines = [f"-DVERSION={version}", f"-DRUNS={int(runs)}"]
    target = str(library_path(level, folder))
    command = [*compiler.command, "-shared", "-fPIC", *defines, str(source), "-o", target]
    subprocess.run(command, check=True)


def test_a_library_is_of_its_level(library):
    assert library.functions.kvloom_level().decode() == library.level
    assert library.functions.kvloom_abi() == ABI
    assert library.path.name == f"libkvloom-{library.level}.so"


def test_the_best_level_is_taken(library):
    folder = library.path.parent
    best = load_library(folder=folder)
    assert LEVELS.index(best.level) <= LEVELS.index(library.level)
    assert load_library(library.level, folder).level == library.level


def test_an_unknown_level_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(
        LibraryUnavailableError, match="must be one of avx512, avx2, plain"
    ) as raised:
        load_library("sse9")  # type: ignore[arg-type]
    assert raised.value.param == "cpu_level"


def test_a_missing_library_is_refused(tmp_path, library):
    with pytest.raises(LibraryUnavailableError, match="no compiled library is in"):
        load_library(folder=tmp_path)
    shutil.copy(library.path, library_path(library.level, tmp_path))
    missing = next(level for level in LEVELS if level != library.level)
    with pytest.raises(LibraryUnavailableError, match=f"there are: {library.level}"):
        load_library(missing, tmp_path)


def test_garbage_is_refused(tmp_path):
    library_path("plain", tmp_path).write_bytes(b"no library" * 100)
    with pytest.raises(LibraryUnavailableError, match="cannot be loaded"):
        load_library(folder=tmp_path)


def test_a_library_of_something_else_is_refused(tmp_path):
    stub(tmp_path, "plain")
    source = tmp_path / "stub.cpp"
    source.write_text("int nothing;\n")
    compiler = find_compiler(os.environ)
    target = str(library_path("plain", tmp_path))
    command = [*compiler.command, "-shared", "-fPIC", str(source), "-o", target]
    subprocess.run(command, check=True)
    with pytest.raises(LibraryUnavailableError, match="kvloom_abi"):
        load_library(folder=tmp_path)


def test_another_version_is_refused(tmp_path):
    stub(tmp_path, "plain", version=ABI + 1)
    with pytest.raises(LibraryUnavailableError, match=f"interface {ABI + 1}, not {ABI}"):
        load_library(folder=tmp_path)


def test_a_level_that_the_cpu_lacks_is_passed_over_or_refused(tmp_path):
    stub(tmp_path, "avx512", runs=False)
    with pytest.raises(LibraryUnavailableError, match="cannot run level avx512"):
        load_library("avx512", tmp_path)
    with pytest.raises(LibraryUnavailableError, match="cannot run level avx512"):
        load_library(folder=tmp_path)
    stub(tmp_path, "plain")
    assert load_library(folder=tmp_path).level == "plain"


def test_runtimes_are_read_from_a_process_map():
    assert openmp_runtimes(MAPS.splitlines()) == ["/env/torch/lib/libgomp.so.1"]
    both = (MAPS + OTHER).splitlines()
    assert openmp_runtimes(both) == ["/a folder/libiomp5.so", "/env/torch/lib/libgomp.so.1"]
    assert openmp_runtimes([]) == []


def test_two_runtimes_are_warned_of(library, monkeypatch, caplog):
    for runtimes, warnings in ((["/a/libgomp.so.1"], 0), (["/a/libgomp.so.1", "/b/libomp.so"], 1)):
        monkeypatch.setattr(module, "openmp_runtimes", lambda found=runtimes: found)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_library(library.level, library.path.parent)
        assert len(caplog.records) == warnings
    assert "/a/libgomp.so.1, /b/libomp.so" in caplog.text


@pytest.mark.parametrize("order", ["torch first", "library first"])
def test_one_runtime_serves_torch_and_the_library(best_library, order):
    """In either order; the one of a process that has done nothing else."""
    program = f"""
from pathlib import Path
{"import torch" if order == "torch first" else ""}
from kvloom.ops.decoder import Norm
from kvloom.ops.native.kernels import Kernels
from kvloom.ops.native.library import load_library, openmp_runtimes
import torch

kernels = Kernels(load_library({best_library.level!r}, Path({str(best_library.path.parent)!r})), 2)
x = torch.ones(64, 256)
for _ in range(3):
    x = kernels.normalize(Norm("rms", 256), x) @ torch.ones(256, 256)
print(len(openmp_runtimes()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1"]
