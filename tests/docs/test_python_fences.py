"""The Python code of the documentation compiles, names what exists, and runs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, fences, name_of

WITH_PYTHON = [page for page in PAGES if fences(page, "python")]
SHOWN_ADDRESS = "http://127.0.0.1:8000"
START_S = 300
RUN_S = 600


def whole_code(page: Path) -> str:
    """Return a page's Python as one file whose line numbers are those of the page."""
    lines: list[str] = []
    for fence in fences(page, "python"):
        lines += [""] * (fence.line - 1 - len(lines))
        lines += fence.code.splitlines()
    return "\n".join(lines) + "\n"


def test_pages_have_python() -> None:
    assert any(page.name == "tutorial.md" for page in WITH_PYTHON)
    assert len(WITH_PYTHON) > 5


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_code_compiles_and_imports_what_exists(page: Path) -> None:
    tree = ast.parse(whole_code(page), filename=str(page))
    compile(tree, str(page), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{page}:{node.lineno} has a relative import"
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}:{node.lineno} imports {alias.name}"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `kvloom serve` as the tutorial starts it, at a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvloom", "serve", "--port", "0", "--kv-memory", "256MiB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "300", "KVLOOM_STORE": str(tmp_path_factory.mktemp("store"))},
    )
    try:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if " at http://" in line:
                break
        else:
            pytest.fail("kvloom serve ended: " + "".join(shown))
        yield line.split(" at ")[1].split("/v1")[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.long
@pytest.mark.timeout(START_S + RUN_S)
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_code_runs_on_the_default_model(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code = whole_code(page)
    if SHOWN_ADDRESS in code:
        code = code.replace(SHOWN_ADDRESS, request.getfixturevalue("server_url"))
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    if "print(" in code:
        assert done.stdout.strip(), "the page's code prints nothing"
