"""The worker's loop answers, survives errors and keeps its channel clean."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.peers.wire import equal_start, peak_rss_bytes

WORKER = """
import os, sys
from kvloom.bench.peers.wire import Remembered, Tokenized, serve

def operations(progress):
    def greet(fields):
        print("a library says hello")
        os.write(1, b"and so does its C code\\n")
        progress("Greeting", 1, 3)
        return Tokenized(leading=[], tokens=[len(fields["text"])])

    def fail(fields):
        raise ValueError("on purpose")

    def grow(fields):
        block = bytearray(fields["nbytes"])
        block[::4096] = b"x" * len(block[::4096])
        return Remembered()

    return {"greet": greet, "fail": fail, "grow": grow}

serve(operations)
"""


def ask(*requests: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_what_libraries_print_does_not_reach_the_bench() -> None:
    (progress, reply), errors = ask({"do": "greet", "text": "hello"})
    assert progress == {"progress": ["Greeting", 1, 3]}
    assert reply["answer"] == {"leading": [], "tokens": [5]}
    assert "a library says hello" in errors
    assert "and so does its C code" in errors


def test_an_error_and_an_unknown_request_are_answers() -> None:
    replies, errors = ask({"do": "fail"}, {"do": "dance"}, {"do": "grow", "nbytes": 1})
    assert replies[0]["error"] == "ValueError: on purpose"
    assert "Traceback" in errors
    assert replies[1]["error"] == "this worker cannot 'dance'"
    assert replies[2]["answer"] == {}


def test_the_peak_is_the_workers_own_and_stays() -> None:
    ballast = bytearray(200 * 2**20)  # of the process that starts the worker
    ballast[::4096] = b"x" * len(ballast[::4096])
    replies, _ = ask(
        {"do": "fail"}, {"do": "grow", "nbytes": 64 * 2**20}, {"do": "grow", "nbytes": 1}
    )
    before, grown, after = (reply["peak_rss_bytes"] for reply in replies)
    assert before < 150 * 2**20
    assert 60 * 2**20 < grown - before < 80 * 2**20
    assert after == grown


@pytest.mark.skipif(sys.platform == "win32", reason="no worker runs there")
def test_the_peak_of_this_process_is_no_less_than_what_it_holds() -> None:
    import psutil

    assert peak_rss_bytes() >= 0.9 * psutil.Process().memory_info().rss


def test_messages_need_nothing_but_the_standard_library() -> None:
    program = (
        "import sys, kvloom.bench.peers.wire\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"__main__", "kvloom"}


@given(left=st.lists(st.integers(0, 1)), right=st.lists(st.integers(0, 1)))
def test_equal_start_ends_at_the_first_difference(left: list[int], right: list[int]) -> None:
    count = equal_start(left, right)
    assert left[:count] == right[:count]
    assert left[: count + 1] != right[: count + 1] or count == len(left) == len(right)
