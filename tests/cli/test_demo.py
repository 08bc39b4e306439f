"""`kvloom demo`: the second question finds the file's tokens computed."""

from __future__ import annotations

import ast
import re

import pytest

from kvloom.cli.demo import MODULE, QUESTIONS, comparison, module_source
from kvloom.errors import RequestError
from kvloom.outputs import Usage
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


def test_comparison_says_what_was_reused() -> None:
    first = Usage(100, 5, 0, 100, time_to_first_token_s=12.0)
    second = Usage(103, 5, 90, 13, time_to_first_token_s=0.25)
    text = comparison(first, second)
    assert "reused 90 of its 103 prompt tokens" in text
    assert "0.25 s instead of 12.00 s" in text
    assert comparison(Usage(1, 1, 0, 1), second).endswith("prompt tokens.")


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
    assert len(done.stdout.strip().splitlines()) >= len(QUESTIONS)
    reused, prompt = re.search(  # type: ignore[union-attr]
        r"reused ([\d,]+) of its ([\d,]+) prompt", done.stderr
    ).groups()
    tokens = [int(number.replace(",", "")) for number in (reused, prompt)]
    assert 3000 <= tokens[0] < tokens[1] <= tokens[0] + 40
