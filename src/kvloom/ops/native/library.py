"""Finds and loads the compiled library of the best CPU level this machine has.

Knows: file names, versions, CPU levels and OpenMP runtimes.
Does not know: what the functions compute.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from kvloom.errors import RequestError
from kvloom.ops.native.abi import ABI, declare

logger = logging.getLogger(__name__)

CpuLevel = Literal["avx512", "avx2", "plain"]
LEVELS: tuple[CpuLevel, ...] = get_args(CpuLevel)
"""Best first."""
LIBRARY_FOLDER = Path(__file__).parent / "lib"


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A loaded library.

    Attributes:
        level: the CPU level it was compiled for.
        path: the file.
        functions: called with pointers; `abi.py` declares them.
    """

    level: CpuLevel
    path: Path
    functions: ctypes.CDLL


class LibraryUnavailableError(RequestError):
    """The compiled library cannot be used here; the text says why."""


def library_path(level: CpuLevel, folder: Path = LIBRARY_FOLDER) -> Path:
    """Return where the library of a level is built."""
    return folder / f"libkvloom-{level}.so"


def load_library(level: CpuLevel | None = None, folder: Path = LIBRARY_FOLDER) -> NativeLibrary:
    """Load the library of a level; None takes the best that was built and that this CPU runs.

    Raises:
        LibraryUnavailableError: there is none, the CPU lacks the level, or it was built for
            another version.
    """
    if level is not None and level not in LEVELS:
        raise LibraryUnavailableError(
            f"cpu_level is {level!r}; it must be one of {', '.join(LEVELS)}.", param="cpu_level"
        )
    built = [name for name in LEVELS if library_path(name, folder).exists()]
    if not built:
        raise LibraryUnavailableError(
            f"no compiled library is in {folder}; install kvloom again where g++ or clang++ is "
            "found, or take a wheel for this system.",
            param="cpu_level",
        )
    if level is not None and level not in built:
        raise LibraryUnavailableError(
            f"no library of level {level} was built; there are: {', '.join(built)}.",
            param="cpu_level",
        )
    for name in built if level is None else [level]:
        library = _open(name, library_path(name, folder))
        if library.functions.kvloom_runs_here():
            _warn_of_two_runtimes()
            return library
    raise LibraryUnavailableError(
        f"this CPU cannot run level {level or ', '.join(built)}; leave cpu_level out.",
        param="cpu_level",
    )


def openmp_runtimes(maps: Iterable[str] | None = None) -> list[str]:
    """Return the OpenMP runtimes mapped into this process.

    Args:
        maps: lines of a process map; None reads this process's, where the system has one.
    """
    if maps is None:
        path = Path("/proc/self/maps")
        maps = path.read_text().splitlines() if path.exists() else []
    files = {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    names = ("libgomp", "libomp", "libiomp")
    return sorted(file for file in files if Path(file).name.startswith(names))


def _open(level: CpuLevel, path: Path) -> NativeLibrary:
    torch.get_num_threads()  # torch is loaded, and with it the OpenMP runtime that both share
    try:
        functions = ctypes.CDLL(str(path))
        functions.kvloom_abi.restype = ctypes.c_int32
        abi = functions.kvloom_abi()
    except (OSError, AttributeError) as error:
        raise LibraryUnavailableError(
            f"{path} cannot be loaded ({error}); install kvloom again.", param="cpu_level"
        ) from error
    if abi != ABI:
        raise LibraryUnavailableError(
            f"{path} was built for another version of kvloom (interface {abi}, not {ABI}); "
            "install kvloom again.",
            param="cpu_level",
        )
    declare(functions)
    return NativeLibrary(level, path, functions)


def _warn_of_two_runtimes(runtimes: Sequence[str] | None = None) -> None:
    found = openmp_runtimes() if runtimes is None else runtimes
    if len(found) > 1:
        logger.warning(
            "two OpenMP runtimes are loaded (%s); their threads take the cores from each other, "
            "so import torch before whatever brings the other one",
            ", ".join(found),
        )
