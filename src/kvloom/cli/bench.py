"""`kvloom bench`: kvloom beside other engines on this machine.

Knows: which options a bench takes, and where its report goes.
Does not know: how anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.flatten import flatten
from kvloom.cli.progress import long_work
from kvloom.cli.settings import (
    DTypeOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    size,
)
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from kvloom.bench.results import SpeedOptions


def make_bench() -> typer.Typer:
    """Return the group of commands."""
    bench = typer.Typer(help="Measure kvloom beside other engines.", no_args_is_help=True)
    # A callback keeps `speed` a command of its own while it is the only one.
    bench.callback()(lambda: None)
    bench.command("speed")(flatten(speed))
    return bench


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedChoices:
    """What a speed bench measures."""

    peer: Annotated[
        list[str] | None,
        typer.Option(show_default="transformers", help="An engine beside kvloom; repeatable."),
    ] = None
    alone: Annotated[bool, typer.Option("--alone", help="Measure kvloom only.")] = False
    task: Annotated[
        list[str] | None,
        typer.Option(show_default="all", help="A task or family of tasks; repeatable."),
    ] = None
    rounds: Annotated[int, typer.Option(min=1, help="How often each task is measured.")] = 3
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works.")] = (
        False
    )
    dtype: DTypeOption = "float32"
    threads: ThreadsOption = None
    kv_memory: Annotated[
        int, typer.Option(parser=size, metavar="SIZE", show_default="512MiB", help="KV memory.")
    ] = 512 * 2**20
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a silent engine is given up.")
    ] = 1800.0

    def options(self, model: str) -> SpeedOptions:
        """Return the options of the bench.

        Raises:
            RequestError: a value is out of range.
            BadParameter: options contradict each other.
        """
        from kvloom.bench.results import SpeedOptions

        if self.alone and self.peer:
            raise typer.BadParameter("--alone and --peer exclude each other.")
        peers = () if self.alone else tuple(self.peer or ["transformers"])
        return SpeedOptions(
            model=model,
            peers=peers,
            dtype=self.dtype,
            rounds=self.rounds,
            tasks=tuple(self.task or ()),
            quick=self.quick,
            threads=self.threads,
            kv_memory=str(self.kv_memory),
            timeout_s=self.timeout,
        )


def speed(
    *,
    model: ModelOption = "default",
    choices: SpeedChoices,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A file that gets the report as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill, decoding, many prompts at once, and a shared prefix."""
    terminal = Terminal()
    options = choices.options(model)
    if output is not None and not output.resolve().parent.is_dir():
        raise typer.BadParameter(f"{output} cannot be written: its folder does not exist.")
    with long_work(terminal.messages, "Starting") as progress:
        from kvloom.bench.show import render, report_json
        from kvloom.bench.speed import run_speed

        report = run_speed(options, progress)
    if output is not None:
        output.write_text(report_json(report), encoding="utf-8")
    if as_json:
        terminal.results.print(report_json(report), end="", soft_wrap=True)
    else:
        terminal.results.print(render(report))
