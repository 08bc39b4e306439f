"""`kvloom bench`: which engine is fastest on this machine, and the other benches.

Knows: options, the bar with the time left, and where the report goes.
Does not know: how speed is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.bench_cases import INTERRUPTED
from kvloom.cli.bench_chain import chain
from kvloom.cli.bench_edit import edit
from kvloom.cli.bench_options import check_files, chosen_formats
from kvloom.cli.bench_reuse import reuse
from kvloom.cli.flatten import flatten
from kvloom.cli.peers import make_peers
from kvloom.cli.progress import PlainLines
from kvloom.cli.settings import KVDTypeOption, ModelOption, QuantizationOption, size
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from kvloom.bench.peers.wire import Progress
    from kvloom.bench.results import SpeedOptions


def make_bench() -> typer.Typer:
    """Return the group of commands."""
    bench = typer.Typer(
        help="Measure speed, and the price of edits and joins.", no_args_is_help=True
    )
    bench.command("speed")(flatten(speed))
    bench.command("edit")(flatten(edit))
    bench.command("chain")(flatten(chain))
    bench.command("reuse")(flatten(reuse))
    bench.add_typer(make_peers(), name="peers")
    return bench


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the bench runs, and beside what."""

    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            "--peer",
            metavar="NAMES",
            show_default="transformers",
            help="Engines beside kvloom, with commas; `kvloom bench peers list` names them.",
        ),
    ] = ""
    alone: Annotated[bool, typer.Option("--alone", help="Measure kvloom without peers.")] = False
    model: ModelOption = "default"
    dtype: Annotated[
        str,
        typer.Option(
            help="Of engines without a format of their own: float32, bfloat16, or auto for "
            "kvloom's choice."
        ),
    ] = "auto"
    quantization: QuantizationOption = "auto"
    kv_dtype: KVDTypeOption = "auto"
    rounds: Annotated[int, typer.Option(help="Measured rounds; one more warms up.")] = 3
    tasks: Annotated[
        str,
        typer.Option(
            show_default="all",
            help="Tasks or families, with commas: prefill-512,decode,batch,shared,edit,restart.",
        ),
    ] = ""
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: shows that it works, not the speed.")
    ] = False
    threads: Annotated[
        int | None, typer.Option(show_default="all cores", help="CPU threads of every engine.")
    ] = None
    kv_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="KV memory of engines that reserve it.")
    ] = "512MiB"
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 1800.0

    def speed_options(self) -> SpeedOptions:
        """Return what is measured.

        Raises:
            RequestError: a value is out of range.
            BadParameter: options contradict each other, or a size is none.
        """
        from kvloom.bench.results import SpeedOptions

        if self.alone and self.peers:
            raise typer.BadParameter("--alone and --peers contradict each other; leave one out.")
        size(self.kv_memory)
        return SpeedOptions(
            model=self.model,
            peers=() if self.alone else _names(self.peers) or ("transformers",),
            dtype=self.dtype,
            rounds=self.rounds,
            tasks=_names(self.tasks),
            quick=self.quick,
            threads=self.threads,
            kv_memory=self.kv_memory,
            timeout_s=self.timeout,
            settings=chosen_formats(self.quantization, self.kv_dtype),
        )


def speed(
    *,
    run: RunOptions,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the whole report to this file."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw bars into this .svg or .png file."),
    ] = None,
) -> None:
    """Time prefill, decode, many prompts, shared prefixes, edits and restarts, in rounds."""
    check_files(json_file, picture)
    options = run.speed_options()
    terminal = Terminal()
    with _time_left(terminal.messages) as progress:
        from kvloom.bench.speed import run_speed

        report = run_speed(options, progress)

    from kvloom.bench.show import render, report_json

    if json_file is not None:
        json_file.write_text(report_json(report), encoding="utf-8")
    terminal.results.print(render(report))
    if picture is not None:
        from kvloom.bench.picture import draw

        draw(report, picture)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(result.measurements[0].failure for result in report.results):
        raise typer.Exit(1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextmanager
def _time_left(console: Console) -> Iterator[Progress]:
    """Show one bar with the time left; another total begins it anew."""
    if not console.is_interactive:
        yield PlainLines(console.print)
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # The time left is taken from the whole run so far: tasks differ too much for a short window.
    with progress.Progress(
        *columns, console=console, transient=True, speed_estimate_period=3600
    ) as shown:
        bar = shown.add_task("Starting", total=None)
        last_total = 0

        def tell(description: str, done: int, total: int) -> None:
            nonlocal last_total
            if total != last_total:
                shown.reset(bar, total=total or None)
                last_total = total
            shown.update(bar, description=description, completed=done)

        yield tell
