"""Loads weights, tokenizer and facts of a model from a folder of safetensors.

Knows: what a whole folder looks like, and how transformers builds a model from it.
Does not know: attention, rotary positions or KV memory; the probe finds those out.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.config import DType
from kvloom.errors import KvloomError, ModelLoadError, UnsupportedModelError
from kvloom.model.convert import convert_gguf
from kvloom.model.digest import Progress
from kvloom.model.quiet import quiet_transformers
from kvloom.model.source import ModelSource, check_has_weights
from kvloom.model.tokenizer import FastTokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenizer: the model's own.
        source: what the user named.
        path: the folder it was loaded from, which plain transformers loads too.
        dtype: of weights and activations.
        max_positions: positions the model was made for.
    """

    model: nn.Module
    tokenizer: FastTokenizer
    source: ModelSource
    path: Path
    dtype: torch.dtype
    max_positions: int


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
        cache_dir: folder for conversions; None takes the user's cache folder.
        trust_remote_code: run Python code that comes with the model.
        progress: is told about everything that takes longer than a moment.

    Raises:
        ModelLoadError: files are missing, damaged or refused.
        UnsupportedModelError: transformers has no causal language model for it.
    """
    folder = prepare_folder(source, cache_dir=cache_dir, progress=progress)
    check_has_weights(folder)
    model = _build(folder, dtype, trust_remote_code, progress)
    eos = _eos_token_ids(model)
    tokenizer = load_tokenizer(folder, eos, trust_remote_code=trust_remote_code)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=source,
        path=folder,
        dtype=model.dtype,
        max_positions=_max_positions(model.config),
    )


def prepare_folder(
    source: ModelSource, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the local folder of a source, converting or downloading it if needed.

    Raises:
        ModelLoadError: it cannot be had.
    """
    if source.kind == "gguf":
        return convert_gguf(source, cache_dir=cache_dir, progress=progress)
    assert source.path is not None
    return source.path


def _build(folder: Path, dtype: DType, trust_remote_code: bool, progress: Progress | None) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers(progress, "Loading weights"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    return model.eval().requires_grad_(False)


def _eos_token_ids(model: Any) -> set[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {eos}


def _max_positions(config: Any) -> int:
    return int(config.get_text_config(decoder=True).max_position_embeddings)
