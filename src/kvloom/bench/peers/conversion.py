"""The model as each peer reads it: converted once, by the peer's own converter.

Knows: what a peer reads, and the folder where converted models are kept.
Does not know: what a converted model holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from kvloom.bench.peers.commands import CommandError, run_command
from kvloom.bench.peers.environments import Home, PeerError
from kvloom.bench.peers.wire import Progress
from kvloom.model.digest import cached_sha256

Run = Callable[[Sequence[str], Callable[[str], None], Mapping[str, str]], None]

# The folder holds everything; a converter that asks a hub would only wait.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_READ_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")


def prepare_model(home: Home, model: Path, progress: Progress, *, run: Run = run_command) -> Path:
    """Return what a peer loads, converting it if that was not done before.

    Args:
        home: of the peer, which is installed.
        model: the folder that kvloom loaded.
        progress: is told what the converter says.
        run: runs a command with further environment variables and passes its lines on.

    Raises:
        PeerError: the model is none that the peer reads, or its converter failed.
    """
    if home.recipe.source == "gguf":
        return _gguf(home, model)
    if not home.recipe.convert:
        return model
    digest = _digest(home, model)
    folder = home.models / f"{model.name[:60]}-{digest[:16]}"
    home.models.mkdir(exist_ok=True)
    with FileLock(home.models / f".{folder.name}.lock"):
        if not folder.exists():
            _convert(home, model, folder, progress, run)
    return folder


def _gguf(home: Home, model: Path) -> Path:
    found = [model] if model.suffix == ".gguf" else sorted(model.glob("*.gguf"))
    if len(found) != 1:
        raise PeerError(
            f"{home.recipe.name} reads a GGUF file, and {model} holds {len(found)}; "
            "name a .gguf file as the model."
        )
    return found[0]


def _digest(home: Home, model: Path) -> str:
    """Return a digest of the model's files and of what converts them."""
    files = sorted(path for path in model.iterdir() if path.suffix in _READ_SUFFIXES)
    content = [
        [[path.name, cached_sha256(path)] for path in files],
        home.recipe.steps,
        home.recipe.convert,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _convert(home: Home, model: Path, folder: Path, progress: Progress, run: Run) -> None:
    """Convert into a folder beside the final one and rename it; runs under the folder's lock."""
    for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    places = {"bin": home.bin, "python": home.python, "model": model, "output": partial}
    command = [part.format(**places) for part in home.recipe.convert]
    what = f"{home.recipe.name} converts the model"
    progress(what, 0, 0)
    try:
        run(command, lambda line: progress(f"{what}: {line[:100]}", 0, 0), _OFFLINE)
        os.rename(partial, folder)
    except (CommandError, OSError) as error:
        raise PeerError(f"{home.recipe.name} cannot convert the model: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
