"""The passport of a loaded model: digests of everything that decides what its KV holds.

Knows: which facts change KV and which do not, and how they become one fingerprint.
Does not know: documents, or the lineage that starts at the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from kvloom.model.digest import Progress, cached_sha256
from kvloom.types import LayerSpec
from kvloom.version import __version__

CACHE_FORMAT_VERSION = 1
# Keys of config.json that say who wrote it, not what the model computes.
_PROVENANCE_KEYS = frozenset({"_name_or_path", "_model_name_or_path", "transformers_version"})


@dataclass(frozen=True, slots=True)
class Formats:
    """The number formats that are computed with.

    Attributes:
        weights: of the weights, such as "float32".
        activations: of the hidden states.
        kv: of keys and values.
    """

    weights: str
    activations: str
    kv: str


@dataclass(frozen=True, slots=True)
class Passport:
    """Digests and formats under which a model computes.

    Attributes:
        weights: SHA-256 over the digests of the weight files.
        config: SHA-256 of the config, and of the model's own code if it runs.
        tokenizer: SHA-256 of everything that turns text into tokens.
        rope: SHA-256 of what the probe found out about the attention layers.
        formats: number formats computed with.
        cache_format_version: version of the layout of KV memory.
        versions: of kvloom, transformers and torch; shown, but no part of the fingerprint.
        receipt: measured differences to the model's own weights in fp32; only shown.
    """

    weights: str
    config: str
    tokenizer: str
    rope: str
    formats: Formats
    cache_format_version: int = CACHE_FORMAT_VERSION
    versions: Mapping[str, str] = field(default_factory=dict)
    receipt: Mapping[str, float] = field(default_factory=dict)

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that are equal only where the same tokens give the same KV."""
        content = _canonical(self._identity())
        return hashlib.blake2b(content, digest_size=32, person=b"kvloom-passport").digest()

    def as_dict(self) -> dict[str, Any]:
        """Return the passport as plain data, for people and for JSON."""
        shown: dict[str, Any] = {
            "fingerprint": self.fingerprint.hex(),
            "versions": dict(self.versions),
        }
        shown["receipt"] = dict(self.receipt)
        return self._identity() | shown

    def _identity(self) -> dict[str, Any]:
        content = asdict(self)
        del content["versions"], content["receipt"]
        return content


@dataclass(frozen=True, slots=True)
class ModelDigests:
    """What can be said about a model from its files alone.

    Attributes:
        weights: SHA-256 over the digests of the weight files.
        config: SHA-256 of the config, and of the model's own code if it runs.
        tokenizer: SHA-256 of everything that turns text into tokens.
    """

    weights: str
    config: str
    tokenizer: str


def digest_files(
    weights: Iterable[Path],
    known: Mapping[str, str],
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> str:
    """Return one SHA-256 for several files; digests of unchanged files are not computed again.

    Args:
        weights: the files.
        known: digests by file name that need no reading, from a converted folder's manifest.
        cache_dir: folder that remembers digests; None takes the user's cache folder.
        progress: is told about the bytes read.
    """
    digests = [
        [path.name, known.get(path.name) or cached_sha256(path, cache_dir, progress)]
        for path in sorted(weights)
    ]
    return hashlib.sha256(_canonical(digests)).hexdigest()


def digest_config(config: Mapping[str, Any], code: Iterable[Path] = ()) -> str:
    """Return the SHA-256 of a config.json's content and of Python files that run with the model."""
    facts = {key: value for key, value in config.items() if key not in _PROVENANCE_KEYS}
    files = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sorted(code)]
    return hashlib.sha256(_canonical([facts, files])).hexdigest()


def digest_layers(layers: Sequence[LayerSpec]) -> str:
    """Return the SHA-256 of rotary tables, windows and shapes, exact to the last bit."""
    return hashlib.sha256(_canonical([asdict(layer) for layer in layers])).hexdigest()


def make_passport(
    digests: ModelDigests,
    layers: Sequence[LayerSpec],
    formats: Formats,
    receipt: Mapping[str, float] | None = None,
) -> Passport:
    """Return the passport of a model, once the probe has described its layers."""
    return Passport(
        weights=digests.weights,
        config=digests.config,
        tokenizer=digests.tokenizer,
        rope=digest_layers(layers),
        formats=formats,
        versions={
            "kvloom": __version__,
            "transformers": metadata.version("transformers"),
            "torch": metadata.version("torch"),
        },
        receipt=receipt or {},
    )


def _canonical(content: Any) -> bytes:
    """Return the same bytes for equal data; JSON writes floats so that they read back exactly."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
