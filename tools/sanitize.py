"""Runs tests of the compiled library under the address and undefined-behaviour sanitizers.

Knows: how to build the library with them, and how to start a Python that was built without.
Does not know: the tests; their paths are arguments, and they take `library` from tests/conftest.py.

Run `python tools/sanitize.py tests/ops/native`. Leaks are not looked for: the library allocates
nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvloom.ops.native.compile import Compiler, compile_library, find_compiler, levels_of

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    *("-g", "-O1"),
)
BROKEN = """
import sys, torch
from pathlib import Path
from kvloom.ops.native.kernels import norm_struct
from kvloom.ops.native.library import load_library
from kvloom.ops.decoder import Norm

x, out = torch.ones(2, 16), torch.ones(3, 16)
norm = norm_struct(Norm("rms", 16))
library = load_library(folder=Path(sys.argv[1]))
library.functions.kvloom_norm(norm, x.data_ptr(), 3, out.data_ptr(), 1)
"""


def preloaded(compiler: Compiler) -> str:
    """Return what must be loaded before all else.

    That is the sanitizer, and the C++ library, whose exceptions it wants to watch: Python brings
    none, so that torch's would be loaded too late.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [*compiler.command, f"-print-file-name={name}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        paths.append(said.strip())
    return " ".join(paths)


def environment_of(folder: Path, compiler: Compiler) -> dict[str, str]:
    """Return the environment of a process under the sanitizers, which write into the folder."""
    return {
        **os.environ,
        "LD_PRELOAD": preloaded(compiler),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={folder / 'found'}",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:log_path={folder / 'found'}",
        "OMP_NUM_THREADS": "2",
    }


def check_alarm(folder: Path, environment: dict[str, str]) -> None:
    """Check that reading past a tensor is noticed: a silent alarm would let everything pass."""
    command = [sys.executable, "-c", BROKEN, str(folder)]
    done = subprocess.run(command, check=False, env=environment, stdout=subprocess.DEVNULL)
    reports = list(folder.glob("found*"))
    if not done.returncode or "heap-buffer-overflow" not in "".join(map(Path.read_text, reports)):
        raise SystemExit("the address sanitizer did not notice a read behind a tensor")
    for path in reports:
        path.unlink()


def run_tests(folder: Path, environment: dict[str, str], arguments: Sequence[str]) -> int:
    """Run pytest on the libraries in a folder; return its exit status."""
    options = ["-q", "--hypothesis-profile=few", f"--native-libraries={folder}"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    status = subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode
    # Into files, since pytest keeps what a process says that is about to be ended.
    for path in folder.glob("found*"):
        print(path.read_text(), file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the library of every level, run the tests, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="+", help="paths, and further arguments of pytest behind --")
    chosen = parser.parse_args(arguments)
    compiler = find_compiler(os.environ)
    if compiler is None or not compiler.openmp:
        raise SystemExit("the sanitizers need g++")
    with tempfile.TemporaryDirectory() as folder:
        compile_library(Path(folder), compiler, levels_of(platform.machine()), flags=FLAGS)
        environment = environment_of(Path(folder), compiler)
        check_alarm(Path(folder), environment)
        return run_tests(Path(folder), environment, chosen.tests)


if __name__ == "__main__":
    raise SystemExit(main())
