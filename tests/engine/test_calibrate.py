"""Calibration on a clock of our own: the coefficients found, what is remembered, what is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvloom.engine.calibrate as room
from kvloom.cost import CostModel
from kvloom.engine.calibrate import calibrate, cost_model, load_rates
from kvloom.types import LayerSpec, ModelSpec, Observer, Rows, StepOutput

TRUTH = CostModel(2, 256, 0.002, 0.001, 2e-6, 0.004, 3e-6, {})


@dataclass
class ClockedRunner:
    """Runs nothing, and takes the time that a cost model says, longer where `busy` says so."""

    max_positions: int = 4096
    now: float = 0.0
    passes: list[tuple[int, int]] = field(default_factory=list)
    busy: Callable[[int], float] = lambda number: 1.0

    @property
    def spec(self) -> ModelSpec:
        layers = tuple(LayerSpec(index, 4, 2, 8, 8, None) for index in range(2))
        return ModelSpec(layers, 50, self.max_positions, "movable")

    def forward(
        self, rows: Sequence[Rows], observe: Observer | None = None, stop_after: int | None = None
    ) -> StepOutput:
        (entry,) = rows
        count, cached = len(entry.tokens), entry.doc.length
        assert entry.pos.tolist() == list(range(cached, cached + count))
        assert cached + count <= self.max_positions
        self.passes.append((count, cached))
        seconds = TRUTH.prefill_s(count, cached) if count > 1 else TRUTH.decode_step_s(cached)
        self.now += seconds * self.busy(len(self.passes))
        return StepOutput((None,))


def opened(runner: ClockedRunner, **changes: Any) -> Any:
    facts = {
        "runner": runner,
        "kv_dtype": torch.float32,
        "layout": "plain",
        "passport": SimpleNamespace(fingerprint=b"a model"),
        "runner_name": "clocked",
    }
    return SimpleNamespace(**(facts | changes))


@pytest.mark.parametrize("max_positions", [4096, 700, 128])
def test_the_coefficients_of_the_clock_are_found(tmp_path: Path, max_positions: int) -> None:
    runner = ClockedRunner(max_positions)
    found = calibrate(opened(runner), tmp_path, budget_s=10.0, clock=lambda: runner.now)
    for rows, cached in ((20, 0), (100, 20)):
        assert found.prefill_s(rows, cached) == pytest.approx(TRUTH.prefill_s(rows, cached), 1e-3)
    assert found.decode_step_s(100) == pytest.approx(TRUTH.decode_step_s(100))
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert found.r2 > 0.999
    assert found.error is not None
    assert found.error < 1e-3


def test_other_processes_only_ever_slow_a_pass_down(tmp_path: Path) -> None:
    runner = ClockedRunner(busy=lambda number: 1.0 + (number % 3 != 1))
    found = calibrate(opened(runner), tmp_path, clock=lambda: runner.now)
    assert found.prefill_s(300) == pytest.approx(TRUTH.prefill_s(300), 1e-3)


def test_a_budget_shortens_the_passes(tmp_path: Path) -> None:
    took = []
    for budget_s in (0.5, 10.0):
        runner = ClockedRunner()
        calibrate(opened(runner), tmp_path, budget_s=budget_s, clock=lambda r=runner: r.now)
        took.append(sum(rows for rows, _ in runner.passes))
    assert took[0] < took[1]


def test_costs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ClockedRunner()
    monkeypatch.setattr(room, "LEAST_R2", -1e9)  # nothing here takes the time it says
    first = cost_model(opened(runner), tmp_path)
    count = len(runner.passes)
    assert cost_model(opened(runner), tmp_path) == first
    assert len(runner.passes) == count
    for other in (
        {"passport": SimpleNamespace(fingerprint=b"another")},
        {"runner_name": "native (avx2)"},
    ):
        cost_model(opened(runner, **other), tmp_path)
        assert len(runner.passes) > count
        count = len(runner.passes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    cost_model(opened(runner), tmp_path)
    assert len(runner.passes) > count


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"row_s": 1}', "\0", "[" * 100_000])
def test_damaged_costs_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.setattr(room, "LEAST_R2", -1e9)
    runner = ClockedRunner()
    cost_model(opened(runner), tmp_path)
    (path,) = (tmp_path / "costs").iterdir()
    path.write_text(damage)
    count = len(runner.passes)
    with caplog.at_level(logging.WARNING):
        cost_model(opened(runner), tmp_path)
    assert len(runner.passes) > count
    assert "measuring again" in caplog.text
    CostModel.from_json(path.read_text())


def test_what_fits_badly_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(TRUTH, r2=0.5)
    monkeypatch.setattr(room, "calibrate", lambda *_: bad)
    assert cost_model(opened(ClockedRunner()), tmp_path) == bad
    assert not (tmp_path / "costs").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(room, "LEAST_R2", -1e9)
    found = cost_model(opened(ClockedRunner()), blocked)
    assert "disk" not in found.bytes_per_s
    assert "cannot be kept" in caplog.text


def test_rates_are_bytes_over_time(tmp_path: Path) -> None:
    ticks = iter(range(100))
    rates = load_rates(tmp_path, lambda: float(next(ticks)))
    assert rates == {"ram": room.COPIED_BYTES, "disk": room.COPIED_BYTES}
    assert list(tmp_path.iterdir()) == []
