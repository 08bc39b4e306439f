"""Starts a worker in an environment that holds its engine but not kvloom.

Knows: how one package is imported from its folder, without the packages beside it.
Does not know: any engine.

It is run by its path: `PYTHON -I start_worker.py MODULE`. The folder that holds kvloom is not put
on the path, so that an engine finds nothing of kvloom's own environment.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


def import_package(folder: Path) -> None:
    """Import the package in this folder under the folder's name, whatever the path says."""
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    import_package(PACKAGE_FOLDER)
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
