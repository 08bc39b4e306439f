"""A run over fake engines has the ratios of their speeds, and survives their failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvloom import RequestError
from kvloom.bench import speed as speed_module
from kvloom.bench.figures import make_rows
from kvloom.bench.peers.registry import Engine
from kvloom.bench.results import SpeedOptions, SpeedReport
from kvloom.bench.speed import run_speed
from kvloom.bench.worker import WorkerError

from .fakes import fake_engine

APPROXIMATE = ["edit-72-repaired", "edit-72-shifted"]
QUICK_NAMES = [
    *("prefill-64", "decode-48", "batch-4", "shared-cold", "shared-warm", "edit-72"),
    *(*APPROXIMATE, "restart-cold", "restart-warm"),
]


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching takes a second, which is for the tests of `watch_idle`."""
    monkeypatch.setattr(speed_module, "watch_idle", lambda: 0.0)


def run(
    *peers: Engine, ours: dict[str, Any] | None = None, progress: Any = None, **options: Any
) -> SpeedReport:
    engines = {"kvloom": fake_engine("kvloom", **(ours or {}))}
    engines |= {peer.name: peer for peer in peers}
    chosen = SpeedOptions(peers=tuple(peer.name for peer in peers), quick=True, **options)
    return run_speed(chosen, progress, engines=engines)


def test_ratios_are_those_of_the_speeds_for_every_task() -> None:
    found = run(fake_engine("slow"), fake_engine("fast", speed=8.0), ours={"speed": 2.0}, rounds=2)
    ratios = {(row.name, row.engine): row.times_as_fast for row in make_rows(found)}
    assert len(ratios) == 3 * len(QUICK_NAMES)
    for name in QUICK_NAMES:
        assert ratios[name, "kvloom"] is None
        assert ratios[name, "slow"] == pytest.approx(2.0)
        assert ratios[name, "fast"] == pytest.approx(0.25)
    samples = [m.samples for result in found.results for m in result.measurements]
    assert all(len(rounds) == 2 for rounds in samples)
    assert [engine.name for engine in found.engines] == ["kvloom", "slow", "fast"]


def test_rounds_alternate_and_all_engines_get_the_same_prompts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    run(fake_engine("peer", log=str(log)), ours={"log": str(log)}, rounds=2, tasks=("shared",))
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    # The first three are the process that only prepares.
    assert [(r["worker"], r["do"]) for r in requests[:4]] == [
        ("kvloom", "load"),
        ("kvloom", "tokenize"),
        ("kvloom", "load"),
        ("peer", "load"),
    ]
    assert requests[2]["model"] == "default"
    assert requests[3]["model"] == "folder"
    assert requests[2]["threads"] == requests[3]["threads"] == 2
    cold, warm = requests[4:10], requests[10:]
    assert [(r["worker"], r["do"]) for r in cold] == [
        ("kvloom", "complete"),
        ("peer", "complete"),
    ] * 3
    assert [(r["worker"], r["do"]) for r in warm] == [
        ("kvloom", "remember"),
        ("kvloom", "complete"),
        ("peer", "remember"),
        ("peer", "complete"),
        *[("kvloom", "complete"), ("peer", "complete")] * 2,
    ]
    for ours, peers in zip(cold[::2], cold[1::2], strict=True):
        assert ours["prompts"] == peers["prompts"]
    assert len({json.dumps(request["prompts"]) for request in cold}) == 3


def test_engines_without_a_way_are_not_asked_and_lack_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log"
    half = fake_engine("half", ways=["exact", "shifted"])
    plain = fake_engine("plain", ways=["exact"], log=str(log))
    found = run(half, plain, rounds=1)
    has = {
        result.task.name: [bool(m.samples) for m in result.measurements] for result in found.results
    }
    assert all(m.failure is None for result in found.results for m in result.measurements)
    assert has["edit-72"] == has["restart-cold"] == [True, True, True]
    assert has["edit-72-repaired"] == has["restart-warm"] == [True, False, False]
    assert has["edit-72-shifted"] == [True, True, False]
    ways = {json.loads(line).get("way") for line in log.read_text().splitlines()}
    assert ways == {None, "exact"}


