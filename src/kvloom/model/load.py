"""Loads weights, tokenizer and digests of a model from its source.

Knows: how a source becomes a folder, and how transformers builds a model from it.
Does not know: attention, rotary positions or KV memory; the probe finds those out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.config import DType
from kvloom.errors import KvloomError, ModelLoadError
from kvloom.model.checkpoint import Checkpoint, check_folder
from kvloom.model.convert import convert_gguf, known_digests
from kvloom.model.digest import Progress
from kvloom.model.download import download
from kvloom.model.passport import ModelDigests, digest_config, digest_files
from kvloom.model.quiet import quiet_transformers
from kvloom.model.source import ModelSource
from kvloom.model.tokenizer import FastTokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

_log = logging.getLogger(__name__)
# Other stored formats (8 and 4 bits) are for transformers to unpack into what the config names.
_TORCH_NAMES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_FALLBACK_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenizer: the model's own.
        source: what the user named.
        path: the folder it was loaded from, which plain transformers loads too.
        digests: of weights, config and tokenizer, for the passport.
        max_positions: positions the model was made for.
    """

    model: nn.Module
    tokenizer: FastTokenizer
    source: ModelSource
    path: Path
    digests: ModelDigests
    max_positions: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return next(parameter.dtype for parameter in self.model.parameters())


def load_model(
    source: ModelSource,
    *,
    dtype: DType = "auto",
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model; a GGUF file is converted first, a hub model downloaded.

    Args:
        source: what `resolve_source` returned.
        dtype: of weights and activations; `auto` takes what the weights are stored in.
        cache_dir: folder for conversions and digests; None takes the user's cache folder.
        trust_remote_code: run Python code that comes with the model.
        progress: is told about everything that takes longer than a moment.

    Raises:
        ModelLoadError: files are missing, damaged or refused.
        UnsupportedModelError: transformers has no causal language model for it.
    """
    folder = prepare_folder(
        source, cache_dir=cache_dir, trust_remote_code=trust_remote_code, progress=progress
    )
    checkpoint = check_folder(folder, trust_remote_code=trust_remote_code)
    return load_folder(
        source,
        checkpoint,
        dtype=dtype,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def load_folder(
    source: ModelSource,
    checkpoint: Checkpoint,
    *,
    dtype: DType = "auto",
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model from a folder that passed its checks; arguments as for `load_model`.

    Raises:
        ModelLoadError: files are damaged.
    """
    folder = checkpoint.folder
    model = _build(checkpoint, dtype, trust_remote_code, progress)
    tokenizer = load_tokenizer(folder, _eos_token_ids(model), trust_remote_code=trust_remote_code)
    code = folder.glob("*.py") if trust_remote_code else ()
    digests = ModelDigests(
        weights=digest_files(checkpoint.weights, known_digests(folder), cache_dir, progress),
        config=digest_config(checkpoint.config, code),
        tokenizer=tokenizer.digest(),
    )
    return LoadedModel(model, tokenizer, source, folder, digests, _max_positions(model.config))


def prepare_folder(
    source: ModelSource,
    *,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the local folder of a source, converting or downloading it if needed.

    Raises:
        ModelLoadError: it cannot be had.
    """
    if source.kind == "gguf":
        return convert_gguf(source, cache_dir=cache_dir, progress=progress)
    if source.kind == "hub":
        return download(source, with_code=trust_remote_code, progress=progress)
    assert source.path is not None
    return source.path


def _build(
    checkpoint: Checkpoint, dtype: DType, trust_remote_code: bool, progress: Progress | None
) -> Any:
    """Build the model; every weight must come from the files, and every weight must be finite."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    stored = _TORCH_NAMES.get(checkpoint.stored_dtype, "auto")
    try:
        with quiet_transformers(progress, "Loading weights"):
            model, loaded = auto.from_pretrained(
                checkpoint.folder,
                dtype=stored if dtype == "auto" else dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # so that they are named, and refused below
                output_loading_info=True,
            )
    except (KvloomError, MemoryError):
        raise
    except Exception as error:  # a config may ask for anything, and fails as variously
        raise ModelLoadError(
            f"{checkpoint.folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    _check_complete(checkpoint.folder, loaded)
    _check_finite(checkpoint.folder, model)
    return model.eval().requires_grad_(False)


def _check_complete(folder: Path, loaded: dict[str, Any]) -> None:
    """Refuse what transformers only warns about: weights left at random, ignored or cut."""
    problems = {
        "lack": sorted(loaded["missing_keys"]),
        "hold weights that the config has no place for:": sorted(loaded["unexpected_keys"]),
        "hold weights of another shape than the config says:": sorted(
            str(key[0]) if isinstance(key, tuple) else str(key) for key in loaded["mismatched_keys"]
        ),
    }
    for problem, keys in problems.items():
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ModelLoadError(
                f"the weights in {folder} {problem} {shown}; config and weights do not belong "
                "together, or a file is incomplete."
            )
    if loaded.get("error_msgs"):
        raise ModelLoadError(f"{folder} cannot be loaded: {loaded['error_msgs'][0]}")


def _check_finite(folder: Path, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ModelLoadError(
                f"{name} in {folder} holds NaN or infinite values; the file is damaged."
            )


def _eos_token_ids(model: Any) -> set[int]:
    for holder in (getattr(model, "generation_config", None), model.config):
        eos = getattr(holder, "eos_token_id", None)
        if eos is not None:
            return set(eos) if isinstance(eos, list | tuple) else {int(eos)}
    return set()


def _max_positions(config: Any) -> int:
    text_config = config.get_text_config(decoder=True)
    for name in _LENGTH_NAMES:
        length = getattr(text_config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    _log.warning(
        "the config of %s states no length; %d positions are assumed",
        text_config.model_type,
        _FALLBACK_POSITIONS,
    )
    return _FALLBACK_POSITIONS
