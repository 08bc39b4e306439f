"""What the server and its engine count, in Prometheus' format.

Knows: the names and buckets of the metrics.
Does not know: who asks, or how the engine counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvloom.engine.stored import StoreUse
from kvloom.outputs import EditReceipt, EngineStats, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUESTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
CLIENT_GONE_STATUS = 499

GAUGES = {
    "running": "Sequences that run.",
    "waiting": "Requests that wait.",
    "pages_total": "Pages of the KV pool.",
    "pages_free": "Pages of the KV pool that nobody owns.",
    "page_bytes": "Bytes of a page.",
    "kv_bytes_total": "Bytes of the KV pool.",
    "kv_bytes_used": "Bytes of owned pages.",
    "idle_documents": "Cached prefixes that no running request shows.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of all admitted prompts.",
    "cached_tokens": "Prompt tokens whose KV was reused.",
    "computed_tokens": "Prompt rows that were run.",
    "generated_tokens": "Tokens that were sampled.",
    "preemptions": "Sequences that lost their memory and were computed again.",
    "steps": "Forward passes.",
    "prefix_hits": "Admissions that reused at least one token.",
    "prefix_queries": "Admissions that looked for reusable tokens.",
    "idle_repaired_rows": "Rows of documents that were made exact while nobody waited.",
    "idle_repair_failures": "Documents that could not be made exact while nobody waited.",
}
STORE_COUNTERS = {
    "loaded_tokens": "Tokens whose KV came from the store.",
    "kept_tokens": "Tokens whose KV was handed to the store.",
    "missed_tokens": "Tokens whose stored KV came too late, damaged or not at all.",
    "dropped": "Stretches of KV that were not stored: too many waited, or it failed.",
    "lookups_skipped": "Requests that did not ask the store, because an earlier read hangs.",
    "secret": "Chunks that were kept in memory only, because of credentials.",
}
TIER_COUNTERS = {
    "hits": "Reads that found a chunk, by tier.",
    "misses": "Reads that did not find a chunk, by tier.",
    "stored": "Chunks that were taken, by tier.",
    "refused": "Chunks that were not taken, for lack of room, rights or a connection, by tier.",
    "evicted": "Chunks that made room for others, by tier.",
    "corrupt": "Chunks that were damaged, and removed, by tier.",
    "errors": "Calls of the system or the network that failed, by tier.",
    "skipped": "Calls that were not tried, because those before had failed, by tier.",
}
TIER_GAUGES = {
    "chunks": "Chunks in the store, by tier; 0 where a tier does not know.",
    "nbytes": "Bytes in the store, by tier; 0 where a tier does not know.",
}


class EngineCollector(Collector):
    """Shows the engine's counters as they were when Prometheus asked.

    Attributes:
        stats: the counters.
    """

    def __init__(self) -> None:
        self.stats = EngineStats()

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering shows no counters."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's gauges and counters."""
        for name, help_text in GAUGES.items():
            yield GaugeMetricFamily(f"kvloom_{name}", help_text, value=getattr(self.stats, name))
        for name, help_text in COUNTERS.items():
            yield CounterMetricFamily(f"kvloom_{name}", help_text, value=getattr(self.stats, name))
        finished = CounterMetricFamily(
            "kvloom_requests_finished", "Requests by finish reason.", labels=["reason"]
        )
        for reason, count in self.stats.requests_finished.items():
            finished.add_metric([reason], count)
        yield finished


class StoreCollector(Collector):
    """Shows the store's counters as they were when Prometheus asked.

    Attributes:
        use: the counters; None without a store.
    """

    def __init__(self) -> None:
        self.use: StoreUse | None = None

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering shows no counters."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the store's counters, and those of its tiers."""
        use = self.use
        for name, text in STORE_COUNTERS.items():
            value = None if use is None else getattr(use, name)
            yield CounterMetricFamily(f"kvloom_store_{name}", text, value=value)
        pending = None if use is None else use.pending
        yield GaugeMetricFamily("kvloom_store_pending", "KV on its way to a tier.", value=pending)
        tiers = {} if use is None else use.tiers
        for kind, names in ((CounterMetricFamily, TIER_COUNTERS), (GaugeMetricFamily, TIER_GAUGES)):
            for name, text in names.items():
                shown = "bytes" if name == "nbytes" else name
                family = kind(f"kvloom_store_{shown}", text, labels=["tier"])
                for tier, statistics in tiers.items():
                    family.add_metric([tier], getattr(statistics, name))
                yield family


