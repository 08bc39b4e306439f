"""A contender turns tasks into requests and keeps its failure."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom.bench.contender import Contender
from kvloom.bench.peers.registry import Engine
from kvloom.bench.peers.wire import LoadRequest
from kvloom.bench.prompts import RoundPrompts
from kvloom.bench.worker import WorkerError

from .fakes import TASKS, fake_engine
from .peers.fake_homes import fake_home

LOAD = LoadRequest(model="default", dtype="float32", threads=3, kv_memory="1MiB")
PROMPTS = RoundPrompts((), (tuple(range(64)),))
WARM = RoundPrompts(tuple(range(64)), (tuple(range(72)),))


def test_a_sample_holds_counts_and_times() -> None:
    with closing(Contender(fake_engine("fake", speed=2.0), 30.0)) as contender:
        contender.start(LOAD)
        sample, outputs = contender.run(TASKS["prefill-64"], PROMPTS, warm_up=False)
        report = contender.report()
    assert (sample.prompt_tokens, sample.new_tokens, sample.cached_tokens) == (64, 1, 0)
    assert (sample.first_token_s, sample.total_s) == (0.032, 0.037)
    assert outputs == [[sum(range(64)) % 1000]]
    assert (report.dtype, report.threads, report.versions) == ("float32", 3, {"fake": "1.0"})
    assert report.peak_rss_bytes == 1000
    assert (report.ready_s or 0) > 0
    assert (report.ready_rss_bytes or 0) > 2**20
    assert report.failure is None


def test_a_shared_prefix_is_remembered_once_and_then_reused() -> None:
    with closing(Contender(fake_engine("fake"), 30.0)) as contender:
        contender.start(LOAD)
        samples = [
            contender.run(TASKS["shared-warm"], WARM, warm_up=number == 0)[0] for number in range(2)
        ]
    assert [sample.cached_tokens for sample in samples] == [64, 64]
    assert samples[0].first_token_s == pytest.approx(0.008)


@pytest.mark.parametrize("fault", ["raise", "die"])
def test_an_engine_that_cannot_load_has_a_report_with_the_reason(fault: str) -> None:
    with closing(Contender(fake_engine("fake", fault=fault, at="load"), 30.0)) as contender:
        contender.start(LOAD)
        with pytest.raises(WorkerError) as caught:
            contender.run(TASKS["prefill-64"], PROMPTS, warm_up=True)
        report = contender.report()
    assert report.failure == str(caught.value)
    assert report.ready_s is None


def test_an_engine_that_is_not_installed_has_a_report_with_the_reason() -> None:
    with closing(Contender(Engine("gone", ("there-is-no-such-program",)), 30.0)) as contender:
        contender.start(LOAD)
        report = contender.report()
    assert "gone cannot be started" in (report.failure or "")


def test_an_error_in_a_task_is_no_failure_of_the_engine_but_its_death_is() -> None:
    for fault, reason in (("raise", None), ("die", "all gone")):
        engine = fake_engine("fake", fault=fault, from_width=70)
        with closing(Contender(engine, 30.0)) as contender:
            contender.start(LOAD)
            with pytest.raises(WorkerError):
                contender.run(TASKS["shared-warm"], WARM, warm_up=True)
            report = contender.report()
        assert (reason or "") in (report.failure or "")
        assert (report.failure is None) == (reason is None)


def test_a_text_is_remembered_anew_before_each_edit() -> None:
    prompts = RoundPrompts(tuple(range(72)), ((*range(40), 500, *range(41, 72)),))
    with closing(Contender(fake_engine("fake"), 30.0)) as contender:
        contender.start(LOAD)
        for number in range(2):
            found, _ = contender.run(TASKS["edit-72"], prompts, warm_up=number == 0)
            assert found.cached_tokens == 40


def test_a_peer_that_is_not_installed_is_not_started() -> None:
    engine = replace(fake_engine("fake"), missing="it is not installed")
    with closing(Contender(engine, 30.0)) as contender:
        contender.start(LOAD)
        report = contender.report()
    assert report.failure == "it is not installed"


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_peer_loads_the_model_as_it_reads_it(tmp_path: Path, source: str) -> None:
    home = fake_home(tmp_path, convert=(), source=source)
    engine = replace(fake_engine("fake"), home=home)
    told: list[str] = []
    with closing(Contender(engine, 30.0)) as contender:
        request = replace(LOAD, model=str(tmp_path))
        contender.start(request, lambda text, *_: told.append(text))
        report = contender.report()
    assert report.format == "int3"
    assert ("holds 0" in (report.failure or "")) == (source == "gguf")


def test_an_engine_that_was_not_started_says_so() -> None:
    contender = Contender(fake_engine("fake"), 30.0)
    with pytest.raises(WorkerError, match="was not started"):
        contender.run(TASKS["prefill-64"], PROMPTS, warm_up=True)
    contender.close()
