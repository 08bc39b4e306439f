"""What a speed bench found out, as plain data.

Knows: the shape of options, samples, measurements and the report, and of its JSON.
Does not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvloom import RequestError
from kvloom.bench.tasks import Task

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """What is measured.

    Attributes:
        model: a folder, hub id, GGUF file or "default".
        peers: engines beside kvloom.
        dtype: of weights, activations and KV in kvloom and the peers that have no format of their
            own; "auto" is the one kvloom chooses for the model.
        rounds: how often each task is measured; one more round warms up.
        tasks: names or families of tasks; none measures all.
        quick: sizes that run in seconds and say nothing about speed.
        threads: CPU threads, the same for all engines; None is what kvloom chooses.
        kv_memory: for engines that reserve KV memory.
        timeout_s: seconds after which a worker that does not answer is given up.
        settings: further keyword arguments of kvloom's `LLM`.

    Raises:
        RequestError: a value is out of range.
    """

    model: str = "default"
    peers: tuple[str, ...] = ("transformers",)
    dtype: str = "auto"
    rounds: int = 3
    tasks: tuple[str, ...] = ()
    quick: bool = False
    threads: int | None = None
    kv_memory: str = "512MiB"
    timeout_s: float = 1800.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RequestError(
                f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.", param="dtype"
            )
        if self.rounds < 1:
            raise RequestError(f"rounds is {self.rounds}; it must be at least 1.", param="rounds")
        if self.threads is not None and self.threads < 1:
            raise RequestError(
                f"threads is {self.threads}; it must be at least 1.", param="threads"
            )
        if not self.timeout_s > 0:
            raise RequestError(
                f"timeout_s is {self.timeout_s}; it must be above 0.", param="timeout_s"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it was measured.

    Attributes:
        cpu: the processor's name.
        physical_cores: None if the system does not say.
        logical_cores: None if the system does not say.
        memory_bytes: of the machine.
        platform: operating system and architecture.
        python: version.
    """

    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    memory_bytes: int
    platform: str
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One task, run once.

    Attributes:
        prompt_tokens: over all prompts.
        new_tokens: over all prompts.
        first_token_s: seconds until the first token.
        total_s: seconds until the last token.
        cached_tokens: prompt tokens whose KV was reused; None if the engine does not say.
        other_cores: cores that other processes kept busy meanwhile; None if it was too short.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    cached_tokens: int | None = None
    other_cores: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One task on one engine.

    Attributes:
        engine: its name.
        samples: one per round; none if it failed, or cannot do such a thing.
        failure: why there are no samples; None if it cannot do such a thing.
        equal_tokens: generated tokens before the first one that differs from kvloom's exact ones.
        compared_tokens: generated tokens that were compared with these.
    """

    engine: str
    samples: tuple[Sample, ...] = ()
    failure: str | None = None
    equal_tokens: int = 0
    compared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task on all engines, kvloom first."""

    task: Task
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """One engine over all tasks.

    Attributes:
        name: of the engine.
        versions: of the engine and of what decides its speed.
        dtype: what it computed with, in its own words.
        format: the format that is its own, whatever the others compute in; None if it has none.
        threads: CPU threads it used.
        ready_s: seconds from the start of its process until it was ready.
        ready_rss_bytes: memory when it was ready.
        peak_rss_bytes: most memory it ever had.
        failure: why it did not start, or why it ended early.
    """

    name: str
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    format: str | None = None
    threads: int | None = None
    ready_s: float | None = None
    ready_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """When and where a bench ran.

    Attributes:
        started_at: ISO 8601 with the time zone; of the first run where several are one report.
        duration_s: in all.
        machine: where it ran last.
    """

    started_at: str
    duration_s: float
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedReport(RunReport):
    """Everything one run found out.

    Attributes:
        options: what was asked for.
        model_path: the folder that all engines loaded, or converted from.
        other_cores: cores that other processes kept busy before the start.
        engines: kvloom first.
        results: one per task.
        interrupted: whether the user ended the run early; rounds and tasks are then missing.
    """

    options: SpeedOptions
    model_path: str
    other_cores: float
    engines: tuple[EngineReport, ...]
    results: tuple[TaskResult, ...]
    interrupted: bool = False
