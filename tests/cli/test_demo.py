"""`kvloom demo`: what was read is found again: after a question, an edit and a restart."""

from __future__ import annotations

import ast
import re

import pytest

from kvloom.cli.demo import MODULE, NEW_LINE, OLD_LINE, Step, comparison, cost_table, module_source
from kvloom.errors import RequestError
from kvloom.outputs import EditReceipt, Provenance, Usage
from tests.cli.conftest import Invoke, assert_error, run_kvloom


def test_the_source_is_the_modules_own() -> None:
    import inspect
    import timeit

    assert module_source("timeit") == inspect.getsource(timeit)
    assert ast.parse(module_source(MODULE))


@pytest.mark.parametrize("name", ["sys", "no_such_module_anywhere"])
def test_a_module_without_source_is_said(name: str) -> None:
    with pytest.raises(RequestError, match="without the source"):
        module_source(name)


def test_the_line_that_changes_stands_in_the_file_once() -> None:
    assert module_source(MODULE).count(OLD_LINE) == 1
    assert NEW_LINE not in module_source(MODULE)


def test_an_edit_counts_towards_what_follows_it() -> None:
    exact = Provenance({"exact": 100})
    read = Step("read", Usage(100, 5, 0, 100, time_to_first_token_s=12.0, provenance=exact))
    edit = EditReceipt("shifted", {"exact": 40, "moved": 60}, recomputed=9, seconds=0.5)
    moved = Provenance({"exact": 40, "moved": 60})
    usage = Usage(100, 5, 99, 1, time_to_first_token_s=0.25, provenance=moved)
    changed = Step("changed", usage, edit)
    assert (changed.computed, changed.first_token_s) == (10, 0.75)
    text = comparison([read, changed, read, changed])
    assert "0.75 s with 10 rows run, exactly after 12.0 s with 100" in text
    table = cost_table([read, changed])
    kept = list(table.columns[-1].cells)
    assert kept == ["100 exact", "40 exact · 60 moved"]


def test_a_model_whose_context_is_too_short_is_said(invoke: Invoke, plain_model: str) -> None:
    result = invoke("demo", "-m", plain_model, "--kv-memory", "16MiB", "--threads", "1")
    assert result.exit_code == 1
    assert f"{MODULE}.py is too long" in result.stderr.splitlines()[-1]


def test_wrong_usage_is_exit_code_2(invoke: Invoke) -> None:
    assert_error(invoke("demo", "file"), 2, "file")


@pytest.mark.long
@pytest.mark.usefixtures("default_model_path")
def test_the_embedded_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVLOOM_CACHE")
    done = run_kvloom("demo")
    assert done.returncode == 0, done.stderr
    assert "Timer" in done.stdout
    shifted, exact, restarted = (
        int(number.replace(",", "")) for number in re.findall(r"with ([\d,]+)", done.stderr)
    )
    assert shifted < 100
    assert 2000 < exact < 4000
    assert restarted == 1
