"""`kvloom bench chain`: what a thousand edits leave of a document.

Knows: options, and where the report goes.
Does not know: how it is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvloom.cli.bench_cases import APPROXIMATIONS_STAY, EngineChoice
from kvloom.cli.bench_options import check_files
from kvloom.cli.progress import long_work
from kvloom.cli.terminal import Terminal


def chain(
    *,
    edits: Annotated[int, typer.Option(min=1, help="One-line edits, one after the other.")] = 1000,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the document.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the choice of lines.")] = 0,
    engine: EngineChoice,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the whole report to this file."),
    ] = None,
) -> None:
    """Edit a document line by line, shifted; compare its speed and memory with a fresh one's."""
    check_files(json_file, None)
    terminal, settings = Terminal(), {**engine.settings(), **APPROXIMATIONS_STAY}
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom import LLM
        from kvloom.bench.chain import ChainOptions, run_chain

        options = ChainOptions(
            model=engine.model, edits=edits, context=context, seed=seed, settings=settings
        )
        with LLM(engine.model, progress=progress, **settings) as llm:
            report = run_chain(llm, options, progress)

    from kvloom.bench.chain_show import render, report_json

    if json_file is not None:
        json_file.write_text(report_json(report), encoding="utf-8")
    terminal.results.print(render(report))
