"""Packed models and verdicts on disk: weights and facts, or why a model was refused.

Knows: the layout of a packed model's folder, what makes it stale, and how to map it into memory.
Does not know: how a model is packed or proved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvloom.model.digest import cache_root, sha256_file, write_json
from kvloom.model.lean.encode import ALIGNMENT, decode, encode, numbered, renamed
from kvloom.model.stored_tokenizer import TokenizerFacts
from kvloom.ops.decoder import Decoder
from kvloom.types import ModelSpec

logger = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT_VERSION = 2
_MANIFEST, _WEIGHTS, _TOKENIZER = "packed.json", "packed.safetensors", "tokenizer.json"


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A decoder that was proved, and what must be known to run it without transformers' model.

    Attributes:
        decoder: packed matrices and facts.
        spec: what the probe found.
        weights: words for the formats of the matrices, for the passport.
        digests: of weights, config and tokenizer, by name.
        eos_token_ids: tokens that end a text.
        receipt: measured differences to the model's own weights, by name.
        tokenizer: the tokenizer as text, and its facts.
    """

    decoder: Decoder
    spec: ModelSpec
    weights: str
    digests: dict[str, str]
    eos_token_ids: tuple[int, ...]
    receipt: dict[str, float]
    tokenizer: tuple[str, TokenizerFacts]


def packed_folder(key: Mapping[str, Any], cache_dir: Path | None) -> Path:
    """Return where the packed model of a key stands."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_root(cache_dir) / "packed" / digest


def load_packed(key: Mapping[str, Any], cache_dir: Path | None) -> PackedModel | None:
    """Return the packed model of a key, mapped into memory; None if there is none.

    One that is damaged, or was made for another key, is said so and counts as none.
    """
    folder = packed_folder(key, cache_dir)
    return _usable(folder, lambda: _load(folder, key), "packing again")


def save_packed(model: PackedModel, key: Mapping[str, Any], cache_dir: Path | None) -> None:
    """Write a packed model, so that other processes see it whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = packed_folder(key, cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write(model, key, partial)
            if folder.exists():
                doomed = folder.parent / f".{folder.name}.removed-{os.getpid()}"
                os.rename(folder, doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def load_refusal(key: Mapping[str, Any], cache_dir: Path | None) -> str | None:
    """Return why the model of a key was refused; None if it was not.

    A verdict that is damaged, or was made for another key, is said so and counts as none.
    """
    path = _refusal(key, cache_dir)
    return _usable(path, lambda: str(_manifest(path, key)["reason"]), "trying again")


def save_refusal(reason: str, key: Mapping[str, Any], cache_dir: Path | None) -> None:
    """Keep why the model of a key was refused, so that the next start need not try again.

    Raises:
        OSError: the file cannot be written.
    """
    path = _refusal(key, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "key": dict(key), "reason": reason})


def _refusal(key: Mapping[str, Any], cache_dir: Path | None) -> Path:
    return packed_folder(key, cache_dir).with_suffix(".refused.json")


def _usable(place: Path, load: Callable[[], T], instead: str) -> T | None:
    """Return what is kept at a place; None if there is nothing, or if it cannot be used."""
    if not place.exists():
        return None
    try:
        return load()
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        SafetensorError,
    ) as error:
        logger.warning("what is kept in %s cannot be used (%s); %s", place, error, instead)
        return None


def _write(model: PackedModel, key: Mapping[str, Any], folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    facts = {"decoder": encode(model.decoder, tensors), "spec": encode(model.spec, tensors)}
    names = numbered(tensors)
    path = folder / _WEIGHTS
    _save_aligned({names[name]: tensor for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    text, tokenizer_facts = model.tokenizer
    tokenizer = folder / _TOKENIZER
    tokenizer.write_text(text, encoding="utf-8")
    facts["tokenizer"] = asdict(tokenizer_facts)
    own = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in facts}
    content = own | {name: renamed(fact, names) for name, fact in facts.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": dict(key),
        "model": content,
        "digest": _digest(content),
        "files": {file.name: _stamp(file) for file in (path, tokenizer)},
    }
    write_json(folder / _MANIFEST, manifest)


def _save_aligned(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors whose bytes start at multiples of a cache line.

    All are bytes of whole lines, so they follow each other in line if the first one is; the header
    is filled up with metadata until it is.
    """
    for filling in range(ALIGNMENT):
        save_file(tensors, path, metadata={"fill": "." * filling} if filling else None)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if (8 + header) % ALIGNMENT == 0:
            return
    raise OSError(f"{path} cannot be aligned")


def _load(folder: Path, key: Mapping[str, Any]) -> PackedModel:
    manifest = _manifest(folder / _MANIFEST, key)
    if manifest["digest"] != _digest(manifest["model"]):
        raise ValueError(f"{_MANIFEST} was changed")
    for name in (_WEIGHTS, _TOKENIZER):
        _check(folder / name, manifest["files"][name])
    path = folder / _WEIGHTS
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = manifest["model"]
    decoder, spec = (decode(content[name], tensors) for name in ("decoder", "spec"))
    if not isinstance(decoder, Decoder) or not isinstance(spec, ModelSpec):
        raise ValueError(f"{_MANIFEST} holds no model")
    return PackedModel(
        decoder=decoder,
        spec=spec,
        weights=str(content["weights"]),
        digests={str(name): str(value) for name, value in content["digests"].items()},
        eos_token_ids=tuple(int(token) for token in content["eos_token_ids"]),
        receipt={str(name): float(value) for name, value in content["receipt"].items()},
        tokenizer=(
            (folder / _TOKENIZER).read_text(encoding="utf-8"),
            TokenizerFacts(**content["tokenizer"]),
        ),
    )


def _manifest(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was written for a key."""
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION or manifest["key"] != dict(key):
        raise ValueError("it was made for another version or model")
    return manifest


def _digest(content: Any) -> str:
    """Return a digest of facts, which JSON gives back as they were."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}


def _check(path: Path, known: Mapping[str, Any]) -> None:
    """Check a file; as with converted models, bytes are read where the time of change differs."""
    stat = path.stat()
    if stat.st_size != known["size"]:
        raise ValueError(f"{path.name} has {stat.st_size} bytes, not {known['size']}")
    if stat.st_mtime_ns != known["mtime_ns"] and sha256_file(path) != known["sha256"]:
        raise ValueError(f"{path.name} was changed")
