"""An engine over the fake model, with everything it owes to whom kept beside it.

Knows: what each request must answer, and how to check it after every step.
Does not know: how the engine comes to its answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from kvloom.config import EngineConfig
from kvloom.decode.detokenize import TextDecoder
from kvloom.decode.draw import draw
from kvloom.decode.state import DrawKey, SamplingState
from kvloom.engine.engine import Engine
from kvloom.engine.loop import Mailbox, Submission
from kvloom.engine.request import Computed, Event, Failed
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import block_bytes
from kvloom.outputs import StreamChunk, Usage
from kvloom.params import SamplingParams
from kvloom.reuse.prefix import common_prefix
from kvloom.reuse.retokenize import Retokenizer
from kvloom.store.key import ANYBODY
from kvloom.types import Rows
from tests.fake_model import EOS, VOCAB_SIZE, FakeRunner, LetterTokenizer, Oracle

TOKENIZER = LetterTokenizer()
BOOKS = [np.random.default_rng(seed).integers(1, VOCAB_SIZE, 400).tolist() for seed in range(3)]


class NotingEngine(Engine):
    """An engine that takes note of what is computed for whom.

    Attributes:
        submitted: tenant and tokens by the name of a request, and of documents made exact.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.submitted: dict[str, tuple[str, list[int]]] = {}

    def submit(self, tokens: Sequence[int], *given: Any, **wishes: Any) -> str:
        name = super().submit(tokens, *given, **wishes)
        self.submitted[name] = (wishes.get("tenant", ANYBODY), list(tokens))
        return name

    def repair_when_idle(self, doc: KVDoc, tenant: str) -> None:
        self.submitted[f"document {len(self.submitted)}"] = (tenant, doc.tokens)
        super().repair_when_idle(doc, tenant)


def fake_engine(
    blocks: int = 64,
    runner: FakeRunner | None = None,
    fingerprint: bytes = b"one model",
    **settings: Any,
) -> NotingEngine:
    """An engine with so many blocks of 64 tokens, full of NaN."""
    runner = runner or FakeRunner()
    settings.setdefault("repair_when_idle", False)  # where approximate KV is looked at, it stays
    size = block_bytes(runner.spec.layers, torch.float32)
    config = EngineConfig(kv_memory_bytes=blocks * size, **settings)
    engine = NotingEngine(runner, TextDecoder.probe(TOKENIZER), config, fingerprint)
    for arena in (*engine.pool.keys, *engine.pool.values):
        arena.fill_(torch.nan)
    return engine


def greedy(max_tokens: int | None = 8, **fields: Any) -> SamplingParams:
    """Parameters that leave nothing to chance."""
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **fields})


def expected_completion(
    oracle: Oracle, prompt: Sequence[int], params: SamplingParams, index: int, limit: int
) -> tuple[list[int], str, int | None]:
    """Return tokens, finish reason and stop reason of one completion, one forward at a time."""
    assert params.seed is not None or params.greedy
    key = DrawKey((params.seed or 0) % 2**64, index)
    state = SamplingState(params, list(prompt), key=key, eos_token_ids={EOS})
    tokens: list[int] = []
    room = limit - len(prompt)
    most = min(params.max_tokens or room, room)
    while True:
        drawn = draw(oracle.logits([*prompt, *tokens]), state, TOKENIZER)
        tokens.append(drawn.token_id)
        state.record(drawn.token_id)
        if len(tokens) >= params.min_tokens:
            if drawn.token_id == EOS and not params.ignore_eos:
                return tokens, "stop", None
            if drawn.token_id in params.stop_token_ids:
                return tokens, "stop", drawn.token_id
        if len(tokens) >= most:
            return tokens, "length", None


def check_states(states: Mapping[str, int], length: int) -> None:
    """Check that tokens by state add up; an inexact token may be so for several reasons."""
    sure = states.get("exact", 0) + states.get("forgotten", 0)
    reasons = [count for name, count in states.items() if name not in {"exact", "forgotten"}]
    assert sure + max(reasons, default=0) <= length <= sure + sum(reasons)


