"""Opens a model: finds the runner that may run it, and everything the engine must know beside.

Knows: the order of folder, packed weights, load, probe and proof, and when the seam runs instead.
Does not know: requests or pools. A model whose packed weights are at hand needs neither
transformers' modelling code nor its own weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvloom.config import DType, KVDType, Quantization
from kvloom.model.checkpoint import Checkpoint, check_code, read_folder
from kvloom.model.convert import known_digests
from kvloom.model.digest import Progress
from kvloom.model.formats import FormatChoice, choose_formats
from kvloom.model.lean.cache import (
    PackedModel,
    load_packed,
    load_refusal,
    save_packed,
    save_refusal,
)
from kvloom.model.lean.explain import UnexplainedError
from kvloom.model.lean.native import NativeExecutor
from kvloom.model.lean.resident import make_resident
from kvloom.model.lean.runner import LeanRunner
from kvloom.model.load import LoadedModel, load_folder, prepare_folder
from kvloom.model.passport import (
    Formats,
    ModelDigests,
    Passport,
    digest_config,
    digest_files,
    make_passport,
)
from kvloom.model.source import ModelSource, resolve_source
from kvloom.model.tokenizer import FastTokenizer, TextTokenizer
from kvloom.ops.native.abi import ABI
from kvloom.ops.native.library import (
    CpuLevel,
    LibraryUnavailableError,
    NativeLibrary,
    load_library,
)
from kvloom.types import Forward, KVLayout, WeightFormat
from kvloom.version import __version__

logger = logging.getLogger(__name__)
_KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How a model is opened.

    Attributes:
        dtype: of weights and activations.
        quantization: of the weights; `auto` keeps what the file holds, None dequantises.
        kv_dtype: of keys and values.
        cpu_level: of the compiled library; None takes the best.
        trust_remote_code: run Python code that comes with the model.
        cache_dir: folder for conversions and packed weights.
        progress: is told about everything long.
    """

    dtype: DType = "auto"
    quantization: Quantization | None = "auto"
    kv_dtype: KVDType = "auto"
    cpu_level: CpuLevel | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model that is ready to run.

    Attributes:
        runner: runs rows.
        tokenizer: the model's own.
        path: folder that plain transformers loads as well.
        passport: digests and formats.
        kv_dtype: of the pools it works on.
        layout: of the pools it works on.
        runner_name: `seam`, or the lean runner's executor.
        runner_note: why the seam runs; empty for the lean runner.
    """

    runner: Forward
    tokenizer: TextTokenizer
    path: Path
    passport: Passport
    kv_dtype: torch.dtype
    layout: KVLayout
    runner_name: str
    runner_note: str


def open_model(model: str, options: OpenOptions) -> OpenedModel:
    """Open a model on the fastest runner that was proved for it.

    Raises:
        RequestError: settings contradict each other, or the CPU lacks the level asked for.
        ModelLoadError: the model's files are missing, damaged or refused.
        UnsupportedModelError: the probe could not reproduce the model's numbers.
    """
    source = resolve_source(model)
    folder = prepare_folder(
        source,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
        progress=options.progress,
    )
    checkpoint = read_folder(folder)
    choice = choose_formats(
        options.dtype,
        options.quantization,
        options.kv_dtype,
        stored=checkpoint.stored_dtype,
        is_gguf=source.kind == "gguf",
    )
    library, reason = _library(choice, options)
    if library is None or choice.weights is None:
        return _on_seam(source, checkpoint, choice, options, reason)
    try:
        packed = _packed(source, checkpoint, choice, library, options)
    except UnexplainedError as error:
        reason = f"the lean runner does not reproduce this model: {error}"
        logger.warning("%s; the seam runs it", reason)
        return _on_seam(source, checkpoint, choice, options, reason)
    return _on_lean(packed, folder, choice, library)


def _packed(
    source: ModelSource,
    checkpoint: Checkpoint,
    choice: FormatChoice,
    library: NativeLibrary,
    options: OpenOptions,
) -> PackedModel:
    """Return the packed model, from the cache folder or made now; the verdict is kept either way.

    Raises:
        UnexplainedError: the lean runner does not reproduce the seam, now or at an earlier start.
    """
    assert choice.weights is not None
    key = _key(checkpoint, choice, choice.weights, library, options)
    packed = load_packed(key, options.cache_dir)
    if packed is not None:
        return packed
    if refusal := load_refusal(key, options.cache_dir):
        raise UnexplainedError(refusal)
    from kvloom.model.lean.make import make_packed

    check_code(checkpoint, trust_remote_code=options.trust_remote_code)
    loaded = load_folder(source, checkpoint, dtype="float32", **_load_arguments(options))
    try:
        made = make_packed(loaded, choice, library, options.progress)
    except UnexplainedError as error:
        _keep_refusal(str(error), key, options.cache_dir)
        raise
    try:
        save_packed(made, key, options.cache_dir)
    except OSError as error:
        logger.warning("packed weights cannot be kept (%s): every start packs anew", error)
        return made
    return load_packed(key, options.cache_dir) or made


def _keep_refusal(reason: str, key: dict[str, Any], cache_dir: Path | None) -> None:
    try:
        save_refusal(reason, key, cache_dir)
    except OSError as error:
        logger.warning("the verdict cannot be kept (%s): every start tries the model anew", error)


def _library(choice: FormatChoice, options: OpenOptions) -> tuple[NativeLibrary | None, str]:
    """Return the compiled library, or why there is none; a level asked for must be had."""
    if choice.weights is None:
        return None, "float32 weights run on the seam, which is the reference"
    try:
        return load_library(options.cpu_level), ""
    except LibraryUnavailableError as error:
        if options.cpu_level is not None:
            raise
        logger.warning("%s The model runs on the seam, which is slower.", error)
        return None, str(error)


def _key(
    checkpoint: Checkpoint,
    choice: FormatChoice,
    weights: WeightFormat,
    library: NativeLibrary,
    options: OpenOptions,
) -> dict[str, Any]:
    """Return everything that a packed model and its verdict depend on."""
    files = digest_files(
        checkpoint.weights, known_digests(checkpoint.folder), options.cache_dir, options.progress
    )
    code = checkpoint.folder.glob("*.py") if options.trust_remote_code else ()
    return {
        "files": files,
        "config": digest_config(checkpoint.config, code),
        "weights": weights,
        "keep_codes": choice.keep_codes,
        "level": library.level,
        "abi": ABI,
        "kvloom": __version__,
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
    }


def _load_arguments(options: OpenOptions) -> dict[str, Any]:
    return {
        "cache_dir": options.cache_dir,
        "trust_remote_code": options.trust_remote_code,
        "progress": options.progress,
    }


def _on_lean(
    packed: PackedModel,
    folder: Path,
    choice: FormatChoice,
    library: NativeLibrary,
) -> OpenedModel:
    executor = NativeExecutor(make_resident(packed.decoder), library)
    text, facts = packed.tokenizer
    tokenizer = FastTokenizer.from_stored(text, facts, packed.eos_token_ids)
    digests = ModelDigests(packed.digests["weights"], packed.digests["config"], tokenizer.digest())
    coded = "int" in packed.weights
    activations = f"{'int8' if coded else 'bfloat16'} on {executor.name}"
    formats = Formats(packed.weights, activations, choice.kv)
    passport = make_passport(digests, packed.spec.layers, formats, packed.receipt)
    return OpenedModel(
        runner=LeanRunner(packed.spec, executor),
        tokenizer=tokenizer,
        path=folder,
        passport=passport,
        kv_dtype=_KV_DTYPES[choice.kv],
        layout=executor.layout,
        runner_name=f"lean, {executor.name}",
        runner_note="",
    )


def _on_seam(
    source: ModelSource,
    checkpoint: Checkpoint,
    choice: FormatChoice,
    options: OpenOptions,
    reason: str,
) -> OpenedModel:
    from kvloom.model.linears import pack_linears
    from kvloom.model.probe import probe

    check_code(checkpoint, trust_remote_code=options.trust_remote_code)
    loaded: LoadedModel = load_folder(
        source, checkpoint, dtype=choice.dtype, **_load_arguments(options)
    )
    runner = probe(loaded.model, max_positions=loaded.max_positions)
    pack_linears(loaded.model)
    name = str(loaded.dtype).removeprefix("torch.")
    kv_dtype = torch.int8 if choice.kv == "int8" else loaded.dtype
    formats = Formats(name, name, str(kv_dtype).removeprefix("torch."))
    passport = make_passport(loaded.digests, runner.spec.layers, formats)
    return OpenedModel(
        runner=runner,
        tokenizer=loaded.tokenizer,
        path=loaded.path,
        passport=passport,
        kv_dtype=kv_dtype,
        layout="plain",
        runner_name="seam",
        runner_note=reason,
    )
