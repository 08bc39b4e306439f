"""Reads a GGUF file with transformers and writes it out as dequantised safetensors.

Knows: how transformers reads GGUF, and what of a file it leaves unread.
Does not know: where the result is kept, or when to make it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kvloom.errors import KvloomError, ModelLoadError
from kvloom.model.digest import Progress
from kvloom.model.quiet import quiet_transformers


def read_gguf(gguf: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write config, tokenizer, chat template and fp32 weights of a GGUF file into a folder.

    Raises:
        ModelLoadError: the file is damaged, or transformers cannot read it.
        OSError: the folder cannot be written.
    """
    try:
        tokenizer = _read_tokenizer(gguf, progress)
        model = _read_model(gguf, progress)
    except (KvloomError, MemoryError):
        raise
    except Exception as error:  # the readers raise whatever a broken byte leads to
        raise ModelLoadError(
            f"{gguf.name} cannot be read as GGUF: {type(error).__name__}: {error}; "
            "the file is damaged or of a kind that transformers does not read."
        ) from error
    _check_room(model, folder)
    with quiet_transformers(progress, "Writing weights"):
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, safe_serialization=True)


def _read_tokenizer(gguf: Path, progress: Progress | None) -> Any:
    from transformers import AutoTokenizer

    if progress is not None:
        progress("Reading the tokenizer", 0, 1)
    with quiet_transformers(None, "Reading the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
    if progress is not None:
        progress("Reading the tokenizer", 1, 1)
    return tokenizer


def _read_model(gguf: Path, progress: Progress | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with quiet_transformers(progress, "Dequantising weights"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{gguf.name} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}); "
            "the file is incomplete; download it again."
        )
    # transformers refuses to save a model whose config still says that it is quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _check_room(model: Any, folder: Path) -> None:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelLoadError(
            f"the dequantised weights need {needed / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB left; make room or choose another cache folder."
        )
