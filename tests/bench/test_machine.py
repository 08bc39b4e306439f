"""CPU time of others is what is busy and not our own."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from kvloom.bench.machine import (
    CpuReading,
    describe_machine,
    other_cores,
    read_cpu,
    resident_bytes,
    watch_idle,
)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (CpuReading(at_s=12.0, busy_s=104.0, own_s=53.0), 0.5),
        (CpuReading(at_s=12.0, busy_s=103.0, own_s=53.0), 0.0),
        (CpuReading(at_s=12.0, busy_s=102.9, own_s=53.0), 0.0),  # ticks of the clock
        (CpuReading(at_s=10.1, busy_s=101.0, own_s=50.0), None),  # too short to tell
    ],
)
def test_other_cores(after: CpuReading, expected: float | None) -> None:
    assert other_cores(CpuReading(10.0, 100.0, 50.0), after) == expected


def test_readings_grow_and_count_this_process_and_the_worker() -> None:
    work = "for number in range(3_000_000): pass\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as worker:
        before, alone_before = read_cpu(worker.pid), read_cpu()
        while psutil.Process(worker.pid).cpu_times().user < 0.05:
            pass
        after, alone_after = read_cpu(worker.pid), read_cpu()
        worker.kill()
    assert after.at_s > before.at_s
    assert after.busy_s > before.busy_s
    with_worker = after.own_s - before.own_s
    assert with_worker > alone_after.own_s - alone_before.own_s


def test_a_process_that_is_gone_counts_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert resident_bytes(gone.pid) is None
    assert read_cpu(gone.pid).own_s > 0


def test_resident_bytes_of_this_process() -> None:
    assert (resident_bytes(os.getpid()) or 0) > 2**20


def test_watching_gives_a_number_of_cores() -> None:
    busy = watch_idle(0.0)
    assert 0 <= busy <= 1.5 * (psutil.cpu_count() or 1)


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cpu.strip()
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert machine.logical_cores == os.cpu_count()
