"""The engine: takes requests, runs steps, and hands out what each step added.

Knows: the order of a step: schedule, run rows, score, draw, accept, end.
Does not know: threads, HTTP, files or model formats. One caller at a time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from kvloom.config import EngineConfig
from kvloom.cost import CostModel
from kvloom.decode.accept import Emission, GenerationState
from kvloom.decode.detokenize import TextDecoder
from kvloom.decode.draw import Draw, draw
from kvloom.engine.asking import Wishes, make_request
from kvloom.engine.chunks import Chunks
from kvloom.engine.idle import IdleWork
from kvloom.engine.limits import Limits
from kvloom.engine.memory import EngineMemory
from kvloom.engine.repairs import Repairs
from kvloom.engine.request import Computed, Event, Failed, Request, Sequence
from kvloom.engine.watcher import Watcher
from kvloom.errors import CapacityError, KvloomError
from kvloom.kv.compact import tidy
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool
from kvloom.outputs import EngineStats
from kvloom.params import SamplingParams
from kvloom.reuse.repair import Repair
from kvloom.reuse.select import Selector
from kvloom.sched.job import JobState
from kvloom.sched.scheduler import Scheduler, Share
from kvloom.store.key import hash_tenant
from kvloom.types import Forward, KVLayout, SlotRange, StepOutput

logger = logging.getLogger(__name__)
ANYBODY = hash_tenant("")
LOADING_WAIT_S = 0.02
"""Steps with nothing to run wait so long for the store."""


class Engine:
    """Runs requests over one model and one pool of KV memory.

    Attributes:
        memory: the pool, and who holds what of it.
        chunks: KV of parts of prompts.
        watcher: runs rows and takes note of what they attend to.
        costs: gives what passes and loads take; may measure it at the first call.
        idle: what is done while nobody waits.

    Args:
        runner: runs rows.
        decoder: the model's tokenizer, probed.
        config: memory and step sizes.
        fingerprint: of the passport; the lineage of every document starts with it.
        dtype: of the KV.
        layout: of the KV, as the runner reads it.
    """

    def __init__(
        self,
        runner: Forward,
        decoder: TextDecoder,
        config: EngineConfig,
        fingerprint: bytes,
        dtype: torch.dtype = torch.float32,
        layout: KVLayout = "plain",
    ) -> None:
        self.config = config
        self.pool = Pool(runner.spec.layers, config.kv_memory_bytes, dtype, layout=layout)
        self.memory = EngineMemory(
            self.pool, Lineage.root(fingerprint), reuse_prefixes=config.enable_prefix_caching
        )
        self.limits = Limits(
            vocab_size=runner.spec.vocab_size,
            model_positions=runner.spec.max_positions,
            memory_tokens=self.pool.num_blocks * PAGE_SLOTS,
            user_tokens=config.max_model_len,
        )
        self._runner = runner
        self._decoder = decoder
        self._scheduler = Scheduler(
            self.memory,
            step_tokens=config.step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )
        self._requests: dict[str, Request] = {}
        self._repairs = Repairs(self.memory, runner)
        self.chunks = Chunks(self.memory)
        self.watcher = Watcher(self.memory, runner)
        self.costs: Callable[[], CostModel] = partial(CostModel.unmeasured, len(runner.spec.layers))
        self.idle = IdleWork(self.memory)
        self._let_go: deque[KVDoc] = deque()
        self._numbers = count()
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._repairs)

    def submit(
        self,
        prompt_tokens: Many[int],
        params: SamplingParams | None,
        *,
        base: KVDoc | None = None,
        exact_only: bool = False,
        tenant: str = "",
        score_from: int | None = None,
        keep_logits: bool = False,
        storable: bool = True,
    ) -> str:
        """Take a request and return its id.

        Args:
            prompt_tokens: at least one token.
            params: how to generate; None computes the KV and ends with `Computed`.
            base: a document whose KV the prompt may start with.
            exact_only: take of it what equals a fresh prefill, and no more.
            tenant: whose stored KV may answer, as `hash_tenant` gives it.
            score_from: score the prompt's tokens behind this row.
            keep_logits: give the logits of the scored rows as well.
            storable: store the prompt's KV when there is time.

        Raises:
            RequestError: the prompt is empty, too long or outside of the vocabulary.
            CapacityError: too many requests wait.
        """
        number = next(self._numbers)
        request = make_request(
            number,
            self.limits,
            prompt_tokens,
            params,
            Wishes(base, exact_only, tenant or ANYBODY, score_from, keep_logits, storable),
        )
        request.reuse_prefix = self.config.enable_prefix_caching
        tokens = request.prompt_tokens
        sequence = Sequence(number, len(tokens), request=request, index=0, tokens=list(tokens))
        self._scheduler.add(sequence)
        if base is not None and base in self.memory.idle:
            self.memory.hold(base)
        request.sequences.append(sequence)
        self._requests[request.request_id] = request
        return request.request_id

    def repair(
        self,
        doc: KVDoc,
        share: float,
        rule: Selector,
        marked: np.ndarray | None = None,
        within: SlotRange | None = None,
    ) -> str:
        """Compute a share of a document's stale rows again, on a fork of it; return an id.

        The repair ends with `Repaired`.

        Args:
            doc: stays as it is.
            share: of the stale rows, 0 to 1.
            rule: chooses them.
            marked: bool per token of the document, for rules that ask for marks.
            within: repair between these places only; the share is of stale rows there.
        """
        request_id = f"repair-{next(self._numbers)}"
        repair = Repair(doc.fork(), share, rule, self.config.step_tokens, marked, within)
        self._repairs.begin(request_id, repair)
        return request_id

    def cancel(self, request_id: str) -> list[Event]:
        """End a request now; its pages are free when this returns. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            self._repairs.cancel(request_id)
            return []
        self._finished["abort"] += 1
        events: list[Event] = []
        for sequence in request.sequences:
            state = sequence.state_of_text
            if not sequence.ended:
                emission = Emission("", finish_reason="abort") if state is None else state.abort()
                events += self._end(sequence, emission)
        return events

    def step(self) -> list[Event]:
        """Run one forward pass and return what it added."""
        self.release_abandoned()
        shares = self._scheduler.schedule()
        if not shares:
            return self._repairs.step() if self._repairs else self._give_up_on_stuck()
        self.memory.limit_reserves()
        shares.sort(key=_place_in_memory)
        try:
            output = self._runner.forward([_sequence(s).rows(s.num_rows) for s in shares])
        except Exception as error:
            logger.exception("a step failed")
            names = {_sequence(share).request.request_id for share in shares}
            return [event for name in names for event in self._fail(name, error)]
        finally:
            self.memory.begin_step()  # what was promised is taken
        self._counts["steps"] += 1
        events = self._advance(shares, output)
        return events + self._repairs.step() if self._repairs else events

    @property
    def is_busy(self) -> bool:
        """Whether a step or an idle step would do anything."""
        return self.has_work or self.idle.has_work

    def close(self) -> None:
        """Store what waits, as far as time allows, and let go of the store."""
        self.idle.close()

    def new_document(self) -> KVDoc:
        """Return an empty document, held until the receiver releases it."""
        doc = KVDoc(self.pool, self.memory.root)
        self.hold(doc)
        return doc

    def hold(self, doc: KVDoc) -> None:
        """Keep a document that a user holds; its KV is forgotten when room is needed."""
        self.memory.hold(doc)

    def release(self, doc: KVDoc) -> None:
        """Let go of a document that a user held."""
        self.memory.forget(doc)

    def tidy(self, doc: KVDoc) -> None:
        """Let a document that edits have scattered lie together, where that is worth the time."""
        self.release_abandoned()  # what shares blocks with it keeps them where they are
        tidy(doc)

    def abandon(self, doc: KVDoc) -> None:
        """Let go of a document soon; may be called by any thread and by a garbage collector."""
        self._let_go.append(doc)

    def release_abandoned(self) -> None:
        """Let go of the documents that were abandoned."""
        while self._let_go:
            self.release(self._let_go.popleft())

    def stats(self) -> EngineStats:
        """Return counters and gauges."""
        self.release_abandoned()
        tree, pool, counts = self.memory.tree, self.pool, self._counts
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=pool.num_pages,
            pages_free=pool.free_pages,
            page_bytes=pool.block_bytes // pool.pages_per_block,
            kv_bytes_total=pool.nbytes,
            kv_bytes_used=pool.used_bytes,
            idle_documents=(0 if tree is None else tree.num_leaves) + len(self.memory.idle),
            requests_finished=dict(self._finished),
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            computed_tokens=counts["computed"],
            generated_tokens=counts["generated"],
            preemptions=self._scheduler.preemptions,
            steps=counts["steps"],
            prefix_hits=self.memory.hits,
            prefix_queries=self.memory.queries,
        )

    def _advance(self, shares: list[Share], output: StepOutput) -> list[Event]:
        """Score what was asked for, and draw for every sequence whose rows are all computed."""
        events: list[Event] = []
        drawing: list[tuple[Sequence, Tensor, int | None]] = []
        likeliest = output.likeliest or (None,) * len(shares)
        for share, logits, token in zip(shares, output.logits, likeliest, strict=True):
            sequence = _sequence(share)
            request = sequence.request
            repeated = sequence.count_repeated(share.num_rows)
            request.computed_tokens += repeated
            self._counts["computed"] += repeated
            if request.scoring is not None and logits is not None:
                first_row = sequence.num_computed - share.num_rows
                try:
                    request.scoring.take(logits, first_row, self._decoder.tokenizer)
                except KvloomError as error:
                    events += self._fail(request.request_id, error)
            if sequence.ended or sequence.pending:
                continue
            first = sequence.state_of_text is None
            if sequence.doc is not None and (first or share.num_rows > 1):
                self.memory.publish(sequence.doc)
            if request.params is None:
                events += self._end(sequence, None)
            elif logits is not None:
                row = logits.select(0, -1)
                drawing += [(member, row, token) for member in self._members(sequence)]
        return events + self._draw(drawing)

    def _members(self, sequence: Sequence) -> list[Sequence]:
        """Return who draws from a sequence's last row: itself, and its forks at their birth."""
        request, params = sequence.request, sequence.request.params
        if sequence.state_of_text is not None:
            return [sequence]
        assert params is not None
        assert sequence.doc is not None
        self._counts["prompt"] += len(request.prompt_tokens)
        self._counts["cached"] += request.cached_tokens or 0
        for key in request.keys:
            member = sequence
            if key.completion > 0:
                member = self._fork(sequence, key.completion)
            member.state_of_text = GenerationState(
                params,
                self._decoder,
                request.prompt_tokens,
                max_tokens=request.max_tokens,
                key=key,
            )
        return list(request.sequences)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        assert sequence.doc is not None
        fork = Sequence(
            next(self._numbers),
            sequence.num_tokens,
            sequence.num_computed,
            request=sequence.request,
            index=index,
            tokens=list(sequence.tokens),
        )
        self.memory.attach(fork, sequence.doc.fork())
        self._scheduler.start(fork)
        sequence.request.sequences.append(fork)
        return fork

    def _draw(self, drawing: list[tuple[Sequence, Tensor, int | None]]) -> list[Event]:
        events: list[Event] = []
        for sequence, row, likeliest in drawing:
            state = sequence.state_of_text
            if sequence.ended or state is None:
                continue
            try:
                token = draw(row, state.sampling, self._decoder.tokenizer, likeliest)
            except KvloomError as error:
                events += self._fail(sequence.request.request_id, error)
            else:
                events += self._accept(sequence, token)
        return events

    def _accept(self, sequence: Sequence, token: Draw) -> list[Event]:
        request, state = sequence.request, sequence.state_of_text
        assert state is not None
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        self._counts["generated"] += 1
        emission = state.accept(token)
        sequence.tokens.append(token.token_id)
        sequence.num_tokens += 1
        if state.finish is not None:
            return self._end(sequence, emission)
        return [sequence.chunk(emission)]

    def _end(self, sequence: Sequence, emission: Emission | None) -> list[Event]:
        """End a sequence: publish its KV, free its pages; the last one gives the receipt."""
        request = sequence.request
        sequence.ended = True
        running = sequence.state is JobState.RUNNING
        self._scheduler.remove(sequence)
        if running:
            doc = self.memory.detach(sequence)
            self.memory.publish(doc)
            if request.storable:
                self.idle.put_by(doc.tokens, request.tenant)
            request.add_provenance(doc.provenance())
            if request.params is None and emission is None:
                # Held at once, so that it can be forgotten before its receiver takes it.
                self.hold(doc)
                request.result = doc
            else:
                doc.close()
        last = request.num_unfinished == 0
        usage = request.usage(time.monotonic()) if last else None
        cancelled = self._requests.get(request.request_id) is None
        if last and not cancelled:
            del self._requests[request.request_id]
            if emission is not None and emission.finish_reason is not None:
                self._finished[emission.finish_reason] += 1
        if emission is not None:
            return [sequence.chunk(emission, usage)]
        assert request.result is not None
        assert usage is not None
        scoring = request.scoring
        scores = () if scoring is None else tuple(scoring.scores)
        logits = None if scoring is None else scoring.logits
        return [Computed(request.request_id, request.result, usage, scores, logits)]

    def _fail(self, request_id: str, error: Exception) -> list[Event]:
        if not isinstance(error, KvloomError):
            wrapped = KvloomError(f"The step failed ({type(error).__name__}: {error}).")
            wrapped.__cause__ = error
            error = wrapped
        self.cancel(request_id)
        return [Failed(request_id, error)]

    def _give_up_on_stuck(self) -> list[Event]:
        for request in self._requests.values():
            if request.loading is not None:
                request.loading.wait(LOADING_WAIT_S)
                return []
        stuck = self._scheduler.stuck
        if stuck is None:
            return []
        assert isinstance(stuck, Sequence)
        request, runs = stuck.request, stuck.state is JobState.RUNNING
        if runs or request.reuse_prefix or request.base is not None:
            # What is shared leaves blocks half empty; computed alone it takes the fewest.
            request.reuse_prefix, request.base = False, None
            if runs:
                self._scheduler.preempt(stuck)
            return []
        error = CapacityError(
            f"The KV memory of {self.pool.nbytes} bytes cannot hold the request's next tokens, "
            "although nothing else runs; shorten it or raise kv_memory."
        )
        return self._fail(request.request_id, error)


def _sequence(share: Share) -> Sequence:
    assert isinstance(share.job, Sequence)
    return share.job


def _place_in_memory(share: Share) -> tuple[int, int]:
    """Order rows so that the owners of one prefix are neighbours."""
    sequence = _sequence(share)
    assert sequence.doc is not None
    spans = sequence.doc.spans
    return (spans[0].pool_slots[0] if spans else -1, sequence.arrival)
