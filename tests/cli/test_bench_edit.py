"""`kvloom bench edit` finds edits, measures them, keeps the report and goes on with it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import Result

from kvloom.bench import edit_run
from kvloom.cli.bench_edit import SourceOptions
from tests.model.tiny_models import CORPUS

from .conftest import Invoke, killed_and_gone_on_with

TEXT = (CORPUS[0] + CORPUS[1] + "\n") * 3
FAST = ("--threads", "1", "--kv-memory", "16MiB", "--context", "300", "--shares", "0.15")


pytestmark = pytest.mark.usefixtures("at_once")


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    return write_edits(tmp_path / "edits.jsonl", 3)


def write_edits(file: Path, count: int) -> Path:
    rows = [
        {"id": f"edit {n}", "before": TEXT, "after": TEXT[:60] + f" new = {n}\n" + TEXT[60:]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def bench(invoke: Invoke, tiny_model: str) -> Invoke:
    def run(*arguments: str, text: str | bytes | None = None) -> Result:
        return invoke("bench", "edit", "--model", tiny_model, *FAST, *arguments, text=text)

    return run


def test_edits_of_a_file_are_measured_kept_drawn_and_gone_on_with(
    bench: Invoke, edits: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "report.json", tmp_path / "edits.svg"
    files = ("--edits", str(edits), "--json", str(report), "--picture", str(picture))
    done = bench(*files, "--limit", "1")
    assert done.exit_code == 0, done.output
    for kind in ("exact", "repaired 15%", "mentions 15%", "shifted", "unrotated", "ignored"):
        assert kind in done.stdout
    first = json.loads(report.read_text())["results"]
    assert len(first) == 1
    assert "<svg" in picture.read_text()
    done = bench(*files)
    assert done.exit_code == 0, done.output
    assert "1 edits are in" in " ".join(done.stderr.split())
    content = json.loads(report.read_text())
    assert [result["name"] for result in content["results"]] == ["edit 0", "edit 1", "edit 2"]
    assert content["results"][:1] == first
    other = bench(*files, "--behind", "10")
    assert other.exit_code == 1
    assert "is of another run" in other.output


def test_edits_come_from_where_one_is_told_or_from_what_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: Path
) -> None:
    assert SourceOptions(edits=edits).source().title == "edits.jsonl"
    assert SourceOptions(rename=True).source().title == "renamed names of the standard library"
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert SourceOptions().source().title == "made edits of the standard library"
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "init", "-q", "mine"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True, cwd="mine")
    assert SourceOptions(repo=Path("mine")).source().title == "commits of mine"
    monkeypatch.chdir("mine")
    assert SourceOptions().source().title == "commits of mine"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rename", "--repo", "."), "contradict"),
        (("--edits", "no-such-file"), "does not exist"),
        (("--picture", "edits.jpeg"), "must end in .svg or .png"),
        (("--json", "no-such-folder/report.json"), "does not exist"),
        (("--shares", "much"), "give 0.05,0.15"),
        (("--shares", "2"), "up to 1"),
        (("--context", "10"), "no room for a change"),
        (("--limit", "0"), "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    bench: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], reason: str
) -> None:
    monkeypatch.setattr(edit_run, "run_edits", None)
    done = bench(*arguments)
    assert done.exit_code != 0
    assert reason in " ".join(done.output.split())


def test_garbage_in_a_file_is_one_line_and_what_was_measured_is_kept(
    bench: Invoke, edits: Path, tmp_path: Path
) -> None:
    edits.write_text(edits.read_text().splitlines()[0] + "\n{garbage\n")
    report = tmp_path / "report.json"
    done = bench("--edits", str(edits), "--json", str(report))
    assert done.exit_code == 1
    assert "Error: edits.jsonl, line 2, is no JSON" in done.output
    assert "Traceback" not in done.output
    assert len(json.loads(report.read_text())["results"]) == 1


@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(tiny_model: str, tmp_path: Path) -> None:
    edits, report = write_edits(tmp_path / "edits.jsonl", 8), tmp_path / "report.json"
    command = ("bench", "edit", "--model", tiny_model, *FAST)
    command += ("--edits", str(edits), "--json", str(report))
    before, after = killed_and_gone_on_with(command, report)
    assert 1 <= len(before) <= 8
    assert after[: len(before)] == before
    assert [result["name"] for result in after] == [f"edit {n}" for n in range(8)]
