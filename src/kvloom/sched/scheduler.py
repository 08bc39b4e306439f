"""Continuous batching: decodes first, then prefill chunks under a token budget, then admissions.

Knows: jobs, their order of arrival and how many rows a step may hold.
Does not know: tensors, documents or texts; memory answers through a protocol.

Source: Yu et al. (Orca, 2022) for iteration-level scheduling; Agrawal et al. (Sarathi-Serve, 2024)
for chunked prefill beside decodes; preemption by recomputation as in Kwon et al. (vLLM, 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from kvloom.errors import CapacityError
from kvloom.sched.job import Job, JobState, Memory


@dataclass(frozen=True, slots=True)
class Share:
    """What one job runs in a step.

    Attributes:
        job: the job.
        num_rows: its next rows.
    """

    job: Job
    num_rows: int


class Scheduler:
    """Decides every step; holds the jobs that run and that wait."""

    def __init__(
        self, memory: Memory, *, step_tokens: int, max_running: int, max_waiting: int
    ) -> None:
        self._memory = memory
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.preemptions = 0

    def add(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            CapacityError: too many wait already, those that may run at once not counted.
        """
        may_run = max(self._max_running - len(self.running), 0)
        if len(self.waiting) >= self._max_waiting + may_run:
            raise CapacityError(
                f"{len(self.waiting)} requests wait already, which is the limit; send this one "
                "again later.",
                retry_after_s=1.0 + len(self.waiting) / max(len(self.running), 1),
            )
        self.waiting.append(job)

    def start(self, job: Job) -> None:
        """Let a job run that has its memory already: a fork of a running one."""
        job.state = JobState.RUNNING
        self.running.append(job)

    def remove(self, job: Job) -> None:
        """Forget a job that has ended."""
        if job.state is JobState.RUNNING:
            self.running.remove(job)
        elif job.state is JobState.WAITING:
            self.waiting.remove(job)
        job.state = JobState.ENDED

    def schedule(self) -> list[Share]:
        """Return what runs in the next step; rows of it count as computed from now on.

        A job that is alone and still gets no row has no room at all; `stuck` names it.
        """
        self._memory.begin_step()
        shares: dict[Job, int] = {}
        budget, all_have_room = self._step_tokens, True
        # Decodes first: each is one row that somebody watches appear.
        for job in [*self._oldest(decoding=True), *self._oldest(decoding=False)]:
            if budget <= 0:
                break
            if job.state is JobState.RUNNING:
                granted = self._run(job, min(job.pending, budget), shares)
                budget -= granted
                all_have_room &= granted > 0
        # Who got no room comes before anybody new.
        if all_have_room:
            self._admit(budget, shares)
        for job, num_rows in shares.items():
            job.num_computed += num_rows
        return [Share(job, num_rows) for job, num_rows in shares.items()]

    @property
    def stuck(self) -> Job | None:
        """The job that cannot go on although it is alone, after an empty schedule."""
        if self.running:
            return self.running[0]
        return self.waiting[0] if self.waiting else None

    def prefer(self, job: Job) -> None:
        """Let a waiting job be the next one."""
        self.waiting.remove(job)
        self.waiting.appendleft(job)

    def preempt(self, job: Job) -> None:
        """Take a running job's memory away; it goes to the head of the queue."""
        self._memory.withdraw(job)
        self.running.remove(job)
        job.state = JobState.WAITING
        job.num_computed = 0
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def _oldest(self, *, decoding: bool) -> Iterator[Job]:
        jobs = [job for job in self.running if (job.pending == 1) == decoding]
        return iter(sorted(jobs, key=attrgetter("arrival")))

    def _run(self, job: Job, num_rows: int, shares: dict[Job, int]) -> int:
        """Promise rows to a running job, at the expense of later ones; return how many it got."""
        while not self._memory.promise(job, num_rows):
            victim = max(self.running, key=lambda other: other.arrival)
            if victim is job:
                if len(self.running) > 1:
                    self._preempt(job, shares)
                return 0
            self._preempt(victim, shares)
        shares[job] = num_rows
        return num_rows

    def _preempt(self, job: Job, shares: dict[Job, int]) -> None:
        shares.pop(job, None)
        self.preempt(job)

    def _admit(self, budget: int, shares: dict[Job, int]) -> None:
        for job in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_running:
                return
            verdict = self._memory.admit(job)
            if verdict == "no room":
                return
            if verdict != "admitted":
                continue
            self.waiting.remove(job)
            self.start(job)
            num_rows = min(job.pending, budget)
            if self._memory.promise(job, num_rows):
                shares[job] = num_rows
                budget -= num_rows
