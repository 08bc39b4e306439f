"""Freed memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEASURE = """
import os, resource
from kvloom.ops.native.heap import release_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytearray(60_000) for _ in range(2000)]
kept = blocks[-1]
del blocks
before = resident()
assert release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the GNU C library")
def test_freed_memory_goes_back_to_the_system() -> None:
    # The C library's own allocator, also where the tests run under a sanitizer's.
    environment = {**os.environ, "LD_PRELOAD": ""}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, check=True, env=environment
    )
    assert int(done.stdout) > 50 * 2**20
