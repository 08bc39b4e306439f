"""Checks wheels: with a compiler the library is inside and loads; without one it says so.

Knows: how a wheel is made, named and installed into an environment of its own.
Does not know: what the library computes.

Run `python tools/check_wheel.py dist` in the environment whose torch the new one shall see; the
wheel stays in the folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WITH_LIBRARY = """
import sys, torch
from kvloom.ops.decoder import Norm
from kvloom.ops.native.kernels import Kernels
from kvloom.ops.native.library import LEVELS, library_path, load_library, openmp_runtimes

library = load_library()
assert library.path.is_relative_to(sys.prefix), library.path
normed = Kernels(library, 2).normalize(Norm("rms", 16), torch.full((3, 16), 2.0))
assert torch.equal(normed, torch.ones(3, 16)), normed
assert len(openmp_runtimes()) == 1, openmp_runtimes()
built = [level for level in LEVELS if library_path(level).exists()]
print(f"the wheel holds {', '.join(built)}; {library.level} was loaded")
"""
WITHOUT_LIBRARY = """
import sys, kvloom
from kvloom.ops.native.library import LibraryUnavailableError, load_library

assert kvloom.__file__.startswith(sys.prefix), kvloom.__file__
try:
    load_library()
except LibraryUnavailableError as error:
    print(f"without a compiler: {error}")
else:
    raise SystemExit("a wheel without compiled code loads a library")
"""


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel into an empty folder and return it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, folder, ROOT], check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("kvloom-*.whl")
    return wheel


def run_installed(wheel: Path, program: str) -> None:
    """Run a program where nothing but the wheel is installed; all else is seen from here."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False, symlinks=True)
        python = str(Path(folder, "bin", "python"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, wheel], check=True)
        # A path named in a .pth file does not bring its own .pth files: the editable kvloom of
        # this environment stays out of sight.
        packages = Path(sysconfig.get_path("purelib", vars={"base": folder}))
        packages.joinpath("outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-P", "-c", program], check=True, cwd=folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and check both wheels; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    folder: Path = parser.parse_args(arguments).folder
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch, "with"))
        if wheel.name.endswith("-none-any.whl"):
            raise SystemExit(f"{wheel.name} holds no compiled code: is there a compiler?")
        run_installed(wheel, WITH_LIBRARY)
        plain = build_wheel(Path(scratch, "without"), CXX="none")
        if not plain.name.endswith("-py3-none-any.whl"):
            raise SystemExit(f"{plain.name} was built without a compiler, but not for any system")
        run_installed(plain, WITHOUT_LIBRARY)
        folder.mkdir(exist_ok=True)
        shutil.move(wheel, folder / wheel.name)
    print(f"{folder / wheel.name} works")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
