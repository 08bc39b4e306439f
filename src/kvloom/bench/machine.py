"""The machine that is measured on: what it is, and who else keeps it busy.

Knows: processors, memory and CPU time.
Does not know: engines or tasks.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvloom.bench.results import Machine

# CPU time is counted in ticks of 10 ms; below this a share of it means nothing.
_SHORTEST_S = 0.5
_IDLE_FIELDS = ("idle", "iowait")
_COUNTED_TWICE = ("guest", "guest_nice")  # they are part of user and nice


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds up to one moment.

    Attributes:
        at_s: the moment.
        busy_s: of all cores, whoever used them.
        own_s: of the processes that are meant to run.
    """

    at_s: float
    busy_s: float
    own_s: float


def describe_machine() -> Machine:
    """Return what this machine is."""
    return Machine(
        cpu=_cpu_name(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def read_cpu(pid: int | None = None) -> CpuReading:
    """Return the CPU time so far; this process and `pid` with its children count as own."""
    total = psutil.cpu_times()
    ignored = _IDLE_FIELDS + _COUNTED_TWICE
    busy_s = sum(getattr(total, name) for name in total._fields if name not in ignored)
    own = psutil.Process().cpu_times()
    own_s = own.user + own.system + (0.0 if pid is None else _tree_cpu_s(pid))
    return CpuReading(time.perf_counter(), busy_s, own_s)


def other_cores(before: CpuReading, after: CpuReading) -> float | None:
    """Return how many cores others kept busy between two readings; None if that was too short."""
    elapsed_s = after.at_s - before.at_s
    if elapsed_s < _SHORTEST_S:
        return None
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, others_s / elapsed_s)


def watch_idle(seconds: float = 1.0) -> float:
    """Wait, and return how many cores others kept busy meanwhile."""
    before = read_cpu()
    time.sleep(max(seconds, _SHORTEST_S))
    return other_cores(before, read_cpu()) or 0.0


def resident_bytes(pid: int) -> int | None:
    """Return the memory a process has resident; None if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _tree_cpu_s(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
        times = [member.cpu_times() for member in tree]
    except psutil.Error:  # it has ended, which its next answer will say
        return 0.0
    return float(sum(time.user + time.system for time in times))


def _cpu_name() -> str:
    listing = Path(os.sep, "proc", "cpuinfo")
    if listing.exists():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
