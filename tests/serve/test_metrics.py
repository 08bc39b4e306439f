"""What Prometheus reads."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from kvloom import AsyncLLM, StoreSettings
from kvloom.engine.stored import StoreUse
from kvloom.outputs import EngineStats, Usage
from kvloom.serve.metrics import (
    COUNTERS,
    GAUGES,
    STORE_COUNTERS,
    TIER_COUNTERS,
    TIER_GAUGES,
    Metrics,
)
from kvloom.store.tier import TierStatistics
from tests.model.tiny_models import tiny_llama, write_folder

from .raw_client import RawClient
from .running import RunningServer, eventually


def samples(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples as Prometheus' own parser reads them."""
    text = server.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_counter_of_the_engine_is_exported() -> None:
    names = {field.name for field in fields(EngineStats)} - {"requests_finished"}
    assert set(GAUGES) | set(COUNTERS) == names
    stats = EngineStats(**{name: number for number, name in enumerate(sorted(names), 5)})
    metrics = Metrics()
    metrics.exposition("", stats)
    registry = metrics.registry
    for name in names:
        suffix = "_total" if name in COUNTERS else ""
        assert registry.get_sample_value(f"kvloom_{name}{suffix}") == getattr(stats, name)


def test_every_counter_of_the_store_is_exported() -> None:
    tier_names = {field.name for field in fields(TierStatistics)}
    assert set(TIER_COUNTERS) | set(TIER_GAUGES) == tier_names
    tiers = {
        tier: TierStatistics(**{name: number for number, name in enumerate(tier_names, start)})
        for tier, start in (("ram", 5), ("disk", 50))
    }
    names = {field.name for field in fields(StoreUse)} - {"tiers"}
    assert set(STORE_COUNTERS) == names - {"pending"}
    use = StoreUse(tiers=tiers, **{name: number for number, name in enumerate(names, 90)})
    metrics = Metrics()
    metrics.exposition("", EngineStats(), use)
    value = metrics.registry.get_sample_value
    for name in names:
        suffix = "" if name == "pending" else "_total"
        assert value(f"kvloom_store_{name}{suffix}") == getattr(use, name)
    for tier, statistics in tiers.items():
        for name in tier_names:
            shown = {"nbytes": "bytes", "chunks": "chunks"}.get(name, f"{name}_total")
            found = value(f"kvloom_store_{shown}", {"tier": tier})
            assert found == getattr(statistics, name)


def test_a_server_shows_what_its_store_does(tmp_path: Path) -> None:
    model = tiny_llama(max_position_embeddings=512)
    folder = write_folder(tmp_path / "model", model)
    asked = {"prompt": "A text of some length. " * 6, "max_tokens": 1}

    def look() -> dict[str, float]:
        """Ask a new server the same, and return its store's samples as `name/tier`."""
        store = StoreSettings(folder=tmp_path / "store")
        llm = AsyncLLM(str(folder), kv_memory="4MiB", dtype="float32", store=store)
        with RunningServer(llm) as server:
            assert server.post("/v1/completions", asked).status_code == 200
            assert llm.store is not None
            assert asyncio.run(llm.store.flush())
            return {
                f"{name.removeprefix('kvloom_store_')}/{dict(labels).get('tier', '')}": value
                for (name, labels), value in samples(server).items()
                if name.startswith("kvloom_store_")
            }

    first, again = look(), look()
    tokens = first["kept_tokens_total/"]
    assert tokens > 32
    assert (first["loaded_tokens_total/"], first["stored_total/disk"]) == (0, 1)
    assert again["loaded_tokens_total/"] >= tokens - 1
    assert (again["hits_total/disk"], again["misses_total/ram"]) == (1, 1)
    assert again["chunks/disk"] == 1
    assert again["bytes/disk"] == first["bytes/disk"] > tokens
    assert (first["pending/"], again["missed_tokens_total/"]) == (0, 0)