def expected_logprobs(oracle: Oracle, tokens: Sequence[int], first_row: int = 0) -> list[float]:
    """Return the log-probability of every token behind row `first_row`, from a plain softmax."""
    found = []
    for place in range(first_row + 1, len(tokens)):
        row = oracle.logits(tokens[:place]).double().log_softmax(0)
        found.append(float(row[tokens[place]]))
    return found


@dataclass
class Asked:
    """A request and what has come of it.

    Attributes:
        prompt: its tokens.
        params: how to generate; None for KV only.
        score_from: row whose successors are scored; None for none.
        chunks: what came, by completion.
        done: whether its last event has come.
        tenant: whose it is.
    """

    prompt: list[int]
    params: SamplingParams | None
    score_from: int | None = None
    chunks: dict[int, list[StreamChunk]] = field(default_factory=dict)
    usage: Usage | None = None
    computed: Computed | None = None
    failed: Failed | None = None
    done: bool = False
    tenant: str = ANYBODY

    def tokens(self, index: int = 0) -> list[int]:
        return [token for chunk in self.chunks[index] for token in chunk.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks[index])

    def take(self, event: Event) -> None:
        """Check that the event may come now, and keep it."""
        assert not self.done, "an event behind the last one"
        if isinstance(event, Failed):
            self.failed, self.done = event, True
        elif isinstance(event, Computed):
            assert self.params is None
            self.computed, self.usage, self.done = event, event.usage, True
        else:
            before = self.chunks.setdefault(event.index, [])
            assert not before or before[-1].finish_reason is None, "a chunk behind the last one"
            assert len(event.token_ids) == 1, "a step adds one token"
            first = not any(len(chunks) for chunks in self.chunks.values())
            wanted = self.params is not None and self.params.prompt_logprobs is not None
            assert (event.prompt_logprobs is not None) == (first and wanted)
            before.append(event)
            self.usage, self.done = event.usage, event.usage is not None


@dataclass
class Held:
    """A document as a user holds it: its tokens, and the KV that may have been forgotten."""

    tokens: list[int]
    kv: KVDoc
    tenant: str = ANYBODY


