"""`kvloom bench edit`: what an approximate edit costs, and what it gets wrong.

Knows: options, where edits come from if nobody says, and where the report goes.
Does not know: how edits are measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    from kvloom.bench.edit_results import EditOptions, EditReport
    from kvloom.bench.edit_source import Source

_INTERRUPTED = 130  # what a shell says of a program that an interrupt ended


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """Where the edits come from."""

    repo: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            show_default="the checkout around the current folder",
            help="A git repository: its commits' changes of text files.",
        ),
    ] = None
    edits: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, exists=True, help="A file of JSON lines with `before` and `after`."
        ),
    ] = None
    rename: Annotated[
        bool,
        typer.Option("--rename", help="Names of the standard library, renamed before their use."),
    ] = False

    def source(self) -> Source:
        """Return the edits.

        Raises:
            RequestError: git fails.
            BadParameter: options contradict each other.
        """
        from kvloom.bench.edit_made import library_edits, rename_edits
        from kvloom.bench.edit_source import Source, checkout_around, git_edits, read_edits

        if sum((self.repo is not None, self.edits is not None, self.rename)) > 1:
            raise typer.BadParameter(
                "--repo, --edits and --rename contradict each other; give one."
            )
        if self.edits is not None:
            return Source(self.edits.name, read_edits(self.edits))
        if self.rename:
            return Source("renamed names of the standard library", rename_edits())
        repository = self.repo or checkout_around(Path.cwd())
        if repository is None:
            return Source("made edits of the standard library", library_edits())
        return Source(f"commits of {repository.resolve().name}", git_edits(repository))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """What is measured of every edit."""

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
    behind: Annotated[
        int, typer.Option(help="Unchanged tokens between the last change and what is scored.")
    ] = 20
    scored: Annotated[int, typer.Option(help="Tokens that are scored.")] = 24
    context: Annotated[
        int, typer.Option(help="Tokens of a document at most; the start of longer files is cut.")
    ] = 4000
    shares: Annotated[
        str,
        typer.Option(help="Shares of the stale rows that are computed again, with commas."),
    ] = "0.05,0.15,0.3"

    def options(self) -> EditOptions:
        """Return what is measured.

        Raises:
            RequestError: a value is out of range.
            BadParameter: a share is no number.
        """
        from kvloom.bench.edit_places import PlaceRule
        from kvloom.bench.edit_results import EditOptions

        try:
            shares = tuple(float(share) for share in self.shares.split(","))
        except ValueError as error:
            raise typer.BadParameter(f"--shares: {error}; give 0.05,0.15 or the like.") from error
        settings: dict[str, Any] = {"dtype": self.dtype, "kv_memory": self.kv_memory}
        settings |= chosen_formats(self.quantization, self.kv_dtype)
        if self.threads is not None:
            settings["threads"] = self.threads
        return EditOptions(
            model=self.model,
            places=PlaceRule(self.behind, self.scored, self.context),
            shares=shares,
            settings=settings,
        )


def edit(
    *,
    where: SourceOptions,
    what: MeasureOptions,
    limit: Annotated[int, typer.Option(min=1, help="Edits in all.")] = 150,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            dir_okay=False,
            help="Keep the report in this file; what it holds already is not measured again.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Draw error against cost into this .svg or .png file."),
    ] = None,
) -> None:
    """Measure edits done exactly, repaired, shifted and worse: time, rows and the error made."""
    check_files(json_file, picture)
    source, options = where.source(), what.options()
    terminal = Terminal()
    report = _run(source, options, limit, json_file, terminal)

    from kvloom.bench.edit_show import render

    terminal.results.print(render(report))
    if picture is not None:
        from kvloom.bench.edit_picture import draw

        draw(report, picture)
    if report.interrupted:
        raise typer.Exit(_INTERRUPTED)


def _run(
    source: Source, options: EditOptions, limit: int, json_file: Path | None, terminal: Terminal
) -> EditReport:
    from kvloom.bench.edit_results import load, save
    from kvloom.bench.edit_show import report_json

    earlier = load(json_file) if json_file is not None and json_file.exists() else None
    if earlier is not None:
        terminal.messages.print(f"{len(earlier.results)} edits are in {json_file} already.")

    def keep(report: EditReport) -> None:
        if json_file is not None:
            save(report_json(report), json_file)

    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom import LLM
        from kvloom.bench.edit_run import run_edits

        settings: dict[str, Any] = {**options.settings, "progress": progress}
        # Exact documents would answer for the equal text of approximate ones, and approximate ones
        # would become exact.
        settings |= {"enable_prefix_caching": False, "repair_when_idle": False}
        with LLM(options.model, **settings) as llm:
            return run_edits(
                llm, options, source, limit=limit, earlier=earlier, keep=keep, progress=progress
            )