class Metrics:
    """The server's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._engine = EngineCollector()
        self._num_awaiting = 0
        self._store = StoreCollector()
        registry.register(self._engine)
        registry.register(self._store)
        ProcessCollector(registry=registry)
        self.http_seconds = Histogram(
            "kvloom_http_request_seconds",
            "Seconds from a request's first byte to its reply's last, by route and status.",
            ["method", "route", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self.http_active = Gauge(
            "kvloom_http_requests_active", "HTTP requests under way.", registry=registry
        )
        self.disconnects = Counter(
            "kvloom_client_disconnects",
            "Requests whose client left before the end.",
            registry=registry,
        )
        self.queue_length = Histogram(
            "kvloom_queue_length",
            "Prompts without a first token yet when another was submitted.",
            buckets=REQUESTS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "kvloom_time_to_first_token_seconds",
            "Seconds from submission to the first generated token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token_seconds = Histogram(
            "kvloom_time_per_output_token_seconds",
            "Seconds per generated token after the first.",
            buckets=PER_TOKEN_SECONDS,
            registry=registry,
        )
        self.prompt_length = Histogram(
            "kvloom_prompt_length_tokens", "Tokens per prompt.", buckets=TOKENS, registry=registry
        )

        self.documents = Gauge(
            "kvloom_documents", "Documents that clients keep.", registry=registry
        )
        self.document_edits = Counter(
            "kvloom_document_edits",
            "Changes of documents, by what was done to the KV behind them.",
            ["fidelity"],
            registry=registry,
        )
        self.joined_prompts = Counter(
            "kvloom_joined_prompts",
            "Requests whose documents and chunks were joined, by what was done to their KV.",
            ["fidelity"],
            registry=registry,
        )
        self.joined_rows = Counter(
            "kvloom_joined_rows",
            "Tokens of joined documents and chunks, by whether their KV was computed or reused.",
            ["kv"],
            registry=registry,
        )
        self.parts_read_as_text = Counter(
            "kvloom_parts_read_as_text",
            "Chats whose parts were not joined, since the template does not show them as they are.",
            registry=registry,
        )
        self.document_rows = Counter(
            "kvloom_document_rows",
            "Tokens of edited documents, by whether their KV was computed again or kept.",
            ["kv"],
            registry=registry,
        )

    def exposition(
        self, accept: str, stats: EngineStats, store: StoreUse | None = None
    ) -> tuple[bytes, str]:
        """Return all metrics and their content type.

        Args:
            accept: the `Accept` header.
            stats: the engine's counters as they are now.
            store: the store's counters; None without one.
        """
        self._engine.stats, self._store.use = stats, store
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    @contextmanager
    def awaiting_first_token(self) -> Iterator[Callable[[], None]]:
        """Count a prompt that goes to the engine now, until the yielded function is called."""
        self.queue_length.observe(self._num_awaiting)
        self._num_awaiting += 1
        awaiting = True

        def first_token() -> None:
            nonlocal awaiting
            self._num_awaiting -= awaiting
            awaiting = False

        try:
            yield first_token
        finally:
            first_token()

    def finished(self, usage: Usage) -> None:
        """Count a prompt that was answered."""
        self.prompt_length.observe(usage.prompt_tokens)
        if usage.time_to_first_token_s is None:
            return
        self.first_token_seconds.observe(usage.time_to_first_token_s)
        later_tokens = usage.completion_tokens - 1
        if usage.total_s is not None and later_tokens > 0:
            seconds = max(0.0, usage.total_s - usage.time_to_first_token_s)
            self.per_token_seconds.observe(seconds / later_tokens)

    def joined(self, receipt: EditReceipt, num_tokens: int) -> None:
        """Count a prompt whose parts, of so many tokens, were joined."""
        self.joined_prompts.labels(receipt.fidelity).inc()
        self.joined_rows.labels("computed").inc(receipt.recomputed)
        self.joined_rows.labels("reused").inc(max(0, num_tokens - receipt.recomputed))

    def edited(self, receipt: EditReceipt, num_tokens: int) -> None:
        """Count an edit of a document that has so many tokens now."""
        self.document_edits.labels(receipt.fidelity).inc()
        self.document_rows.labels("recomputed").inc(receipt.recomputed)
        self.document_rows.labels("kept").inc(max(0, num_tokens - receipt.recomputed))


class MeasureRequests:
    """ASGI middleware that times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and time it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        start = time.perf_counter()
        self._metrics.http_active.inc()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.http_active.dec()
            self._observe(scope, status, time.perf_counter() - start)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        # Only known routes and methods become labels: a scanner must not grow the registry.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.http_seconds.labels(method, route, str(status)).observe(seconds)
