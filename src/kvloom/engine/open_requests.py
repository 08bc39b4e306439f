"""Open requests: what a step gave becomes scores, tokens and text, up to the end of each.

Knows: the requests that have not ended, how a last row becomes a token, and what is left of a
sequence that ends.
Does not know: how rows are chosen or run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from torch import Tensor

from kvloom.decode.accept import Emission, GenerationState
from kvloom.decode.detokenize import TextDecoder
from kvloom.decode.draw import Draw, draw
from kvloom.engine.idle import IdleWork
from kvloom.engine.memory import EngineMemory
from kvloom.engine.request import Computed, Event, Failed, Request, Sequence
from kvloom.errors import KvloomError, as_kvloom_error
from kvloom.sched.job import JobState
from kvloom.sched.scheduler import Scheduler, Share
from kvloom.types import StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequests:
    """The requests of one engine that have not ended.

    Attributes:
        memory: holds their documents.
        scheduler: says what runs of them.
        decoder: turns tokens into text.
        idle: is told what came up.
        arrivals: numbers for sequences.
        by_id: the requests, oldest first.
        counts: tokens of all requests, ended ones too, by what was done with them.
        finished: ended requests by finish reason.
    """

    memory: EngineMemory
    scheduler: Scheduler
    decoder: TextDecoder
    idle: IdleWork
    arrivals: Iterator[int]
    by_id: dict[str, Request] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(
        default_factory=lambda: Counter({"stop": 0, "length": 0, "abort": 0})
    )

    def __len__(self) -> int:
        return len(self.by_id)

    def add(self, request: Request) -> None:
        """Let a request wait for its first step.

        Raises:
            CapacityError: too many wait.
        """
        number, tokens = next(self.arrivals), list(request.prompt_tokens)
        sequence = Sequence(number, len(tokens), request=request, index=0, tokens=tokens)
        self.scheduler.add(sequence)
        request.sequences.append(sequence)
        self.by_id[request.request_id] = request

    def cancel(self, request_id: str) -> list[Event]:
        """End a request now; its pages are free when this returns. Unknown ids are ignored."""
        request = self.by_id.pop(request_id, None)
        if request is None:
            return []
        self.finished["abort"] += 1
        events: list[Event] = []
        for sequence in request.sequences:
            state = sequence.state_of_text
            if not sequence.ended:
                emission = Emission("", finish_reason="abort") if state is None else state.abort()
                events += self._end(sequence, emission)
        return events

    def fail(self, request_id: str, error: Exception) -> list[Event]:
        """End a request with an error."""
        self.cancel(request_id)
        return [Failed(request_id, as_kvloom_error(error, "The step"))]

    def take(self, shares: Many[Share], output: StepOutput) -> list[Event]:
        """Score what was asked for, and draw for every sequence whose rows are all computed."""
        events: list[Event] = []
        drawing: list[tuple[Sequence, Tensor, int | None]] = []
        likeliest = output.likeliest or (None,) * len(shares)
        for share, logits, token in zip(shares, output.logits, likeliest, strict=True):
            sequence = sequence_of(share)
            request = sequence.request
            repeated = sequence.count_repeated(share.num_rows)
            request.computed_tokens += repeated
            self.counts["computed"] += repeated
            if request.scoring is not None and logits is not None:
                first_row = sequence.num_computed - share.num_rows
                try:
                    request.scoring.take(logits, first_row, self.decoder.tokenizer)
                except KvloomError as error:
                    events += self.fail(request.request_id, error)
            if sequence.ended or sequence.pending:
                continue
            first = sequence.state_of_text is None
            if sequence.doc is not None and (first or share.num_rows > 1):
                self.memory.publish(sequence.doc, request.tenant)
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
        self.counts["prompt"] += len(request.prompt_tokens)
        self.counts["cached"] += request.cached_tokens or 0
        for key in request.keys:
            member = sequence
            if key.completion > 0:
                member = self._fork(sequence, key.completion)
            member.state_of_text = GenerationState(
                params,
                self.decoder,
                request.prompt_tokens,
                max_tokens=request.max_tokens,
                key=key,
            )
        return list(request.sequences)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        assert sequence.doc is not None
        fork = Sequence(
            next(self.arrivals),
            sequence.num_tokens,
            sequence.num_computed,
            request=sequence.request,
            index=index,
            tokens=list(sequence.tokens),
        )
        self.memory.attach(fork, sequence.doc.fork())
        self.scheduler.start(fork)
        sequence.request.sequences.append(fork)
        return fork

    def _draw(self, drawing: list[tuple[Sequence, Tensor, int | None]]) -> list[Event]:
        events: list[Event] = []
        for sequence, row, likeliest in drawing:
            state = sequence.state_of_text
            if sequence.ended or state is None:
                continue
            try:
                token = draw(row, state.sampling, self.decoder.tokenizer, likeliest)
            except KvloomError as error:
                events += self.fail(sequence.request.request_id, error)
            else:
                events += self._accept(sequence, token)
        return events

    def _accept(self, sequence: Sequence, token: Draw) -> list[Event]:
        request, state = sequence.request, sequence.state_of_text
        assert state is not None
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        self.counts["generated"] += 1
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
        self.idle.note_work()
        running = sequence.state is JobState.RUNNING
        self.scheduler.remove(sequence)
        if running:
            doc = self.memory.detach(sequence)
            self.memory.publish(doc, request.tenant)
            if request.storable:
                self.idle.put_by(doc.tokens, request.tenant)
            request.add_provenance(doc.provenance())
            if request.params is None and emission is None:
                # Held at once, so that it can be forgotten before its receiver takes it.
                self.memory.hold(doc)
                request.result = doc
            else:
                doc.close()
        last = request.num_unfinished == 0
        usage = request.usage(time.monotonic()) if last else None
        cancelled = self.by_id.get(request.request_id) is None
        if last and not cancelled:
            del self.by_id[request.request_id]
            if emission is not None and emission.finish_reason is not None:
                self.finished[emission.finish_reason] += 1
        if emission is not None:
            return [sequence.chunk(emission, usage)]
        assert request.result is not None
        assert usage is not None
        scoring = request.scoring
        scores = () if scoring is None else tuple(scoring.scores)
        logits = None if scoring is None else scoring.logits
        return [Computed(request.request_id, request.result, usage, scores, logits)]


def sequence_of(share: Share) -> Sequence:
    """Return what a share of a step belongs to."""
    assert isinstance(share.job, Sequence)
    return share.job
