"""Compiles the library: one shared object per CPU level.

Knows: compilers, flags per architecture, and where the source and the libraries lie.
Does not know: kvloom. The build hook runs this file before anything is installed, so that it
imports the standard library only; it can be run as a script too.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "csrc" / "kvloom.cpp"
FOLDER = Path(__file__).parent / "lib"
COMPILERS = ("g++", "clang++")
"""Tried in this order where the environment names none."""

# At -O3 GCC unrolls the kernels further and takes minutes. The two warnings that are off are false
# alarms about vectors that are filled element by element.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
)
X86_LEVELS: Mapping[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "avx2": ("-march=x86-64-v3",),
    "plain": (),
}
OTHER_LEVELS: Mapping[str, tuple[str, ...]] = {"plain": ()}


class CompileError(Exception):
    """A level could not be compiled; the text holds what the compiler said.

    Attributes:
        built: the libraries of the levels that could be.
    """

    def __init__(self, message: str, built: Sequence[Path]) -> None:
        super().__init__(message)
        self.built = tuple(built)


class Compiler(NamedTuple):
    """A C++ compiler.

    Attributes:
        command: how it is called.
        openmp: the flags that make threads.
    """

    command: tuple[str, ...]
    openmp: tuple[str, ...]


def find_compiler(environment: Mapping[str, str]) -> Compiler | None:
    """Return the compiler that CXX names, or else g++ or clang++; None if it is not there.

    A CXX that does not exist (`CXX=none`) is how to ask for no library.
    """
    named = shlex.split(environment.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        program = shutil.which(command[0], path=environment.get("PATH"))
        if program is not None:
            found = (program, *command[1:])
            return Compiler(found, () if _is_clang(found) else ("-fopenmp",))
    return None


def levels_of(machine: str) -> Mapping[str, tuple[str, ...]]:
    """Return the CPU levels of an architecture with their flags, best first."""
    return X86_LEVELS if machine.lower() in {"x86_64", "amd64"} else OTHER_LEVELS


def compile_library(
    folder: Path,
    compiler: Compiler,
    levels: Mapping[str, tuple[str, ...]],
    *,
    source: Path = SOURCE,
    flags: Sequence[str] = (),
) -> list[Path]:
    """Compile the library of each level, side by side, and return the files.

    A file is replaced in one step, since a process may have the old one mapped; where a level
    fails, the old one is removed: it is of another source.

    Args:
        folder: where the libraries go.
        compiler: what compiles.
        levels: names with their flags.
        source: the file to compile.
        flags: given after all others.

    Raises:
        CompileError: a level could not be compiled; the others were.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def run(level: str) -> str | None:
        target = folder / f"libkvloom-{level}.so"
        options = (*FLAGS, *compiler.openmp, *levels[level], *flags)
        return _compile((*compiler.command, *options, str(source)), target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = dict(zip(levels, pool.map(run, levels), strict=True))
    built = [folder / f"libkvloom-{level}.so" for level, why in failures.items() if why is None]
    failed = [f"level {level}: {why}" for level, why in failures.items() if why is not None]
    if failed:
        raise CompileError("\n".join(failed), built)
    return built


def _compile(command: Sequence[str], target: Path) -> str | None:
    """Make one library; return what went wrong, or None."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        try:
            done = _run([*command, "-o", str(made)])
            why = done.stderr.strip() or f"exit status {done.returncode}"
        except OSError as error:
            why = str(error)
        if not made.exists() or done.returncode:
            target.unlink(missing_ok=True)
            return f"{shlex.join(command)}\n{why}"
        if done.stderr:
            sys.stderr.write(done.stderr)
        made.replace(target)
        return None


def _is_clang(command: Sequence[str]) -> bool:
    """Whether a compiler is clang, whatever its name is.

    Clang makes code for its own OpenMP runtime only. A second runtime beside torch's libgomp takes
    the cores away from the first, so clang's libraries compute on one thread.
    """
    try:
        return "clang" in _run([*command, "--version"]).stdout
    except OSError:
        return False


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all levels of an architecture, and return the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--machine", default=platform.machine(), help="of the code; here: %(default)s"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the libraries go")
    chosen = parser.parse_args(arguments)
    compiler = find_compiler(os.environ)
    if compiler is None:
        print("No C++ compiler was found, so kvloom runs without its compiled library.")
        return 0
    try:
        built = compile_library(chosen.folder, compiler, levels_of(chosen.machine))
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Compiled {', '.join(path.name for path in built)} with {compiler.command[0]}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
