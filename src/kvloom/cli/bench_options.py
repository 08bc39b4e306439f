"""What the commands of the bench have in common.

Knows: formats that were chosen, and files that a report goes to.
Does not know: what is measured.
"""

from __future__ import annotations

from pathlib import Path

import typer

from kvloom.config import KVDType


def chosen_formats(quantization: str, kv_dtype: KVDType) -> dict[str, str | None]:
    """Return the keyword arguments of `LLM` for the formats that are not left at auto."""
    settings: dict[str, str | None] = {}
    if quantization != "auto":
        settings["quantization"] = None if quantization == "none" else quantization
    if kv_dtype != "auto":
        settings["kv_dtype"] = kv_dtype
    return settings


def check_files(report: Path | None, picture: Path | None) -> None:
    """Make sure, before minutes of work, that a report and a picture can be written after it.

    Raises:
        BadParameter: a folder does not exist.
        RequestError: no picture of that kind can be drawn.
    """
    for file in (report, picture):
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"the folder of {file} does not exist; make it first.")
    if picture is not None:
        from kvloom.bench.picture import check_picture

        check_picture(picture)
