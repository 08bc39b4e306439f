from __future__ import annotations

from pathlib import Path

import pytest
import typer

from kvloom.cli.bench_options import check_files, chosen_formats
from kvloom.errors import RequestError


def test_only_formats_that_were_chosen_are_passed_on() -> None:
    assert chosen_formats("auto", "auto") == {}
    assert chosen_formats("none", "int8") == {"quantization": None, "kv_dtype": "int8"}
    assert chosen_formats("int4", "auto") == {"quantization": "int4"}


def test_files_are_checked_before_the_work(tmp_path: Path) -> None:
    check_files(None, None)
    check_files(tmp_path / "report.json", tmp_path / "picture.svg")
    missing = tmp_path / "nowhere" / "file.svg"
    for files in ((missing, None), (None, missing)):
        with pytest.raises(typer.BadParameter, match="does not exist"):
            check_files(*files)
    with pytest.raises(RequestError):
        check_files(None, tmp_path / "picture.doc")