class SteppedLoop:
    """Stands for `EngineLoop` on one thread: who waits steps, and all else goes on meanwhile."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call(self, task: Callable[[Engine], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(self._world.engine))
        except Exception as error:
            future.set_exception(error)
        return future

    def submit(self, tasks: Sequence[Submission], mailbox: Mailbox) -> Future[list[str]]:
        (task,) = tasks
        future = self.call(task)
        if future.exception() is None:
            name = future.result()
            self._world.mailboxes[name] = mailbox
            while name in self._world.mailboxes:
                self._world.step()
        return future

    def submit_and_wait(self, tasks: Sequence[Submission], mailbox: Mailbox) -> list[str]:
        """Submit a request that generates; it goes on to its end."""
        future = self.submit(tasks, mailbox)
        return [future.result()]

    def cancel(self, request_id: str) -> None:
        assert self._world.engine.cancel(request_id) == [], "it has ended"

    def cancel_submitted(self, submitted: Future[list[str]]) -> None:
        assert submitted.exception() is not None

    def abandon(self, doc: KVDoc) -> None:
        self._world.engine.abandon(doc)


class World:
    """Requests and documents over one engine; checks every event and every step."""

    def __init__(self, **settings: Any) -> None:
        self.runner = FakeRunner(num_layers=2)
        self.engine = fake_engine(runner=self.runner, **settings)
        self.oracle = Oracle()
        self.asked: dict[str, Asked] = {}
        self.docs: list[Held] = []
        self.mailboxes: dict[str, Mailbox] = {}
        self.submitted = self.engine.submitted
        self.loop = SteppedLoop(self)
        self.tokenizer, self.spec = TOKENIZER, self.runner.spec
        self.retokenizer = Retokenizer(TOKENIZER)

    @property
    def limit(self) -> int:
        return self.engine.limits.max_tokens

    @property
    def open(self) -> list[str]:
        return [name for name, asked in self.asked.items() if not asked.done]

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None,
        *,
        held: Held | None = None,
        score_from: int | None = None,
        tenant: str = ANYBODY,
    ) -> Asked:
        tenant = tenant if held is None else held.tenant
        asked = Asked(list(prompt), params, score_from, tenant=tenant)
        name = self.engine.submit(
            asked.prompt,
            params,
            base=None if held is None else held.kv,
            tenant=tenant,
            score_from=score_from,
            keep_logits=score_from is not None,
        )
        if params is not None and params.prompt_logprobs is not None:
            asked.score_from = 0
        self.asked[name] = asked
        return asked

    def step(self) -> None:
        for event in self.engine.step():
            if event.request_id in self.mailboxes:
                last = not isinstance(event, StreamChunk) or event.usage is not None
                find = self.mailboxes.pop if last else self.mailboxes.get
                find(event.request_id)(event)  # type: ignore[misc]
                continue
            asked = self.asked[event.request_id]
            asked.take(event)
            if asked.done:
                self.check_answer(asked)
                self.check_whose(event.request_id)
        self.check_step()

    def run(self, max_steps: int = 40_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to an end"
        assert not self.open

    def cancel(self, name: str) -> None:
        """Cancel: everything that was not shown comes at once, and nothing comes after."""
        asked = self.asked[name]
        events = self.engine.cancel(name)
        chunks = [event for event in events if isinstance(event, StreamChunk)]
        assert chunks == events
        assert [chunk.usage is not None for chunk in chunks].count(True) == 1
        assert chunks[-1].usage is not None
        assert all(chunk.finish_reason == "abort" and not chunk.token_ids for chunk in chunks)
        asked.done = True
        for index in asked.chunks:
            assert asked.params is not None
            whole = expected_completion(self.oracle, asked.prompt, asked.params, index, self.limit)
            assert asked.tokens(index) == whole[0][: len(asked.tokens(index))]
        assert self.engine.cancel(name) == []
        self.engine.memory.check()

    def check_step(self) -> None:
        engine, config = self.engine, self.engine.config
        engine.memory.check()
        if self.runner.steps:
            assert 1 <= sum(self.runner.steps[-1]) <= config.step_tokens
        stats = engine.stats()
        assert stats.kv_bytes_used == (stats.pages_total - stats.pages_free) * stats.page_bytes
        assert stats.running <= config.max_running or any(
            a.params is not None and a.params.n > 1 for a in self.asked.values()
        )

    def check_answer(self, asked: Asked) -> None:
        assert asked.failed is None, str(asked.failed)
        assert asked.usage is not None
        if asked.params is not None:
            self._check_completions(asked, asked.params)
        if asked.score_from is not None:
            self._check_scores(asked, asked.score_from)
        if asked.computed is not None:
            assert asked.computed.doc.tokens == asked.prompt
            assert asked.computed.doc.exact_length() == len(asked.prompt)
        self._check_usage(asked, asked.usage)

    def check_whose(self, name: str) -> None:
        """Check that what was reused had been computed for the same tenant."""
        asked, usage = self.asked[name], self.asked[name].usage
        if usage is None or usage.preemptions:  # preempted, it finds what it computed itself
            return
        others = [
            tokens
            for other, (whose, tokens) in self.submitted.items()
            if other != name and whose == asked.tenant
        ]
        others += [
            [*other.prompt, *other.tokens(index)]
            for other in self.asked.values()
            if other is not asked and other.tenant == asked.tenant
            for index in other.chunks
        ]
        known = max((common_prefix(asked.prompt, tokens) for tokens in others), default=0)
        assert usage.cached_tokens <= known, "KV of another tenant answered"

    def _check_completions(self, asked: Asked, params: SamplingParams) -> None:
        assert sorted(asked.chunks) == list(range(params.n))
        for index, chunks in asked.chunks.items():
            expected = expected_completion(self.oracle, asked.prompt, params, index, self.limit)
            last = chunks[-1]
            assert (asked.tokens(index), last.finish_reason, last.stop_reason) == expected
            shown = expected[0][:-1] if expected[1] == "stop" else expected[0]
            assert asked.text(index) == TOKENIZER.decode(shown)

    def _check_scores(self, asked: Asked, score_from: int) -> None:
        expected = expected_logprobs(self.oracle, asked.prompt, score_from)
        targets = asked.prompt[score_from + 1 :]
        if asked.computed is not None:
            entries = list(asked.computed.scores)
            if targets:
                rows = [
                    self.oracle.logits(asked.prompt[: score_from + 1 + i])
                    for i in range(len(targets))
                ]
                assert asked.computed.logits is not None
                assert torch.equal(asked.computed.logits, torch.stack(rows))
        else:
            (found,) = [
                c.prompt_logprobs
                for c in itertools.chain(*asked.chunks.values())
                if c.prompt_logprobs is not None
            ]
            assert found[0] is None
            entries = [entry for entry in found[1:] if entry is not None]
        scores = [entry[token].logprob for token, entry in zip(targets, entries, strict=True)]
        np.testing.assert_allclose(scores, expected, atol=1e-5)

    def _check_usage(self, asked: Asked, usage: Usage) -> None:
        prompt, generated = len(asked.prompt), sum(len(asked.tokens(i)) for i in asked.chunks)
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, generated)
        assert 0 <= usage.cached_tokens < prompt
        assert usage.cached_tokens + usage.computed_tokens >= prompt
        if usage.preemptions == 0:
            assert usage.cached_tokens + usage.computed_tokens == prompt
        if asked.params is not None:
            assert usage.time_to_first_token_s is not None
        assert set(usage.provenance.tokens) <= {"exact"}

    def compute(
        self, tokens: Sequence[int], held: Held | None = None, tenant: str = ANYBODY
    ) -> KVDoc | None:
        """Compute a document's KV to the end; None if there is no room for it now."""
        asked = self.submit(tokens, None, held=held, tenant=tenant)
        while not asked.done:
            self.step()
        return None if asked.computed is None else asked.computed.doc

    def idle(self, max_steps: int) -> int:
        """Do what is done while nobody waits, whatever the clock says; return how many steps."""
        for done in range(max_steps):
            self.engine.release_abandoned()
            if self.engine.idle.begins_in_s is None:
                return done
            held = {doc: doc.length for doc in self.engine.memory.idle}
            self.engine.idle.step()
            assert {doc: doc.length for doc in self.engine.memory.idle} == held, "forgot a document"
            self.check_step()
        return max_steps

    def check_exact_part(self, kv: KVDoc) -> None:
        """Check that what a document calls exact is what a fresh prefill would hold."""
        tokens, exact = kv.tokens, kv.exact_length()
        if self.engine.pool.free_blocks < 2:
            return
        fork = kv.fork()
        fork.truncate(exact)
        row = Rows(fork, np.array([5]), np.array([exact]), "last")
        (logits,) = self.runner.forward([row]).logits
        fork.close()
        assert logits is not None
        assert torch.equal(logits[-1], self.oracle.logits([*tokens[:exact], 5]))

    def close(self) -> None:
        """End everything; every page must come back."""
        for name in self.open:
            self.cancel(name)
        for held in self.docs:
            self.engine.release(held.kv)
        self.engine.chunks.clear()
        if self.engine.memory.tree is not None:
            self.engine.memory.tree.clear()
        self.engine.memory.check()
        assert self.engine.pool.free_blocks == self.engine.pool.num_blocks
        assert not self.engine.has_work
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.idle_documents) == (0, 0, 0)


class Prompt(list[int]):
    """The first tokens of a book and some of its own, which shows itself briefly."""

    def __init__(self, book: int, length: int, own: Sequence[int]) -> None:
        super().__init__([*BOOKS[book][:length], *own])
        self._shown = f"Prompt({book}, {length}, {list(own)})"

    def __repr__(self) -> str:
        return self._shown


@st.composite
def prompts(draw: st.DrawFn, longest: int = 200) -> list[int]:
    """Prompts that often share a prefix with others, sometimes to the last token."""
    own = draw(st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=5))
    edges = st.sampled_from([63, 64, 65, 127, 128, 129])
    length = draw(st.one_of(st.integers(1, longest - 5), edges))
    return Prompt(draw(st.integers(0, 2)), min(length, longest - len(own)), own)


params = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 3),
    max_tokens=st.one_of(st.integers(1, 12), st.just(70), st.none()),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=2).map(tuple),
    prompt_logprobs=st.sampled_from([None, None, None, 0, 2]),
)
