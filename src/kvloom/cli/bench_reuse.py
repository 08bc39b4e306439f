"""`kvloom bench reuse`: what joining chunks in another order costs, and what it gets wrong.

Knows: options, and where texts come from if nobody says.
Does not know: how joined chunks are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from kvloom.cli.bench_cases import EngineChoice, FileOptions, read_shares, run_bench

if TYPE_CHECKING:
    from kvloom import LLM
    from kvloom.bench.case_run import Running
    from kvloom.bench.reuse_cases import Material
    from kvloom.bench.reuse_results import ReuseOptions, ReuseReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MaterialOptions:
    """What prompts are made of."""

    questions: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="A file of JSON lines with `question`, `passages` and maybe an `answer`.",
        ),
    ] = None
    folder: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            show_default="the standard library's sources",
            help="A folder of texts; the questions quote them.",
        ),
    ] = None

    def material(self) -> Material:
        """Return the texts.

        Raises:
            RequestError: there are none, or a line of the file is no question.
            BadParameter: options contradict each other.
        """
        from kvloom.bench.prompts import library_modules
        from kvloom.bench.reuse_cases import Questions, Texts
        from kvloom.bench.reuse_source import read_folder, read_questions

        if self.questions is not None and self.folder is not None:
            raise typer.BadParameter("--questions and --folder contradict each other; give one.")
        if self.questions is not None:
            return Questions(self.questions.name, read_questions(self.questions))
        if self.folder is not None:
            return Texts(f"texts of {self.folder.resolve().name}", read_folder(self.folder))
        return Texts("sources of the standard library", (text for _, text in library_modules()))


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """What is measured of every prompt."""

    chunks: Annotated[int, typer.Option(help="Chunks of a prompt.")] = 8
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens of a chunk, about; 0 leaves texts as long as they are.")
    ] = 512
    scored: Annotated[
        int, typer.Option(help="Tokens that are scored: the answer's, then the model's own.")
    ] = 24
    shares: Annotated[
        str, typer.Option(help="Shares of the chunks' rows that are computed again, with commas.")
    ] = "0.05,0.15,0.3"
    seed: Annotated[int, typer.Option(help="Of the order that chunks are joined in.")] = 0
    from_disk: Annotated[
        bool,
        typer.Option(
            "--from-disk", help="Start the engine anew, so that every kind loads its chunks."
        ),
    ] = False

    def options(self, engine: EngineChoice) -> ReuseOptions:
        """Return what is measured.

        Raises:
            RequestError: a value is out of range.
            BadParameter: a share is no number.
        """
        from kvloom.bench.reuse_results import ReuseOptions

        return ReuseOptions(
            model=engine.model,
            chunks=self.chunks,
            chunk_tokens=self.chunk_tokens,
            scored=self.scored,
            shares=read_shares(self.shares),
            seed=self.seed,
            from_disk=self.from_disk,
            settings=engine.settings(),
        )


def reuse(
    *,
    where: MaterialOptions,
    engine: EngineChoice,
    what: JoinOptions,
    limit: Annotated[int, typer.Option(min=1, help="Prompts in all.")] = 20,
    files: FileOptions,
) -> None:
    """Measure chunks joined in another order by all planners: time, rows and the error made."""
    files.check()
    material, options = where.material(), what.options(engine)

    from kvloom import StoreSettings
    from kvloom.bench.reuse_engine import Engines
    from kvloom.bench.reuse_run import run_reuse
    from kvloom.bench.reuse_show import JOINS

    def run(opened: Callable[..., LLM], running: Running[ReuseReport]) -> ReuseReport:
        with TemporaryDirectory(prefix="kvloom-bench-") as folder:
            store = StoreSettings(folder=Path(folder)) if options.from_disk else None
            engines = Engines(partial(opened, store=store), restarts=options.from_disk)
            with closing(engines):
                return run_reuse(engines, options, material, running)

    run_bench(JOINS, options, limit, files, run)
