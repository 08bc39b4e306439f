"""What the benches of approximations have in common: the model, the files and the run.

Knows: options, and how a report is kept while it grows.
Does not know: what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvloom.cli.bench_options import check_files, chosen_formats
from kvloom.cli.progress import long_work
from kvloom.cli.settings import (
    DTypeOption,
    KVDTypeOption,
    ModelOption,
    QuantizationOption,
    ThreadsOption,
    size,
)
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from kvloom import LLM
    from kvloom.bench.case_results import CaseOptions, R
    from kvloom.bench.case_run import Running
    from kvloom.bench.case_show import Presentation

INTERRUPTED = 130  # what a shell says of a program that an interrupt ended
APPROXIMATIONS_STAY: Mapping[str, bool] = MappingProxyType(
    {"enable_prefix_caching": False, "repair_when_idle": False}
)
"""Exact documents would answer for the equal text of approximate ones, or these become exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The model, and what it runs with."""

    model: ModelOption = "default"
    dtype: DTypeOption = "auto"
    quantization: QuantizationOption = "auto"
    kv_dtype: KVDTypeOption = "auto"
    threads: ThreadsOption = None
    kv_memory: Annotated[
        int,
        typer.Option(
            parser=size, metavar="SIZE", show_default="2GiB", help="KV memory, such as 512MiB."
        ),
    ] = 2 * 2**30

    def settings(self) -> dict[str, Any]:
        """Return keyword arguments of `LLM`."""
        settings: dict[str, Any] = {"dtype": self.dtype, "kv_memory": self.kv_memory}
        settings |= chosen_formats(self.quantization, self.kv_dtype)
        if self.threads is not None:
            settings["threads"] = self.threads
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Where the report goes."""

    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            help="Keep the report in this file; what it holds already is not measured again.",
        ),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw error against cost into this .svg or .png file."),
    ] = None

    def check(self) -> None:
        """Make sure, before minutes of work, that the report can be written after it.

        Raises:
            BadParameter: a folder does not exist.
            RequestError: no picture of that kind can be drawn.
        """
        check_files(self.json_file, self.picture)


def read_shares(text: str) -> tuple[float, ...]:
    """Return numbers with commas between them.

    Raises:
        BadParameter: one is no number.
    """
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--shares: {error}; give 0.05,0.15 or the like.") from error


def run_bench(
    presentation: Presentation[R],
    options: CaseOptions,
    limit: int,
    files: FileOptions,
    run: Callable[[Callable[..., LLM], Running[R]], R],
) -> None:
    """Run a bench, keep its report while it grows, then show it.

    Args:
        presentation: of the report.
        options: what is measured.
        limit: cases in all.
        files: where the report goes.
        run: is told how to open the model, and further keyword arguments of it may be given.

    Raises:
        RequestError: the file holds another report, or there is nothing to measure.
        Exit: the run was interrupted.
    """
    from kvloom.bench.case_results import load, save

    terminal, file = Terminal(), files.json_file
    earlier = load(file, presentation.kind) if file is not None and file.exists() else None
    if earlier is not None:
        terminal.messages.print(f"{len(earlier.results)} {earlier.noun} are in {file} already.")

    def keep(report: R) -> None:
        if file is not None:
            save(presentation.json(report), file)

    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom import LLM
        from kvloom.bench.case_run import Running

        settings = {**options.settings, **APPROXIMATIONS_STAY, "progress": progress}
        report = run(
            partial(LLM, options.model, **settings),
            Running(limit=limit, earlier=earlier, keep=keep, progress=progress),
        )
    terminal.results.print(presentation.render(report))
    if files.picture is not None:
        presentation.draw(report, files.picture)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
