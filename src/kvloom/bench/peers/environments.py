"""The peers' environments: one folder each in the user's cache, made whole or not at all.

Knows: venv, pip, the marker that is written last, and what stands in a peer's folder.
Does not know: which peers there are, or how they are measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from kvloom import KvloomError
from kvloom.bench.peers.commands import CommandError, run_command
from kvloom.bench.peers.recipes import Recipe
from kvloom.bench.peers.wire import Progress
from kvloom.model.digest import cache_root, write_json

MARKER = "peer.json"
Run = Callable[[Sequence[str], Callable[[str], None]], None]


class PeerError(KvloomError):
    """A peer cannot be installed, or its model cannot be converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What the marker says.

    Attributes:
        version: of the engine.
        steps: what pip was asked for.
        install_s: seconds it took.
        nbytes: on disk when it was made.
    """

    version: str
    steps: tuple[tuple[str, ...], ...]
    install_s: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Home:
    """The folder of one peer.

    Attributes:
        recipe: of the peer.
        folder: holds the environment, converted models and the marker.
    """

    recipe: Recipe
    folder: Path

    @property
    def bin(self) -> Path:
        """The folder of the environment's programs."""
        return self.folder / "environment" / "bin"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.bin / "python"

    @property
    def models(self) -> Path:
        """The folder of converted models."""
        return self.folder / "models"

    def installed(self) -> Installed | None:
        """Return what is installed; None if nothing whole is, or another recipe made it."""
        try:
            content = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
            steps = tuple(tuple(step) for step in content.pop("steps"))
            found = Installed(**content, steps=steps)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return found if found.steps == pip_steps(self.recipe) and self.python.exists() else None

    def nbytes(self) -> int:
        """Return the bytes of everything in the folder, converted models included."""
        return _nbytes(self.folder)


def home_of(recipe: Recipe, cache_dir: Path | None = None) -> Home:
    """Return where a peer lives, whether or not it is installed."""
    return Home(recipe, cache_root(cache_dir) / "peers" / recipe.name)


def pip_steps(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """Return the arguments of each `pip install`, with this environment's version of torch."""
    torch = metadata.version("torch")
    return tuple(tuple(part.format(torch=torch) for part in step) for step in recipe.steps)


def install(
    home: Home, progress: Progress, *, run: Run = run_command, again: bool = False
) -> Installed:
    """Make a peer's environment, unless it stands already.

    Args:
        home: where.
        progress: is told what pip says.
        run: runs a command and passes its lines on.
        again: make it anew though it stands.

    Raises:
        PeerError: a command failed; nothing is left that looks installed.
    """
    home.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.folder.parent / f".{home.recipe.name}.lock"):
        found = home.installed()
        if found is not None and not again:
            return found
        _clear(home.folder)
        try:
            return _make(home, progress, run)
        except CommandError as error:
            _clear(home.folder)
            raise PeerError(f"{home.recipe.name} cannot be installed: {error}") from error
        except BaseException:
            _clear(home.folder)
            raise


def remove(home: Home) -> int:
    """Remove a peer and its converted models; return the bytes that were held.

    Raises:
        PeerError: there is nothing to remove.
    """
    if not home.folder.exists():
        raise PeerError(f"{home.recipe.name} is not installed; there is nothing to remove.")
    with FileLock(home.folder.parent / f".{home.recipe.name}.lock"):
        nbytes = home.nbytes()
        _clear(home.folder)
    return nbytes


def _make(home: Home, progress: Progress, run: Run) -> Installed:
    recipe, environment = home.recipe, home.folder / "environment"
    steps = pip_steps(recipe)
    started = time.perf_counter()

    def tell(line: str) -> None:
        progress(f"{recipe.name}: {line}", 0, 0)

    # A venv holds its own path and cannot be moved, so the marker tells a whole one from a part.
    run((sys.executable, "-m", "venv", str(environment)), tell)
    pip = (str(home.python), "-m", "pip", "--no-input", "--disable-pip-version-check")
    for step in steps:
        run((*pip, "install", *step), tell)
    if recipe.unwanted:
        run((*pip, "uninstall", "--yes", *recipe.unwanted), tell)
    done = Installed(
        version=recipe.version,
        steps=steps,
        install_s=round(time.perf_counter() - started, 1),
        nbytes=_nbytes(environment),
    )
    write_json(home.folder / MARKER, asdict(done))
    return done


def _clear(folder: Path) -> None:
    """Remove a folder, its marker first, so that a part of it never looks whole."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _nbytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
