"""Checks a model folder before anything is built from it.

Knows: config.json, safetensors headers and shard indexes, and what must be refused.
Does not know: how a model is built.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.errors import ModelLoadError, UnsupportedModelError
from kvloom.model.source import check_has_weights

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_CODES_PER_ELEMENT = 16  # 2-bit codes in 32-bit words


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that passed all checks.

    Attributes:
        folder: the folder.
        config: what its config.json holds.
        weights: the safetensors files that hold the model, sorted.
        stored_dtype: the dtype of most of the weights, as safetensors names it ("F32", "BF16").
    """

    folder: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    stored_dtype: str


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read config and headers of a folder; no weights are read and no code is run.

    Raises:
        ModelLoadError: files are missing or damaged, or the folder wants to run its own code.
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    checkpoint = read_folder(folder)
    check_code(checkpoint, trust_remote_code=trust_remote_code)
    return checkpoint


def read_folder(folder: Path) -> Checkpoint:
    """Read config and headers of a folder, without asking whether transformers may run it.

    Raises:
        ModelLoadError: files are missing or damaged.
    """
    check_has_weights(folder)
    config = _read_config(folder)
    weights = _weight_files(folder)
    measured = _measure(weights)
    _check_sizes(folder, config, measured)
    return Checkpoint(folder, config, weights, measured.stored_dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.parent} has no {path.name}; it is no whole model.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} is damaged: it must hold a JSON object.")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise ModelLoadError(
            f"{folder} is an adapter, not a model; merge it into its base model first "
            "(`merge_and_unload` in PEFT) and save that."
        )
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelLoadError(f"{folder / 'config.json'} names no model_type; it is no whole model.")
    return config


def check_code(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Refuse a model that only its own code can run, and kernels fetched from elsewhere.

    Raises:
        ModelLoadError: the folder wants to run its own code.
        UnsupportedModelError: transformers has no causal language model of that type.
    """
    folder, config = checkpoint.folder, checkpoint.config
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if trust_remote_code:
        return
    kernel = config.get("attn_implementation") or config.get("_attn_implementation")
    if isinstance(kernel, str) and "/" in kernel:
        raise ModelLoadError(
            f"{folder.name} wants to run the attention code {kernel}, which is not part of it; "
            "pass trust_remote_code=True if you trust it."
        )
    model_type = config["model_type"]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if config.get("auto_map"):
        raise ModelLoadError(
            f"{folder.name} can only be run by Python code that comes with it; read that code, "
            "and pass trust_remote_code=True if you trust it."
        )
    if model_type in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder.name} is of type {model_type}, which is no causal language model."
        )
    raise UnsupportedModelError(
        f"{folder.name} is of type {model_type!r}, which this version of transformers does not "
        "know; a newer version may."
    )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / _SINGLE).exists():
        return (folder / _SINGLE,)
    if not (folder / _INDEX).exists():
        names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        raise ModelLoadError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}, but {names}; "
            "save the model with `save_pretrained`."
        )
    shards = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"{folder / _INDEX} is damaged: it has no weight_map.")
    files = []
    for name in sorted({str(shard) for shard in shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelLoadError(
                f"{folder / _INDEX} names {name!r}, which is no file of the folder."
            )
        if not (folder / name).exists():
            raise ModelLoadError(f"{folder} lacks {name}; download it again.")
        files.append(folder / name)
    return tuple(files)


@dataclass(frozen=True, slots=True)
class _Measured:
    stored_dtype: str
    num_tensors: int
    largest_size: int


def _measure(weights: tuple[Path, ...]) -> _Measured:
    """Open every file, which checks its header and length."""
    from safetensors import SafetensorError, safe_open

    numel_by_dtype: dict[str, int] = {}
    num_tensors, largest_size = 0, 0
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file object is no mapping
                    tensor = file.get_slice(name)
                    dtype, shape = tensor.get_dtype(), tensor.get_shape()
                    numel_by_dtype[dtype] = numel_by_dtype.get(dtype, 0) + math.prod(shape)
                    largest_size = max(largest_size, *shape, 1)
                    num_tensors += 1
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelLoadError(
                f"{path.name} is no whole safetensors file: {error}; download it again."
            ) from error
    if not num_tensors:
        raise ModelLoadError(f"{weights[0].parent} holds safetensors files without any tensor.")
    stored_dtype = max(numel_by_dtype, key=lambda dtype: numel_by_dtype[dtype])
    return _Measured(stored_dtype, num_tensors, largest_size)


def _check_sizes(folder: Path, config: dict[str, Any], measured: _Measured) -> None:
    """Refuse sizes that no tensor has: they would fill the memory before loading fails."""
    packed = 1 if measured.stored_dtype in _PLAIN_DTYPES else _MAX_CODES_PER_ELEMENT
    limits = {
        "num_hidden_layers": measured.num_tensors,
        "hidden_size": measured.largest_size * packed,
        # Mixtures of experts carry this one even where no layer uses it.
        "intermediate_size": max(measured.largest_size * packed, 2**17),
        "vocab_size": measured.largest_size * packed,
    }
    for holder in (config, config.get("text_config")):
        for key, limit in limits.items():
            stated = holder.get(key) if isinstance(holder, dict) else None
            if isinstance(stated, int) and stated > limit:
                raise ModelLoadError(
                    f"{folder / 'config.json'} states {key} = {stated}, which the weights belie; "
                    "config and weights do not belong together."
                )
