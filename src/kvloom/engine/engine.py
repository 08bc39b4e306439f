"""The engine: takes requests, runs steps, and hands out what each step added.

Knows: the order of a step: schedule, run rows, score, draw, accept, end.
Does not know: threads, HTTP, files or model formats. One caller at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from itertools import count

import numpy as np
import torch

from kvloom.config import EngineConfig
from kvloom.cost import CostModel
from kvloom.decode.detokenize import TextDecoder
from kvloom.engine.asking import Wishes, make_request
from kvloom.engine.chunks import Chunks
from kvloom.engine.idle import IdleWork
from kvloom.engine.limits import Limits
from kvloom.engine.memory import EngineMemory
from kvloom.engine.open_requests import OpenRequests, sequence_of
from kvloom.engine.repairer import Repairer
from kvloom.engine.repairs import Repairs
from kvloom.engine.request import Event, Request, Sequence
from kvloom.engine.watcher import Watcher
from kvloom.errors import CapacityError
from kvloom.kv.compact import tidy
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool
from kvloom.outputs import EngineStats
from kvloom.params import SamplingParams
from kvloom.reuse.repair import Repair
from kvloom.reuse.select import Selector
from kvloom.sched.job import Job, JobState
from kvloom.sched.scheduler import Scheduler, Share
from kvloom.store.key import ANYBODY
from kvloom.types import Forward, KVLayout, SlotRange

logger = logging.getLogger(__name__)
LOADING_WAIT_S = 0.02
"""Steps with nothing to run wait so long for the store."""
EDIT_WAIT_S = 0.002
"""Steps with nothing to run wait so long for whoever edits to ask for more."""


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
        self._scheduler = Scheduler(
            self.memory,
            step_tokens=config.step_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )
        self._repairs = Repairs(self.memory, runner)
        self.chunks = Chunks(self.memory)
        self._repairer = Repairer(self.memory, runner, config.step_tokens)
        self.idle = IdleWork(self.memory, self._repairer if config.repair_when_idle else None)
        self.watcher = Watcher(self.memory, runner)
        self.costs: Callable[[], CostModel] = partial(CostModel.unmeasured, len(runner.spec.layers))
        self._let_go: deque[KVDoc] = deque()
        self._numbers = count()
        self._num_steps = 0
        self._open = OpenRequests(
            memory=self.memory,
            scheduler=self._scheduler,
            decoder=decoder,
            idle=self.idle,
            arrivals=self._numbers,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._open or self._repairs)

    def submit(
        self,
        prompt_tokens: Many[int],
        params: SamplingParams | None,
        *,
        base: KVDoc | None = None,
        exact_only: bool = False,
        tenant: str = ANYBODY,
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
            tenant: whose KV may answer, and whose this becomes, as `hash_tenant` gives it.
            score_from: score the prompt's tokens behind this row.
            keep_logits: give the logits of the scored rows as well.
            storable: store the prompt's KV when there is time.

        Raises:
            RequestError: the prompt is empty, too long or outside of the vocabulary.
            CapacityError: too many requests wait.
        """
        request = make_request(
            next(self._numbers),
            self.limits,
            prompt_tokens,
            params,
            Wishes(base, exact_only, tenant, score_from, keep_logits, storable),
        )
        request.reuse_prefix = self.config.enable_prefix_caching
        self._open.add(request)
        if base is not None and base in self.memory.idle:
            self.memory.hold(base)
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
        self._repairs.cancel(request_id)
        return self._open.cancel(request_id)

    def step(self) -> list[Event]:
        """Run one forward pass and return what it added."""
        self.release_abandoned()
        shares = self._scheduler.schedule()
        if not shares:
            return self._repairs.step() if self._repairs else self._give_up_on_stuck()
        self.memory.limit_reserves()
        shares.sort(key=_place_in_memory)
        try:
            output = self._runner.forward([sequence_of(s).rows(s.num_rows) for s in shares])
        except Exception as error:
            logger.exception("a step failed")
            names = {sequence_of(share).request.request_id for share in shares}
            return [event for name in names for event in self._open.fail(name, error)]
        finally:
            self.memory.begin_step()  # what was promised is taken
        self._num_steps += 1
        events = self._open.take(shares, output)
        return events + self._repairs.step() if self._repairs else events

    def step_idle(self) -> None:
        """Do a little of what can wait, while nobody does."""
        self.release_abandoned()
        if self.idle.has_work:
            self.idle.step()

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

    def repair_when_idle(self, doc: KVDoc, tenant: str) -> None:
        """Make a held document exact while nobody waits, where the settings allow it.

        Args:
            doc: keeps its tokens; what is not exact of its KV is replaced, piece by piece.
            tenant: whose it is, as `hash_tenant` gives it.
        """
        self.idle.repair(doc, tenant)

    def release(self, doc: KVDoc) -> None:
        """Let go of a document that a user held."""
        self.idle.release(doc)
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
        tree, pool, counts = self.memory.tree, self.pool, self._open.counts
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            pages_total=pool.num_pages,
            pages_free=pool.free_pages,
            page_bytes=pool.block_bytes // pool.pages_per_block,
            kv_bytes_total=pool.nbytes,
            kv_bytes_used=pool.used_bytes,
            idle_documents=(0 if tree is None else tree.num_leaves) + len(self.memory.idle),
            requests_finished=dict(self._open.finished),
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            computed_tokens=counts["computed"],
            generated_tokens=counts["generated"],
            preemptions=self._scheduler.preemptions,
            steps=self._num_steps,
            prefix_hits=self.memory.hits,
            prefix_queries=self.memory.queries,
            idle_repaired_rows=self._repairer.num_rows,
            idle_repair_failures=self._repairer.num_failures,
        )

    def _give_up_on_stuck(self) -> list[Event]:
        for request in self._open.by_id.values():
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
        if self._waits_for_an_edit(request):
            return []
        error = CapacityError(
            f"The KV memory of {self.pool.nbytes} bytes cannot hold the request's next tokens, "
            "although nothing else runs; shorten it or raise kv_memory."
        )
        return self._open.fail(request.request_id, error)

    def _waits_for_an_edit(self, request: Request) -> bool:
        """Whether a request finds room when an edit lets go of what it works on; let that go on.

        Whatever asks for KV alone may be an edit's, and is not made to wait for one.
        """
        if request.params is None or not self.memory.in_work:
            return False
        waiting = [job for job in self._scheduler.waiting if _request(job).params is None]
        if waiting:
            self._scheduler.prefer(waiting[0])
        else:  # whoever edits is about to ask for the next part, or to let go
            time.sleep(EDIT_WAIT_S)
        return True


def _place_in_memory(share: Share) -> tuple[int, int]:
    """Order rows so that the owners of one prefix are neighbours."""
    sequence = sequence_of(share)
    assert sequence.doc is not None
    spans = sequence.doc.spans
    return (spans[0].pool_slots[0] if spans else -1, sequence.arrival)


def _request(job: Job) -> Request:
    assert isinstance(job, Sequence)
    return job.request