def test_without_a_store_nothing_of_one_is_shown(shared_server: RunningServer) -> None:
    assert not any(name.startswith("kvloom_store_") for name, _ in samples(shared_server))


def test_requests_and_their_reasons_are_counted(server: RunningServer) -> None:
    for _ in range(3):
        server.post("/v1/completions", {"prompt": "abc"})
    server.post("/v1/completions", {"prompt": "abc", "stream": True})
    server.post("/v1/completions", {"prompt": ""})
    server.post("/v1/completions", {"prompt": []})
    got = samples(server)
    none: frozenset[tuple[str, str]] = frozenset()
    assert got["kvloom_requests_finished_total", frozenset({("reason", "stop")})] == 5
    assert got["kvloom_generated_tokens_total", none] == 4 * 4 + 1
    assert got["kvloom_pages_free", none] == 1000
    assert got["kvloom_time_to_first_token_seconds_count", none] == 5
    assert got["kvloom_time_per_output_token_seconds_count", none] == 4
    assert got["kvloom_prompt_length_tokens_sum", none] == 4 * 4 + 1
    assert got["kvloom_queue_length_count", none] == 5
    route = {("method", "POST"), ("route", "/v1/completions")}
    good = frozenset(route | {("status", "200")})
    bad = frozenset(route | {("status", "400")})
    assert got["kvloom_http_request_seconds_count", good] == 5
    assert got["kvloom_http_request_seconds_count", bad] == 1
    assert got["process_resident_memory_bytes", none] > 2**20


def test_strange_routes_and_methods_share_one_label(server: RunningServer) -> None:
    for number in range(5):
        server.get(f"/scan/{number}")
        server.client.request(f"BREW{number}", f"{server.url}/scan/{number}")
    got = samples(server)
    for method in ("GET", "other"):
        labels = {("method", method), ("route", "unknown"), ("status", "404")}
        assert got["kvloom_http_request_seconds_count", frozenset(labels)] == 5


def test_requests_under_way_are_shown(server: RunningServer) -> None:
    server.llm.hold_after = 1
    active = ("kvloom_http_requests_active", frozenset[tuple[str, str]]())
    with RawClient(server.port, "/v1/completions", {"prompt": "abc", "stream": True}) as client:
        client.read_until(b"data: ")
        assert samples(server)[active] == 2  # the stream, and the request for the metrics
    eventually(lambda: samples(server)[active] == 1)


@pytest.mark.parametrize(
    "usage",
    [
        Usage(5, 0, 0, 5),
        Usage(5, 1, 0, 5, time_to_first_token_s=0.1, total_s=0.1),
        Usage(5, 3, 0, 5, time_to_first_token_s=0.3, total_s=0.2),
    ],
)
def test_receipts_without_a_span_of_time_are_fine(usage: Usage) -> None:
    metrics = Metrics()
    metrics.finished(usage)
    registry = metrics.registry
    firsts = registry.get_sample_value("kvloom_time_to_first_token_seconds_count")
    assert firsts == (usage.completion_tokens > 0)
    assert registry.get_sample_value("kvloom_time_per_output_token_seconds_sum") == 0
    assert registry.get_sample_value("kvloom_prompt_length_tokens_count") == 1


def test_servers_share_no_registry() -> None:
    first, second = Metrics(), Metrics()
    first.disconnects.inc()
    assert second.registry.get_sample_value("kvloom_client_disconnects_total") == 0
    assert REGISTRY.get_sample_value("kvloom_client_disconnects_total") is None


def test_prompts_that_wait_for_a_token_are_the_queue() -> None:
    metrics = Metrics()
    with metrics.awaiting_first_token() as first:
        with pytest.raises(KeyError), metrics.awaiting_first_token():
            raise KeyError
        first()
        first()
        with metrics.awaiting_first_token():
            pass
    value = metrics.registry.get_sample_value
    assert value("kvloom_queue_length_count") == 3
    assert value("kvloom_queue_length_sum") == 1
