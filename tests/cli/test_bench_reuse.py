"""`kvloom bench reuse` finds texts, measures prompts of them, and goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from kvloom.bench import reuse_run
from kvloom.cli.bench_reuse import MaterialOptions
from tests.model.tiny_models import CORPUS

from .conftest import Invoke, killed_and_gone_on_with

FAST = ("--threads", "1", "--kv-memory", "16MiB", "--shares", "0.15")
FAST += ("--chunks", "3", "--chunk-tokens", "40", "--scored", "6")


pytestmark = pytest.mark.usefixtures("at_once")


def write_questions(file: Path, count: int) -> Path:
    rows = [
        {"id": f"question {n}", "question": "what", "passages": [f"{n}: {text}" for text in CORPUS]}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "set.jsonl", 3)


@pytest.fixture
def bench(invoke: Invoke, tiny_model: str) -> Invoke:
    def run(*arguments: str, text: str | bytes | None = None) -> Result:
        return invoke("bench", "reuse", "--model", tiny_model, *FAST, *arguments, text=text)

    return run


def test_questions_are_measured_kept_drawn_and_gone_on_with(
    bench: Invoke, questions: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "report.json", tmp_path / "reuse.svg"
    files = ("--questions", str(questions), "--json", str(report), "--picture", str(picture))
    done = bench(*files, "--limit", "1")
    assert done.exit_code == 0, done.output
    for kind in ("exact", "prefix", "blend 15%", "craft 15%", "first 15%", "random 15%", "none"):
        assert kind in done.stdout
    assert "no real answer" in " ".join(done.stdout.split())
    first = json.loads(report.read_text())["results"]
    assert len(first) == 1
    assert not any(outcome["failure"] for outcome in first[0]["outcomes"])
    assert "<svg" in picture.read_text()
    done = bench(*files)
    assert done.exit_code == 0, done.output
    assert "1 prompts are in" in " ".join(done.stderr.split())
    content = json.loads(report.read_text())
    assert [result["name"] for result in content["results"]] == [f"question {n}" for n in range(3)]
    assert content["results"][:1] == first
    other = bench(*files, "--seed", "1")
    assert other.exit_code == 1
    assert "is of another run" in other.output


def test_texts_come_from_a_folder_or_from_python_itself(bench: Invoke, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(CORPUS):
        (folder / f"{number}.txt").write_text(text * 3)
    assert MaterialOptions(folder=folder).material().title == "texts of texts"
    assert MaterialOptions().material().title == "sources of the standard library"
    for arguments in (("--folder", str(folder)), ("--from-disk",)):
        done = bench(*arguments, "--limit", "1")
        assert done.exit_code == 0, done.output
        assert "prompts: 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--questions", "{set}", "--folder", "."), "contradict"),
        (("--questions", "no-such-file"), "does not exist"),
        (("--folder", "{empty}"), "holds no text"),
        (("--picture", "reuse.jpeg"), "must end in .svg or .png"),
        (("--json", "no-such-folder/report.json"), "does not exist"),
        (("--shares", "much"), "give 0.05,0.15"),
        (("--shares", "2"), "up to 1"),
        (("--chunks", "1"), "must be at least 2"),
        (("--limit", "0"), "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    bench: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    questions: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.setattr(reuse_run, "run_reuse", None)
    (tmp_path / "empty").mkdir()
    places = {"set": questions, "empty": tmp_path / "empty"}
    done = bench(*(argument.format(**places) for argument in arguments))
    assert done.exit_code != 0
    assert reason in " ".join(done.output.split())


@pytest.mark.parametrize("line", ["{garbage", '{"question": "what"}', '"text"', "\x00"])
def test_garbage_in_a_file_is_one_line(bench: Invoke, questions: Path, line: str) -> None:
    questions.write_text(f"{questions.read_text()}{line}\n")
    done = bench("--questions", str(questions))
    assert done.exit_code == 1
    assert "Error: set.jsonl, line 4, is no" in done.output
    assert "Traceback" not in done.output


def test_prompts_that_are_too_long_are_skipped_and_counted(bench: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"question": "what", "passages": [CORPUS[0] * 1000]}))
    done = bench("--questions", str(file), "--chunk-tokens", "0")
    assert done.exit_code == 1
    assert "longer than the context of 4096 tokens" in " ".join(done.output.split())


@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(tiny_model: str, tmp_path: Path) -> None:
    questions, report = write_questions(tmp_path / "set.jsonl", 8), tmp_path / "report.json"
    command = ("bench", "reuse", "--model", tiny_model, *FAST)
    command += ("--questions", str(questions), "--json", str(report))
    before, after = killed_and_gone_on_with(command, report)
    assert 1 <= len(before) <= 8
    assert after[: len(before)] == before
    assert [result["name"] for result in after] == [f"question {n}" for n in range(8)]
