"""`kvloom bench speed` turns options into a run, and its report into a table and a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvloom import KvloomError
from kvloom.bench import speed as speed_module
from kvloom.bench.results import SpeedOptions, SpeedReport
from tests.bench.fakes import report, result, sample

from .conftest import Invoke


class FakeRun:
    """Stands in for `run_speed`.

    Attributes:
        asked: the options of the last run.
        answer: the report, or what is raised.
    """

    def __init__(self) -> None:
        self.asked: SpeedOptions | None = None
        self.answer: SpeedReport | Exception = report(
            result("prefill-64", kvloom=[sample(0.5)], transformers=[sample(1.0)])
        )

    def __call__(self, options: SpeedOptions, progress: Any) -> SpeedReport:
        self.asked = options
        progress("Preparing", 0, 0)
        progress("Measuring", 1, 2)
        if isinstance(self.answer, Exception):
            raise self.answer
        return replace(self.answer, options=options)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr(speed_module, "run_speed", fake)
    return fake


@pytest.fixture
def bench(invoke: Invoke) -> Invoke:
    def run(*arguments: str, text: str | bytes | None = None) -> Result:
        return invoke("bench", "speed", *arguments, text=text)

    return run


def test_without_options_it_measures_the_default_beside_transformers(
    fake: FakeRun, bench: Invoke
) -> None:
    done = bench()
    assert done.exit_code == 0, done.output
    assert fake.asked == SpeedOptions()
    assert "prefill 64" in done.stdout
    assert "2.00" in done.stdout


def test_every_option_reaches_the_run(fake: FakeRun, bench: Invoke) -> None:
    done = bench(
        *(
            "--peers",
            "transformers, vllm,",
            "--model",
            "folder",
            "--dtype",
            "bfloat16",
            "--rounds",
            "5",
        ),
        *("--tasks", "prefill, shared-warm,", "--quick", "--threads", "2"),
        *("--kv-memory", "1GiB", "--timeout", "60"),
    )
    assert done.exit_code == 0, done.output
    assert fake.asked == SpeedOptions(
        model="folder",
        peers=("transformers", "vllm"),
        dtype="bfloat16",
        rounds=5,
        tasks=("prefill", "shared-warm"),
        quick=True,
        threads=2,
        kv_memory="1GiB",
        timeout_s=60.0,
    )


def test_alone_measures_no_peer(fake: FakeRun, bench: Invoke) -> None:
    assert bench("--alone").exit_code == 0
    assert fake.asked is not None
    assert fake.asked.peers == ()


def test_the_report_is_written_as_json(fake: FakeRun, bench: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    assert bench("--json", str(output)).exit_code == 0
    content = json.loads(output.read_text())
    assert content["schema"] == "kvloom.bench.speed"
    assert content["figures"][1]["times_as_fast"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--alone", "--peers", "transformers"), "contradict"),
        (("--picture", "no-such-folder/speed.svg"), "does not exist"),
        (("--picture", "speed.jpeg"), "must end in .svg or .png"),
        (("--kv-memory", "much"), "write bytes or a size"),
        (("--json", "no-such-folder/report.json"), "does not exist"),
        (("--rounds", "0"), "at least 1"),
        (("--dtype", "int4"), "must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    fake: FakeRun, bench: Invoke, arguments: tuple[str, ...], reason: str
) -> None:
    done = bench(*arguments)
    assert done.exit_code != 0
    assert reason in " ".join(done.output.split())
    assert fake.asked is None


def test_a_failure_of_kvloom_is_one_line_and_an_exit_code(fake: FakeRun, bench: Invoke) -> None:
    fake.answer = KvloomError("the model is gone; fetch it again")
    done = bench()
    assert done.exit_code == 1
    assert "Error: the model is gone" in done.output
    assert "Traceback" not in done.output


def test_a_failed_peer_is_no_failure_but_a_failed_kvloom_is(fake: FakeRun, bench: Invoke) -> None:
    fake.answer = report(result("prefill-64", kvloom=[sample()], transformers="not installed"))
    done = bench()
    assert done.exit_code == 0
    assert "not installed" in done.output
    fake.answer = report(result("prefill-64", kvloom="no room", transformers=[sample()]))
    done = bench()
    assert done.exit_code == 1
    assert "no room" in done.output


def test_the_earlier_spelling_of_peers_still_works(fake: FakeRun, bench: Invoke) -> None:
    assert bench("--peer", "vllm").exit_code == 0
    assert fake.asked is not None
    assert fake.asked.peers == ("vllm",)


def test_a_picture_is_drawn(fake: FakeRun, bench: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.svg"
    assert bench("--picture", str(picture)).exit_code == 0
    assert "<svg" in picture.read_text()


def test_an_interrupted_run_is_written_and_marked(
    fake: FakeRun, bench: Invoke, tmp_path: Path
) -> None:
    assert isinstance(fake.answer, SpeedReport)
    fake.answer = replace(fake.answer, interrupted=True)
    output = tmp_path / "report.json"
    done = bench("--json", str(output))
    assert done.exit_code == 130
    assert "was interrupted" in done.output
    assert "prefill 64" in done.output
    assert json.loads(output.read_text())["interrupted"] is True
