"""Memory: gives documents to sequences, and finds room by forgetting what is idle.

Knows: the pool, the prefix tree, idle documents and this step's promises.
Does not know: which sequence runs next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from kvloom.engine.request import Sequence
from kvloom.engine.shelf import Looking, Shelf
from kvloom.kv.copying import append_copies
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, blocks_for
from kvloom.kv.span import Span, assembled, cut, reading_order
from kvloom.reuse.prefix import PrefixTree, common_prefix
from kvloom.sched.job import Admission, Job, JobState

MIN_WORTH_WAITING = 64
"""A prefix that another sequence is computing is worth waiting for from this many tokens on."""
MAX_RESERVE = 512
"""Generated tokens that a document takes room for in advance, so that they lie in one run."""


class EngineMemory:
    """The scheduler's `Memory` over one pool.

    Attributes:
        pool: the slots.
        root: lineage of the empty document.
        tree: known prefixes; None if nothing is to be reused.
        idle: documents that users hold, least recently used first; their KV is forgotten when
            room is needed.
        in_work: documents that are not forgotten for the time being, with how many ask for it.
        shelf: prefixes that outlive the pool; None for none.
    """

    def __init__(self, pool: Pool, root: Lineage, *, reuse_prefixes: bool) -> None:
        self.pool = pool
        self.root = root
        self.tree = PrefixTree(pool, root) if reuse_prefixes else None
        self.idle: dict[KVDoc, None] = {}
        self.in_work: Counter[KVDoc] = Counter()
        self.shelf: Shelf | None = None
        self.hits = 0
        self.queries = 0
        self._running: dict[Sequence, KVDoc] = {}
        self._promises: dict[Sequence, int] = {}
        self._promised_blocks = 0

    def begin_step(self) -> None:
        """Forget the promises of the last step."""
        self._promises.clear()
        self._promised_blocks = 0

    def admit(self, job: Job) -> Admission:
        """Give a waiting sequence its document, starting with the KV that is known already."""
        assert isinstance(job, Sequence)
        reusable = self._reusable_tokens(job)
        if self._waits_for_store(job, reusable):
            return "wait for the store"
        spans = self._known_spans(job, reusable)
        known = sum(span.length for span in reading_order(spans))
        if self._is_being_computed(job, known, reusable):
            return "wait for a prefix"
        doc = KVDoc(self.pool, self.root, spans)
        if job.request.base is not None:
            doc.learn_from(job.request.base)
        # Less than a block saves no memory when it is shared, but one more piece in every fold.
        copies = 0 < known < PAGE_SLOTS and doc.exact_length() == known
        missing = len(job.tokens) - (0 if copies else known)
        # Beside others a new sequence leaves a block to grow into, lest it be preempted at once.
        margin = 1 if self._running else 0
        if not self.make_room(blocks_for(missing) + margin, doc):
            doc.close()
            return "no room"
        if copies:
            doc = self._copied(doc, len(job.tokens))
        self._count(job, known)
        self.attach(job, doc)
        job.num_computed = known
        return "admitted"

    def _copied(self, doc: KVDoc, expected_length: int) -> KVDoc:
        """Return a document with its own copy of another one's KV, which is closed."""
        copy = KVDoc(self.pool, self.root)
        copy.expected_length = expected_length
        append_copies(copy, doc.spans)
        doc.close()
        return copy

    def attach(self, sequence: Sequence, doc: KVDoc) -> None:
        """Let a sequence run on a document."""
        sequence.doc = doc
        self._running[sequence] = doc

    def promise(self, job: Job, num_rows: int) -> bool:
        """Make sure that so many rows can be appended in this step."""
        assert isinstance(job, Sequence)
        assert job not in self._promises, "promised a job twice in a step"
        self._promises[job] = num_rows
        self._promised_blocks += self._running[job].blocks_needed(num_rows)
        if self._promised_blocks <= self.pool.free_blocks:
            return True
        for doc in self._running.values():
            doc.shrink()
        self._count_promises()
        if self.make_room(0):
            return True
        del self._promises[job]
        self._count_promises()
        return False

    def limit_reserves(self) -> None:
        """Let documents take room ahead of their rows only where nobody was promised it."""
        spare = self.pool.free_blocks - self._promised_blocks
        for sequence in self._promises:
            doc, request = self._running[sequence], sequence.request
            expected = len(request.prompt_tokens) + min(request.max_tokens, MAX_RESERVE)
            ahead = doc.blocks_needed(max(expected - doc.length, 0))
            doc.expected_length = expected if ahead <= spare else 0
            spare -= ahead if ahead <= spare else 0

    def withdraw(self, job: Job) -> None:
        """Take a sequence's memory away; published prefixes may still be found again."""
        assert isinstance(job, Sequence)
        self._promises.pop(job, None)
        self.detach(job).close()
        self._count_promises()

    def detach(self, sequence: Sequence) -> KVDoc:
        """Take the document from a sequence and return it; the receiver owns it."""
        doc = self._running.pop(sequence)
        sequence.doc = None
        return doc

    def hold(self, doc: KVDoc) -> None:
        """Keep a document that a user holds, as the one used last."""
        self.idle.pop(doc, None)
        self.idle[doc] = None

    def forget(self, doc: KVDoc) -> None:
        """Let go of a held document."""
        self.idle.pop(doc, None)
        self.in_work.pop(doc, None)
        doc.close()

    def protect(self, doc: KVDoc) -> None:
        """Keep a held document from being forgotten, as often as `unprotect` is called later."""
        self.idle.pop(doc, None)
        self.in_work[doc] += 1

    def unprotect(self, doc: KVDoc) -> None:
        """Let a protected document be forgotten again when room is needed."""
        if doc not in self.in_work:  # somebody has let go of it
            return
        self.in_work[doc] -= 1
        if self.in_work[doc] == 0:
            del self.in_work[doc]
            self.hold(doc)

    def fork_protected(self, doc: KVDoc) -> KVDoc:
        """Return a fork that nobody else can let go of, and that is protected until it is."""
        fork = doc.fork()
        self.protect(fork)
        return fork

    def known_spans(self, tokens: list[int], tenant: str) -> list[Span]:
        """Return the exact KV that a tenant may reuse of these tokens' beginning."""
        return [] if self.tree is None else self.tree.match(tokens, tenant)

    def known_prefix(self, tokens: list[int], tenant: str) -> int:
        """Return how many leading tokens have exact KV that a tenant may reuse."""
        return sum(span.length for span in self.known_spans(tokens, tenant))

    @property
    def moment(self) -> int:
        """A moment behind all uses of prefixes so far."""
        return 0 if self.tree is None else self.tree.now

    def make_spare_room(self, num_blocks: int, moment: int) -> None:
        """Free blocks by forgetting prefixes that nobody has used since a moment, and no more."""
        missing = num_blocks - self.pool.free_blocks
        if missing > 0 and self.tree is not None:
            self.tree.evict(missing, moment)

    def publish(self, doc: KVDoc, tenant: str) -> None:
        """Let a tenant's other requests reuse what a document holds."""
        if self.tree is not None:
            self.tree.insert(doc, tenant)

    def check(self) -> None:
        """Check that every block's owners are the documents and prefixes that show it.

        Raises:
            AssertionError: the books are wrong.
        """
        holders: Iterable[KVDoc] = [*self._running.values(), *self.idle, *self.in_work]
        ranges = [pair for doc in holders for pair in doc.owned_ranges()]
        ranges += self.tree.owned_ranges() if self.tree is not None else []
        owners = self.pool.owners()
        for first_slot, stop_slot in ranges:
            owners[first_slot // PAGE_SLOTS : blocks_for(stop_slot)] -= 1
        assert not owners.any(), "blocks with owners that nobody knows"
        assert self.pool.free_blocks == int((self.pool.owners() == 0).sum())

    def _reusable_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens need no logits; the last one's are always needed."""
        scoring = sequence.request.scoring
        last = len(sequence.tokens) - 1
        return last if scoring is None else min(scoring.next_row, last)

    def _known_spans(self, sequence: Sequence, limit: int) -> list[Span]:
        request = sequence.request
        known: list[Span] = []
        if request.reuse_prefix and self.tree is not None:
            matched = self.tree.match(sequence.tokens[:limit], request.tenant)
            known = list(cut(matched, 0, limit))
        base = request.base
        if base is not None:
            shared = min(common_prefix(base.tokens, sequence.tokens), limit)
            if request.exact_only:
                shared = min(shared, base.exact_length())
            if shared > sum(span.length for span in known):
                base.close_tail()
                known = list(assembled(cut(base.order, 0, shared)))
        return known

    def _waits_for_store(self, sequence: Sequence, limit: int) -> bool:
        """Whether the store is about to give more of a prompt; what it gave is made known."""
        request, shelf = sequence.request, self.shelf
        if shelf is None or self.tree is None or not request.reuse_prefix:
            return False
        if not request.asked_store:
            request.asked_store = True
            tokens = sequence.tokens[:limit]
            known = self.known_prefix(tokens, request.tenant)
            request.loading = shelf.look(tokens, known, request.tenant)
        loading = request.loading
        if isinstance(loading, Looking) and loading.over:
            loading = request.loading = shelf.load(loading)
        if loading is None:
            return False
        if isinstance(loading, Looking):
            return True
        if not loading.over:
            return True
        request.loading = None
        if self.make_room(loading.num_blocks):
            doc = shelf.take(loading)
            self.tree.insert(doc, request.tenant)
            doc.close()
        return False

    def _is_being_computed(self, sequence: Sequence, known: int, limit: int) -> bool:
        """Whether a running sequence of the same tenant is about to compute more of the prefix."""
        request = sequence.request
        if self.tree is None or not request.reuse_prefix:
            return False
        for other in self._running:
            if other.request.tenant != request.tenant:
                continue
            unfinished = other.state_of_text is None or other.pending > 1
            if other.state is JobState.RUNNING and unfinished:
                shared = min(common_prefix(other.tokens, sequence.tokens), limit)
                if shared - known >= MIN_WORTH_WAITING:
                    return True
        return False

    def _count(self, sequence: Sequence, known: int) -> None:
        request = sequence.request
        if request.cached_tokens is None:
            self.queries += 1
            self.hits += known > 0
        if sequence.state_of_text is None:
            # After a preemption in the middle of its prompt, more of it may be known.
            request.cached_tokens = max(request.cached_tokens or 0, known)

    def _count_promises(self) -> None:
        """Add up the promised blocks again, after documents gave back what they had reserved."""
        self._promised_blocks = sum(
            self._running[sequence].blocks_needed(num_rows)
            for sequence, num_rows in self._promises.items()
        )

    def make_room(self, num_blocks: int, candidate: KVDoc | None = None) -> bool:
        """Make sure of free blocks beyond this step's promises; least recently used prefixes go.

        Nothing is forgotten where that would not be enough.
        """
        wanted = self._promised_blocks + num_blocks
        missing = wanted - self.pool.free_blocks
        if missing > 0 and wanted > self.pool.num_blocks - self._blocks_in_use(candidate):
            return False
        if missing > 0 and self.tree is not None:
            missing -= self.tree.evict(missing)
        for doc in list(self.idle):
            if missing <= 0:
                break
            before = self.pool.free_blocks
            doc.truncate(0)
            missing -= self.pool.free_blocks - before
        return missing <= 0

    def _blocks_in_use(self, candidate: KVDoc | None) -> int:
        """Return how many blocks documents in use and a candidate hold."""
        in_use = np.zeros(self.pool.num_blocks, dtype=bool)
        docs = [*self._running.values(), *self.in_work, *([] if candidate is None else [candidate])]
        for doc in docs:
            for first_slot, stop_slot in doc.owned_ranges():
                in_use[first_slot // PAGE_SLOTS : blocks_for(stop_slot)] = True
        return int(in_use.sum())
