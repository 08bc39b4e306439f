"""The cost model: the sheet's worked example, its limits, fits of synthetic timings, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.cost import (
    MEMORY,
    CostModel,
    Machine,
    ModelSize,
    Timing,
    fit_decode,
    fit_prefill,
    worst_error,
)
from kvloom.kv.pool import PAGE_SLOTS, block_bytes
from kvloom.types import LayerSpec

YI = ModelSize(34e9, layers=60, heads=56, kv_heads=8, dim=128)
A100 = Machine(312e12, 2e12, {"host": 20e9})
SMOL = ModelSize(134.5e6, layers=30, heads=9, kv_heads=3, dim=64, weight_bytes=4, kv_bytes=4)
TWO_CORES = Machine(80e9, 15e9, {"disk": 1e9})


def test_the_worked_example_of_the_sheet() -> None:
    cost = CostModel.roofline(YI, A100)
    assert cost.kv_bytes_per_token == 245_760
    assert 50_000 * cost.kv_bytes_per_token == pytest.approx(12.3e9, rel=0.01)
    assert cost.prefill_s(4096) == pytest.approx(0.89 + 0.045, rel=0.02)  # with attention
    assert 4096 * cost.row_s == pytest.approx(0.89, rel=0.01)
    # The paper says 14.1 s, which is half of the causal attention of its own formula.
    attention = 2 * 60 * 56 * 128 * 50_000**2 / 312e12
    assert cost.prefill_s(50_000) == pytest.approx(50_000 * cost.row_s + attention)
    assert cost.prefill_s(50_000) - attention / 2 == pytest.approx(14.1, rel=0.02)
    assert cost.load_s(50_000, "host") == pytest.approx(0.6, rel=0.03)
    assert 250 * cost.decode_step_s(50_000) == pytest.approx(10, rel=0.01)
    assert 250 * cost.decode_step_s(4_000) == pytest.approx(8.6, rel=0.01)
    assert cost.critical_rows == pytest.approx(156)
    assert cost.concurrency(50_000, 12.3e9) == 1
    assert cost.concurrency(4_096, 80e9 - 68e9) in range(11, 13)


def test_the_default_model_on_two_cores() -> None:
    cost = CostModel.roofline(SMOL, TWO_CORES)
    assert cost.kv_bytes_per_token == 46_080
    assert cost.decode_step_s(0) == pytest.approx(0.036, rel=0.01)
    assert 250 < 512 / cost.prefill_s(512) < 400
    assert cost.load_s(1, "disk") == pytest.approx(46e-6, rel=0.01)
    assert cost.loading_wins(256, 0, "disk")
    assert cost.hidden_share(512, "disk") == pytest.approx(0.015, abs=0.003)


def test_bytes_per_token_are_those_of_the_pool() -> None:
    layers = [LayerSpec(i, 9, 3, 64, 64, None) for i in range(30)]
    assert SMOL.kv_bytes_per_token * PAGE_SLOTS == block_bytes(layers, torch.float32)


def test_limits_of_a_decode_step() -> None:
    cost = CostModel.roofline(SMOL, TWO_CORES)
    weights = 134.5e6 * 4 / 15e9
    assert cost.decode_step_s(0) == pytest.approx(weights)
    far = 10**9
    assert cost.decode_step_s(2 * far) == pytest.approx(2 * cost.decode_step_s(far), rel=0.01)


def test_a_tier_that_nobody_measured_is_never_loaded_from() -> None:
    cost = CostModel.roofline(SMOL, TWO_CORES)
    assert cost.load_s(5, "moon") == math.inf
    assert not cost.loading_wins(10**6, 0, "moon")
    assert cost.load_s(5, MEMORY) == 0.0 == cost.load_s(0, "moon")


rates = st.floats(1e-6, 1e-2)


@given(pass_s=rates, row_s=rates, pair_s=st.floats(1e-9, 1e-4))
def test_a_fit_finds_the_coefficients_of_exact_timings(pass_s, row_s, pair_s) -> None:
    truth = replace(CostModel.roofline(SMOL, TWO_CORES), pass_s=pass_s, row_s=row_s, pair_s=pair_s)
    shapes = [(1, 0), (32, 0), (128, 0), (512, 0), (128, 512), (64, 2000)]
    timings = [Timing(rows, cached, truth.prefill_s(rows, cached)) for rows, cached in shapes]
    *found, r2 = fit_prefill(timings)
    fitted = replace(truth, pass_s=found[0], row_s=found[1], pair_s=found[2])
    held_out = [Timing(300, 100, truth.prefill_s(300, 100))]
    assert worst_error(fitted, held_out) < 1e-6
    assert r2 > 1 - 1e-9


@given(st.lists(st.floats(1e-4, 10.0), min_size=4, max_size=4))
def test_a_fit_of_garbage_stays_sane(seconds) -> None:
    shapes = [(16, 0), (64, 0), (256, 0), (64, 256)]
    timings = [Timing(*shape, s) for shape, s in zip(shapes, seconds, strict=True)]
    *found, r2 = fit_prefill(timings)
    assert min(found) >= 0
    assert r2 <= 1 + 1e-9
    assert min(fit_decode([Timing(1, cached, s) for cached, s in enumerate(seconds)])) >= 0


def test_a_fit_of_decode_steps() -> None:
    timings = [Timing(1, cached, 0.003 + 1e-6 * cached) for cached in (10, 500, 4000)]
    assert fit_decode(timings) == pytest.approx((0.003, 1e-6))


@given(tokens=st.integers(1, 4000), more=st.integers(1, 4000), cached=st.integers(0, 4000))
def test_more_never_costs_less(tokens, more, cached) -> None:
    cost = CostModel.roofline(SMOL, TWO_CORES)
    assert cost.prefill_s(tokens, cached) < cost.prefill_s(tokens + more, cached)
    assert cost.load_s(tokens, "disk") < cost.load_s(tokens + more, "disk")
    whole = cost.repair_s(tokens, tokens, cached, 1)
    assert whole == pytest.approx(cost.prefill_s(tokens, cached))
    assert cost.repair_s(0, tokens, cached, 1) == 0.0


def test_json_there_and_back() -> None:
    cost = replace(CostModel.roofline(YI, A100), r2=0.993, error=0.04)
    assert CostModel.from_json(cost.to_json()) == cost


@pytest.mark.parametrize(
    "change",
    [
        {"row_s": -1},
        {"row_s": "x"},
        {"row_s": None},
        {"bytes_per_s": []},
        {"more": 1},
        {"error": True},
    ],
)
def test_damaged_json_is_refused(change) -> None:
    found = json.loads(CostModel.roofline(YI, A100).to_json())
    with pytest.raises(ValueError, match=r"\w"):
        CostModel.from_json(json.dumps(found | change))
    for text in ("", "[]", "{}", "NaN"):
        with pytest.raises(ValueError, match=r"\w"):
            CostModel.from_json(text)
