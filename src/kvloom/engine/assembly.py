"""Assembly: from a model's name and settings to an engine that runs it.

Knows: the order of load, probe, passport, pool and engine.
Does not know: how requests reach the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from kvloom.config import DType, EngineConfig, KVDType, Quantization, parse_bytes
from kvloom.decode.detokenize import TextDecoder
from kvloom.engine.calibrate import cost_model
from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.shelving import StoreSettings, give_shelf, open_store
from kvloom.errors import RequestError
from kvloom.model.digest import Progress
from kvloom.model.open import OpenedModel, OpenOptions, open_model
from kvloom.model.passport import Passport
from kvloom.model.tokenizer import TextTokenizer
from kvloom.ops.native.heap import release_freed_memory
from kvloom.ops.native.library import CpuLevel
from kvloom.types import ModelSpec


class Settings(TypedDict, total=False):
    """Keyword arguments of `LLM` and `AsyncLLM`.

    Attributes:
        dtype: of weights and activations; `auto` takes what the weights are stored in, `float32`
            is the reference: no quantisation, and KV in float32.
        quantization: of the weights, `int8` or `int4`; `auto` keeps what the file holds, None
            dequantises.
        kv_dtype: of keys and values; `auto` is bfloat16, beside float32 weights float32. `int8`
            takes about half the bytes of bfloat16.
        cpu_level: of the compiled library; None takes the best.
        kv_memory: bytes of KV, as a number or a text such as `"2GiB"` (the default).
        max_model_len: tokens a document may grow to; None takes the model's own limit.
        enable_prefix_caching: reuse the KV of equal token prefixes; on by default.
        repair_when_idle: make documents that are not exact so while nothing else runs; on by
            default. Whoever compares approximations switches it off.
        step_tokens: rows one forward pass runs at most.
        max_running: sequences that run at once.
        max_waiting: requests that may wait.
        threads: CPU threads of torch; None leaves torch's own choice.
        trust_remote_code: run Python code that comes with the model; off by default.
        cache_dir: folder for conversions; None takes the user's cache folder.
        progress: is told about everything long, as (description, done, total).
        store: where KV outlives the process; None keeps it in memory only.
    """

    dtype: DType
    quantization: Quantization | None
    kv_dtype: KVDType
    cpu_level: CpuLevel | None
    kv_memory: int | str
    max_model_len: int | None
    enable_prefix_caching: bool
    repair_when_idle: bool
    step_tokens: int
    max_running: int
    max_waiting: int
    threads: int | None
    trust_remote_code: bool
    cache_dir: Path | None
    progress: Progress | None
    store: StoreSettings | None


@dataclass(frozen=True, slots=True)
class Assembly:
    """A model with its engine, ready to run.

    Attributes:
        engine: runs requests.
        opened: the model, with its runner.
        config: settings of the engine.
    """

    engine: Engine
    opened: OpenedModel
    config: EngineConfig

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's own."""
        return self.opened.tokenizer

    @property
    def model_path(self) -> Path:
        """Folder that plain transformers loads as well."""
        return self.opened.path

    @property
    def spec(self) -> ModelSpec:
        """What the probe found."""
        return self.opened.runner.spec

    @property
    def passport(self) -> Passport:
        """Digests and formats; its fingerprint starts every lineage."""
        return self.opened.passport


def assemble(model: str, settings: Settings) -> Assembly:
    """Load a model and build its engine.

    Raises:
        RequestError: a setting is out of range.
        ModelLoadError: the model's files are missing, damaged or refused.
        UnsupportedModelError: the probe could not reproduce the model's numbers.
        CapacityError: the KV memory holds nothing.
    """
    if unknown := sorted(settings.keys() - Settings.__annotations__.keys()):
        raise RequestError(
            f"{unknown[0]} is no setting; there are {', '.join(Settings.__annotations__)}.",
            param=unknown[0],
        )
    config = engine_config(settings)
    set_threads(settings.get("threads"))
    opened = open_model(
        model,
        OpenOptions(
            dtype=settings.get("dtype", "auto"),
            quantization=settings.get("quantization", "auto"),
            kv_dtype=settings.get("kv_dtype", "auto"),
            cpu_level=settings.get("cpu_level"),
            trust_remote_code=settings.get("trust_remote_code", False),
            cache_dir=settings.get("cache_dir"),
            progress=settings.get("progress"),
        ),
    )
    decoder = TextDecoder.probe(opened.tokenizer)
    fingerprint = opened.passport.fingerprint
    engine = Engine(opened.runner, decoder, config, fingerprint, opened.kv_dtype, opened.layout)
    engine.costs = cache(partial(cost_model, opened, settings.get("cache_dir")))
    store = settings.get("store")
    if store is not None:

        def text_of(tokens: Sequence[int]) -> str:
            return opened.tokenizer.decode(tokens, skip_special_tokens=False)

        give_shelf(engine, open_store(store, settings.get("cache_dir")), fingerprint, text_of)
    release_freed_memory()
    return Assembly(engine=engine, opened=opened, config=config)


def launch(
    build: Callable[[], Assembly], flush: Callable[[], Iterable[str]] | None = None
) -> tuple[Assembly, EngineLoop]:
    """Build an assembly on a thread of its own, which goes on as the loop of its engine.

    Args:
        build: makes the assembly; what it raises is raised here.
        flush: called after every step, as `EngineLoop` says.
    """
    made: list[Assembly] = []

    def build_engine() -> Engine:
        made.append(build())
        return made[0].engine

    loop = EngineLoop(build_engine, flush)
    return made[0], loop


def engine_config(settings: Settings) -> EngineConfig:
    """Return the engine's part of the settings.

    Raises:
        RequestError: a setting is out of range.
    """
    kv_memory_bytes = parse_bytes(settings.get("kv_memory", "2GiB"))
    total = psutil.virtual_memory().total
    if kv_memory_bytes > total:
        raise RequestError(
            f"kv_memory is {kv_memory_bytes} bytes, more than the {total} bytes of this machine; "
            "lower it.",
            param="kv_memory",
        )
    return EngineConfig(
        kv_memory_bytes=kv_memory_bytes,
        max_model_len=settings.get("max_model_len"),
        step_tokens=settings.get("step_tokens", 512),
        max_running=settings.get("max_running", 64),
        max_waiting=settings.get("max_waiting", 1024),
        enable_prefix_caching=settings.get("enable_prefix_caching", True),
        repair_when_idle=settings.get("repair_when_idle", True),
    )


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; this holds for the whole process.

    Raises:
        RequestError: the number is not positive, or above the cores that this process may use:
            threads wait for each other awake, so that a thread without a core stops all others.
    """
    if threads is None:
        return
    if not isinstance(threads, int) or threads < 1:
        raise RequestError(
            f"threads is {threads!r}; it must be an integer from 1.", param="threads"
        )
    cores = usable_cores()
    if threads > cores:
        raise RequestError(
            f"threads is {threads}, and this process may use {cores} cores; lower it.",
            param="threads",
        )
    torch.set_num_threads(threads)


def usable_cores() -> int:
    """Return how many logical cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
