"""`kvloom bench chain`: what a thousand edits leave of a document.

Knows: options, and where the report goes.
Does not know: how it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model is edited, and how it is run."""

    model: ModelOption = "default"
    dtype: DTypeOption = "auto"
    quantization: QuantizationOption = "auto"
    kv_dtype: KVDTypeOption = "auto"
    threads: ThreadsOption = None
    kv_memory: Annotated[
        int,
        typer.Option(
            parser=size, metavar="SIZE", show_default="1GiB", help="KV memory, such as 512MiB."
        ),
    ] = 2**30

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `LLM`."""
        settings: dict[str, Any] = {"dtype": self.dtype, "kv_memory": self.kv_memory}
        # Exact documents would answer for the equal text of approximate ones.
        settings |= {"enable_prefix_caching": False, "repair_when_idle": False}
        settings |= chosen_formats(self.quantization, self.kv_dtype)
        return settings if self.threads is None else settings | {"threads": self.threads}


def chain(
    *,
    edits: Annotated[int, typer.Option(min=1, help="One-line edits, one after the other.")] = 1000,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the document.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the choice of lines.")] = 0,
    run: ModelOptions,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the whole report to this file."),
    ] = None,
) -> None:
    """Edit a document line by line, shifted; compare its speed and memory with a fresh one's."""
    check_files(json_file, None)
    terminal, settings = Terminal(), run.settings()
    with long_work(terminal.messages, "Starting", "Preparing the model") as progress:
        from kvloom import LLM
        from kvloom.bench.chain import ChainOptions, run_chain

        options = ChainOptions(
            model=run.model, edits=edits, context=context, seed=seed, settings=settings
        )
        with LLM(run.model, progress=progress, **settings) as llm:
            report = run_chain(llm, options, progress)

    from kvloom.bench.chain_show import render, report_json

    if json_file is not None:
        json_file.write_text(report_json(report), encoding="utf-8")
    terminal.results.print(render(report))