def test_approximations_are_held_against_what_kvloom_does_exactly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ours = {"log": str(log), "wrong_ways": ["repaired"]}
    wrong = fake_engine("wrong", shift=1)
    found = run(wrong, ours=ours, rounds=2, tasks=("edit-72-repaired", "edit-72-shifted"))
    (ours_repaired, _), (ours_shifted, theirs) = (r.measurements for r in found.results)
    assert (ours_repaired.equal_tokens, ours_repaired.compared_tokens) == (0, 8)
    assert (ours_shifted.equal_tokens, ours_shifted.compared_tokens) == (8, 8)
    assert (theirs.equal_tokens, theirs.compared_tokens) == (4, 8)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    asked = [(r["way"], r["prompts"][0]) for r in asked if r["do"] == "complete"]
    # Nothing that was computed exactly may answer for an approximation that comes later.
    for place, (way, prompt) in enumerate(asked):
        assert way == "exact" or prompt not in [earlier for _, earlier in asked[:place]]


def test_an_engine_is_started_anew_for_a_restart_with_one_store_for_both(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = run(ours={"log": str(log)}, rounds=1, tasks=("restart-warm",))
    asked = [json.loads(line) for line in log.read_text().splitlines()][3:]
    assert [r["do"] for r in asked] == ["load", "remember", "load", "complete"] * 2
    for first, remembered, second, completed in (asked[:4], asked[4:]):
        assert first["store"] == second["store"]
        assert not Path(first["store"]).exists()
        assert [remembered["tokens"]] == completed["prompts"]
    assert asked[0]["store"] != asked[4]["store"]
    assert found.results[0].measurements[0].samples[0].cached_tokens == 64


@pytest.mark.parametrize("at", ["load", "remember"])
def test_a_restart_that_fails_is_no_end_of_the_engine(at: str) -> None:
    ours = {"fault": "raise", "at": at, "only_with_store": True}
    found = run(ours=ours, rounds=1, tasks=("restart",))
    cold, warm = (result.measurements[0] for result in found.results)
    assert cold.samples
    assert "no such thing" in (warm.failure or "")
    assert found.engines[0].failure is None


def test_a_fast_wrong_engine_is_visible() -> None:
    found = run(fake_engine("wrong", speed=100.0, shift=1), fake_engine("right"), rounds=1)
    by_name = {result.task.name: result.measurements for result in found.results}
    _, wrong, right = by_name["batch-4"]
    assert (wrong.equal_tokens, wrong.compared_tokens) == (4 * 2, 4 * 8)
    assert (right.equal_tokens, right.compared_tokens) == (4 * 8, 4 * 8)


@pytest.mark.parametrize("fault", ["raise", "die", "garbage", "short"])
def test_a_failing_peer_is_a_named_row_and_the_rest_goes_on(fault: str) -> None:
    broken = fake_engine("broken", fault=fault, from_width=60)
    found = run(broken, fake_engine("peer"), rounds=1)
    for result in found.results:
        ours, theirs, others = result.measurements
        assert len(ours.samples) == len(others.samples) == 1
        assert (theirs.failure is None) == bool(theirs.samples)
    by_name = {result.task.name: result.measurements[1] for result in found.results}
    assert by_name["prefill-64"].failure
    # What cannot go on fails in the tasks behind as well, and says why.
    assert bool(by_name["batch-4"].failure) == (fault in {"die", "garbage"})


def test_a_peer_that_does_not_start_is_an_empty_row_everywhere() -> None:
    gone = Engine("gone", ("there-is-no-such-program",))
    found = run(gone, rounds=1)
    assert all("cannot be started" in (r.measurements[1].failure or "") for r in found.results)
    assert all(r.measurements[0].samples for r in found.results)
    assert "cannot be started" in (found.engines[1].failure or "")


def test_kvloom_may_fail_in_one_task() -> None:
    ours = {"fault": "raise", "from_width": 70}
    found = run(fake_engine("peer"), ours=ours, rounds=1, tasks=("prefill", "shared-cold"))
    (_, prefill), (failed, peer) = (result.measurements for result in found.results)
    assert prefill.compared_tokens == 1
    assert failed.failure
    assert peer.samples
    assert peer.compared_tokens == 0


def test_kvloom_that_cannot_load_ends_the_run_with_the_reason() -> None:
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        run(fake_engine("peer"), ours={"fault": "raise", "at": "load"})


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tasks": ("nope",)}, "tasks"),
        ({"peers": ("nope",)}, "peers"),
        ({"peers": ("kvloom",)}, "peers"),
        ({"peers": ("transformers", "transformers")}, "peers"),
    ],
    ids=str,
)
def test_unknown_names_are_refused_at_once(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        run_speed(SpeedOptions(**options))
    assert caught.value.param == param


def test_progress_grows_to_its_end_and_names_what_is_done() -> None:
    told: list[tuple[str, int, int]] = []
    run(
        fake_engine("peer", fault="raise"),
        rounds=1,
        progress=lambda description, done, total: told.append((description, done, total)),
    )
    assert ("Loading", 2, 2) in told
    measured = [(done, total) for text, done, total in told if "·" in text]
    assert measured == sorted(measured)
    assert measured[0][0] == 0
    assert measured[-1][0] == measured[-1][1] > 0
    texts = {text for text, _, _ in told}
    assert {"prefill 64 · peer · warming up", "4 prompts at once · kvloom · round 1 of 1"} <= texts


def test_a_busy_machine_is_logged_at_the_start_and_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(speed_module, "watch_idle", lambda: 1.25)
    assert run(rounds=1, tasks=("prefill",)).other_cores == 1.25
    assert "other processes keep 1.2 cores busy" in caplog.text


def test_the_dtype_and_threads_that_kvloom_chose_hold_for_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    found = run(
        fake_engine("peer", log=str(log)),
        ours={"dtype": "bfloat16"},
        dtype="auto",
        rounds=1,
        tasks=("prefill",),
    )
    load = json.loads(log.read_text().splitlines()[0])
    assert (load["dtype"], load["threads"]) == ("bfloat16", 2)
    assert [engine.dtype for engine in found.engines] == ["bfloat16", "bfloat16"]


def test_further_settings_reach_kvloom(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    run(ours={"log": str(log)}, rounds=1, tasks=("prefill",), settings={"quantization": "int8"})
    loads = [json.loads(line) for line in log.read_text().splitlines() if '"load"' in line]
    assert [load["settings"] for load in loads] == [{"quantization": "int8"}] * 2


@pytest.mark.parametrize("stop_at", ["warming up", "round 1", "round 2"])
def test_an_interrupt_keeps_what_was_measured(stop_at: str) -> None:
    def progress(description: str, done: int, total: int) -> None:
        if description.startswith(f"decode at 48 · peer · {stop_at}"):
            raise KeyboardInterrupt

    found = run(fake_engine("peer"), rounds=2, progress=progress)
    assert found.interrupted
    rounds = [[len(m.samples) for m in result.measurements] for result in found.results]
    expected = {"warming up": [], "round 1": [[1, 0]], "round 2": [[2, 1]]}[stop_at]
    assert rounds == [[2, 2], *expected]
    for result in found.results:
        for measurement in result.measurements:
            assert bool(measurement.samples) == (measurement.failure is None)
    assert [engine.failure for engine in found.engines] == [None, None]


def test_an_interrupt_before_anything_is_measured_ends_the_run() -> None:
    def progress(description: str, done: int, total: int) -> None:
        if description == "Starting peer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(fake_engine("peer"), progress=progress)
