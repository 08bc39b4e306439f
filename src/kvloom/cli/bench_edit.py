"""`kvloom bench edit`: what an approximate edit costs, and what it gets wrong.

Knows: options, where edits come from if nobody says, and where the report goes.
Does not know: how edits are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.bench_cases import EngineChoice, FileOptions, read_shares, run_bench

if TYPE_CHECKING:
    from kvloom import LLM
    from kvloom.bench.case_run import Running
    from kvloom.bench.case_source import Source
    from kvloom.bench.edit_results import EditOptions, EditReport
    from kvloom.bench.edit_run import AnyEdit


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

    def source(self) -> Source[AnyEdit]:
        """Return the edits.

        Raises:
            RequestError: git fails.
            BadParameter: options contradict each other.
        """
        from kvloom.bench.case_source import Source
        from kvloom.bench.edit_made import library_edits, rename_edits
        from kvloom.bench.edit_source import checkout_around, git_edits, read_edits

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

    def options(self, engine: EngineChoice) -> EditOptions:
        """Return what is measured.

        Raises:
            RequestError: a value is out of range.
            BadParameter: a share is no number.
        """
        from kvloom.bench.edit_places import PlaceRule
        from kvloom.bench.edit_results import EditOptions

        return EditOptions(
            model=engine.model,
            places=PlaceRule(self.behind, self.scored, self.context),
            shares=read_shares(self.shares),
            settings=engine.settings(),
        )


def edit(
    *,
    where: SourceOptions,
    engine: EngineChoice,
    what: MeasureOptions,
    limit: Annotated[int, typer.Option(min=1, help="Edits in all.")] = 150,
    files: FileOptions,
) -> None:
    """Measure edits done exactly, repaired, shifted and worse: time, rows and the error made."""
    files.check()
    source, options = where.source(), what.options(engine)

    from kvloom.bench.edit_run import run_edits
    from kvloom.bench.edit_show import EDITS

    def run(opened: Callable[..., LLM], running: Running[EditReport]) -> EditReport:
        with opened() as llm:
            return run_edits(llm, options, source, running)

    run_bench(EDITS, options, limit, files, run)
