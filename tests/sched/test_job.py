from __future__ import annotations

from kvloom.sched.job import Job, JobState


def test_a_new_job_waits_with_all_its_tokens_pending() -> None:
    job = Job(arrival=3, num_tokens=7)
    assert (job.state, job.pending, job.preemptions) == (JobState.WAITING, 7, 0)


def test_pending_is_what_is_known_and_not_computed() -> None:
    job = Job(arrival=3, num_tokens=7, num_computed=5)
    assert job.pending == 2
    job.num_tokens += 1
    assert job.pending == 3


def test_jobs_with_equal_counts_are_still_different() -> None:
    first, second = Job(0, 1), Job(0, 1)
    assert first != second
    assert len({first, second}) == 2
