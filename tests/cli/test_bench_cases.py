from __future__ import annotations

from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from kvloom.cli.bench_cases import EngineChoice, FileOptions, read_shares


@given(st.lists(st.floats(0, 1), min_size=1))
def test_shares_are_numbers_with_commas(shares: list[float]) -> None:
    assert read_shares(",".join(map(str, shares))) == tuple(shares)


@pytest.mark.parametrize("text", ["", "much", "0.1,,0.2", "0.1;0.2"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"give 0\.05,0\.15"):
        read_shares(text)


def test_the_engine_gets_what_was_chosen() -> None:
    assert EngineChoice().settings() == {"dtype": "auto", "kv_memory": 2 * 2**30}
    chosen = EngineChoice(dtype="float32", quantization="none", kv_memory=5, threads=1)
    assert chosen.settings() == {
        "dtype": "float32",
        "kv_memory": 5,
        "quantization": None,
        "threads": 1,
    }


def test_files_are_checked_before_the_work(tmp_path: Path) -> None:
    FileOptions().check()
    with pytest.raises(typer.BadParameter, match="does not exist"):
        FileOptions(json_file=tmp_path / "nowhere" / "report.json").check()
