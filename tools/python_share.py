"""Measures what Python adds to a decode step, beside the time inside the compiled library.

Knows: engine steps, and the one call into the library that each makes.
Does not know: servers, or other engines; `kvloom bench speed` compares those.

Run it on an idle machine: python tools/python_share.py [requests ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from kvloom.engine.assembly import assemble
from kvloom.engine.engine import Engine
from kvloom.model.lean import native
from kvloom.params import SamplingParams

PROMPT_TOKENS = 512
WARM_STEPS = 16
STEPS = 150


class Stopwatch:
    """Stands for `run_step` and adds up the seconds spent inside it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._run_step = native.run_step

    def __call__(self, *arguments: Any) -> None:
        """Run the step."""
        start = time.perf_counter()
        self._run_step(*arguments)
        self.seconds += time.perf_counter() - start


def measure(engine: Engine, stopwatch: Stopwatch, num_requests: int) -> tuple[float, float]:
    """Return medians of milliseconds per decode step: in all, and outside of the library."""
    params = SamplingParams(max_tokens=WARM_STEPS + STEPS + 8, ignore_eos=True, temperature=0.0)
    for number in range(num_requests):
        tokens = [(7 * i + 13 * number) % 40000 + 100 for i in range(PROMPT_TOKENS)]
        engine.submit(tokens, params)
    totals, outside, decodes = [], [], 0
    while engine.has_work:
        library_before, start = stopwatch.seconds, time.perf_counter()
        events = engine.step()
        total = time.perf_counter() - start
        if len(events) == num_requests:
            decodes += 1
            if WARM_STEPS < decodes <= WARM_STEPS + STEPS:
                totals.append(total * 1e3)
                outside.append((total - stopwatch.seconds + library_before) * 1e3)
    return statistics.median(totals), statistics.median(outside)


def main() -> None:
    """Print a line per number of requests."""
    counts = [int(argument) for argument in sys.argv[1:]] or [1, 16, 64]
    stopwatch = Stopwatch()
    native.run_step = stopwatch  # type: ignore[assignment]
    engine = assemble("default", {"kv_memory": "2GiB"}).engine
    for count in counts:
        total, outside = measure(engine, stopwatch, count)
        print(f"{count:3d} requests: step {total:6.2f} ms, of which Python {outside:5.2f} ms")


if __name__ == "__main__":
    main()
