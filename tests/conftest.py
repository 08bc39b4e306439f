"""Fixtures, hypothesis profiles and shape checks that several rooms' tests share."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from kvloom.ops.native.library import NativeLibrary

# Shapes and dtypes of the pure tensor functions are checked at run time, in tests only.
install_import_hook("kvloom.ops", "beartype.beartype")

# So many that the short suite stays short; `--hypothesis-profile=many` looks harder. What lands is
# judged by examples that do not change from run to run.
settings.register_profile("few", max_examples=30, deadline=None)
settings.register_profile("ci", max_examples=30, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("many", max_examples=300, deadline=None, print_blob=True)
settings.load_profile("few")


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nothing-missing",
        action="store_true",
        help="fail if data or a service that a marked test needs is missing",
    )
    parser.addoption(
        "--native-libraries",
        type=Path,
        help="folder of the compiled libraries to test; kvloom's own if left out",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the library of every CPU level this machine runs, or with the best one.

    It takes a `library`, or the `best_library`.
    """
    asked = {"library", "best_library"} & set(metafunc.fixturenames)
    if not asked:
        return
    found = loadable(metafunc.config.getoption("--native-libraries"))
    if not found and metafunc.config.getoption("--nothing-missing"):
        raise pytest.UsageError("no compiled library can be loaded; run `make native`")
    for name in asked:
        chosen = found if name == "library" else found[:1]
        metafunc.parametrize(name, chosen, ids=[library.level for library in chosen])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count, tests whose data or service is missing; if none may be, they fail."""
    if config.getoption("--nothing-missing"):
        return
    there = {"shared_data": SHARED_DATA.is_dir(), "redis": shutil.which("redis-server") is not None}
    absent = [name for name, is_there in there.items() if not is_there]
    missing = [item for item in items if any(map(item.get_closest_marker, absent))]
    items[:] = [item for item in items if item not in missing]
    config.hook.pytest_deselected(items=missing)


def loadable(folder: Path | None) -> list[NativeLibrary]:
    """Return the libraries in a folder that load here, best first."""
    from kvloom.ops.native.library import (
        LEVELS,
        LIBRARY_FOLDER,
        LibraryUnavailableError,
        load_library,
    )

    found = []
    for level in LEVELS:
        with suppress(LibraryUnavailableError):
            found.append(load_library(level, folder or LIBRARY_FOLDER))
    return found


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout."""
    return SHARED_DATA


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis server of the tests' own, on a socket in a folder of its own."""
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "socket"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--save", ""], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.02)
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The folder of the embedded model, converted into the user's cache if it is not there."""
    from kvloom.model.convert import convert_gguf
    from kvloom.model.source import resolve_source

    return convert_gguf(resolve_source("default"))
