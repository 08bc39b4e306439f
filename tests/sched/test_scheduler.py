"""The scheduler's laws over a memory that is one number: how many tokens it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvloom.errors import CapacityError
from kvloom.sched.job import Admission, Job, JobState
from kvloom.sched.scheduler import Scheduler, Share


@dataclass
class FakeMemory:
    """Holds so many tokens in all; jobs may know a prefix, and may be told to wait for one.

    Attributes:
        capacity: tokens.
        known: tokens that a job need not compute.
        waits: jobs that are to wait for a prefix.
        withdrawn: jobs that lost their memory, in order.
    """

    capacity: int
    known: dict[Job, int] = field(default_factory=dict)
    waits: set[Job] = field(default_factory=set)
    withdrawn: list[Job] = field(default_factory=list)
    held: dict[Job, int] = field(default_factory=dict)
    promised: dict[Job, int] = field(default_factory=dict)

    def begin_step(self) -> None:
        for job, num_rows in self.promised.items():
            self.held[job] += num_rows
        self.promised = {}

    def admit(self, job: Job) -> Admission:
        assert job not in self.held
        if job in self.waits:
            return "wait for a prefix"
        if self._used() + job.num_tokens > self.capacity:
            return "no room"
        self.held[job] = job.num_computed = self.known.get(job, 0)
        return "admitted"

    def promise(self, job: Job, num_rows: int) -> bool:
        assert job in self.held, "a promise to a job without memory"
        assert job not in self.promised, "two promises in one step"
        if self._used() + num_rows > self.capacity:
            return False
        self.promised[job] = num_rows
        return True

    def withdraw(self, job: Job) -> None:
        del self.held[job]
        self.promised.pop(job, None)
        self.withdrawn.append(job)

    def release(self, job: Job) -> None:
        self.held.pop(job, None)
        self.promised.pop(job, None)

    def _used(self) -> int:
        return sum(self.held.values()) + sum(self.promised.values())


def scheduler(
    memory: FakeMemory, *, step_tokens: int = 100, max_running: int = 10, max_waiting: int = 1000
) -> Scheduler:
    return Scheduler(
        memory, step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting
    )


def rows(shares: list[Share]) -> dict[Job, int]:
    return {share.job: share.num_rows for share in shares}


@dataclass(frozen=True)
class Plan:
    """When a job comes, how long its prompt is, and how many tokens it generates."""

    step: int
    prompt: int
    generated: int


plans = st.lists(
    st.builds(
        Plan, step=st.integers(0, 20), prompt=st.integers(1, 60), generated=st.integers(1, 20)
    ),
    min_size=1,
    max_size=12,
)


@given(
    plans=plans,
    step_tokens=st.integers(1, 64),
    max_running=st.integers(1, 8),
    capacity=st.integers(80, 300),
)
def test_everybody_ends_within_every_limit_and_in_turn(
    plans: list[Plan], step_tokens: int, max_running: int, capacity: int
) -> None:
    memory = FakeMemory(capacity)
    schedule = scheduler(memory, step_tokens=step_tokens, max_running=max_running)
    left: dict[Job, int] = {}
    started: list[int] = []
    to_come = [(plan.step, number, plan) for number, plan in enumerate(plans)]
    to_come.sort(key=lambda entry: entry[:2])
    arrivals = iter(range(len(plans)))
    # Every step that runs anything computes a row; the oldest job computes its own only once.
    bound = 21 + sum((p.prompt + p.generated) * (len(plans) + 1) for p in plans)
    for step in range(bound):
        while to_come and to_come[0][0] <= step:
            plan = to_come.pop(0)[2]
            job = Job(next(arrivals), plan.prompt)
            left[job] = plan.generated
            schedule.add(job)
        waited = list(schedule.waiting)
        oldest = min(schedule.running, key=lambda job: job.arrival, default=None)
        decoding = {job for job in schedule.running if job.pending == 1}
        before = {job: job.pending for job in schedule.running}
        withdrawn = len(memory.withdrawn)
        shares = rows(schedule.schedule())
        check_shares(schedule, memory, shares, step_tokens, max_running)
        if not waited and withdrawn == len(memory.withdrawn):
            check_order(shares, decoding, before, step_tokens)
        for victim in memory.withdrawn[withdrawn:]:
            assert victim is not oldest
            assert all(victim.arrival > job.arrival for job in schedule.running if job in before)
        started += [job.arrival for job in waited if job.state is JobState.RUNNING]
        for job in shares:
            if job.pending == 0:
                left[job] -= 1
                job.num_tokens += 1
                if left[job] == 0:
                    schedule.remove(job)
                    memory.release(job)
        if not to_come and not any(left.values()):
            break
    assert not any(left.values()), "somebody starves"
    assert not schedule.running
    assert not schedule.waiting
    assert schedule.stuck is None
    event("preempted" if schedule.preemptions else "not preempted")
    assert schedule.preemptions == len(memory.withdrawn)
    if not memory.withdrawn:
        assert started == sorted(started), "jobs overtook each other"


def check_shares(
    schedule: Scheduler,
    memory: FakeMemory,
    shares: dict[Job, int],
    step_tokens: int,
    max_running: int,
) -> None:
    assert len(schedule.running) <= max_running
    assert sum(shares.values()) <= step_tokens
    assert memory.promised == shares
    if schedule.running or schedule.waiting:
        assert shares, "nothing runs although there is work"
    for job, num_rows in shares.items():
        assert num_rows >= 1
        assert job.state is JobState.RUNNING
    for job in schedule.waiting:
        assert (job.state, job.num_computed) == (JobState.WAITING, 0)
    assert set(schedule.running) == set(memory.held)


def check_order(
    shares: dict[Job, int], decoding: set[Job], before: dict[Job, int], step_tokens: int
) -> None:
    """Without pressure: decodes first, each group oldest first, and no budget left unused."""
    budget = step_tokens
    for group in (decoding, set(before) - decoding):
        for job in sorted(group, key=lambda job: job.arrival):
            wanted = min(before[job], budget)
            assert shares.get(job, 0) == wanted
            budget -= wanted


def test_decodes_come_before_prefills() -> None:
    memory = FakeMemory(1000)
    schedule = scheduler(memory, step_tokens=10)
    prefill, decode = Job(0, 100), Job(1, 5)
    memory.known[decode] = 4
    schedule.add(prefill)
    schedule.schedule()
    schedule.add(decode)
    assert rows(schedule.schedule()) == {prefill: 10}, "no budget was left"
    schedule.start(second := Job(2, 5, 4))
    memory.held[second] = 4
    assert rows(schedule.schedule()) == {second: 1, prefill: 9}


def test_the_latest_loses_its_memory_first() -> None:
    memory = FakeMemory(32)
    schedule = scheduler(memory)
    jobs = [Job(arrival, 10) for arrival in range(3)]
    for job in jobs:
        schedule.add(job)
    assert rows(schedule.schedule()) == dict.fromkeys(jobs, 10)
    for job in jobs:
        job.num_tokens += 2
    assert rows(schedule.schedule()) == {jobs[0]: 2, jobs[1]: 2}
    assert memory.withdrawn == [jobs[2]]
    assert (jobs[2].state, jobs[2].preemptions) == (JobState.WAITING, 1)
    assert list(schedule.waiting) == [jobs[2]]


def test_victims_go_to_the_head_of_the_queue_oldest_first() -> None:
    memory = FakeMemory(33)
    schedule = scheduler(memory, max_running=3)
    jobs = [Job(arrival, 11) for arrival in range(3)]
    newest = Job(3, 5)
    for job in (*jobs, newest):
        schedule.add(job)
    schedule.schedule()
    jobs[0].num_tokens += 20
    assert rows(schedule.schedule()) == {jobs[0]: 20}
    assert memory.withdrawn == [jobs[2], jobs[1]]
    assert list(schedule.waiting) == [jobs[1], jobs[2], newest]


def test_nobody_new_is_admitted_while_somebody_has_no_room() -> None:
    memory = FakeMemory(20)
    schedule = scheduler(memory)
    old, new = Job(0, 10), Job(1, 3)
    schedule.add(old)
    schedule.schedule()
    old.num_tokens += 11
    schedule.add(new)
    assert schedule.schedule() == []
    assert schedule.stuck is old
    schedule.preempt(old)
    assert (memory.withdrawn, list(schedule.waiting)) == ([old], [old, new])


def test_who_waits_for_a_prefix_is_passed_by_and_who_finds_no_room_is_not() -> None:
    memory = FakeMemory(20)
    schedule = scheduler(memory)
    waits, large, small = Job(0, 5), Job(1, 30), Job(2, 5)
    memory.waits.add(waits)
    for job in (waits, large, small):
        schedule.add(job)
    assert schedule.schedule() == []
    assert schedule.stuck is waits
    schedule.remove(large)
    assert rows(schedule.schedule()) == {small: 5}
    memory.waits.clear()
    small.num_tokens += 1
    assert waits in rows(schedule.schedule())


def test_who_is_preferred_is_next() -> None:
    memory = FakeMemory(10)
    scheduler = Scheduler(memory, step_tokens=4, max_running=1, max_waiting=9)
    jobs = [Job(number, 4) for number in range(3)]
    for job in jobs:
        scheduler.add(job)
    scheduler.prefer(jobs[2])
    assert [share.job for share in scheduler.schedule()] == [jobs[2]]
    assert list(scheduler.waiting) == jobs[:2]


def test_the_queue_is_limited_beyond_those_who_may_run_at_once() -> None:
    memory = FakeMemory(1000)
    schedule = scheduler(memory, max_running=2, max_waiting=3)
    for arrival in range(5):
        schedule.add(Job(arrival, 10))
    with pytest.raises(CapacityError, match="5 requests wait") as refused:
        schedule.add(Job(9, 10))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0
    schedule.schedule()
    assert (len(schedule.running), len(schedule.waiting)) == (2, 3)
    with pytest.raises(CapacityError):
        schedule.add(Job(10, 10))
    schedule.remove(schedule.waiting[0])
    schedule.add(Job(11, 10))
    assert [job.arrival for job in schedule.waiting] == [3, 4, 11]


def test_without_a_queue_an_idle_engine_still_takes_a_job() -> None:
    schedule = scheduler(FakeMemory(100), max_running=1, max_waiting=0)
    schedule.add(first := Job(0, 5))
    with pytest.raises(CapacityError):
        schedule.add(Job(1, 5))
    assert rows(schedule.schedule()) == {first: 5}
    with pytest.raises(CapacityError):
        schedule.add(Job(1, 5))


def test_ended_jobs_are_forgotten_wherever_they_stand() -> None:
    schedule = scheduler(FakeMemory(100), max_running=1)
    runs, waits = Job(0, 5), Job(1, 5)
    schedule.add(runs)
    schedule.add(waits)
    schedule.schedule()
    for job in (runs, waits):
        schedule.remove(job)
        assert job.state is JobState.ENDED
    schedule.remove(runs)
    assert (schedule.running, list(schedule.waiting), schedule.stuck) == ([], [], None)
