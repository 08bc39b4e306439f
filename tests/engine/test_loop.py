"""The loop: one thread runs the engine, any number ask it; nobody is left waiting."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue

import pytest

from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.open_requests import OpenRequests
from kvloom.engine.request import Computed, Event, Failed
from kvloom.errors import CapacityError, KvloomError, RequestError
from kvloom.outputs import StreamChunk
from tests.engine.worlds import BOOKS, expected_completion, fake_engine, greedy
from tests.fake_model import FakeRunner, Oracle

FOREVER = greedy(max_tokens=3000, ignore_eos=True)


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def loop(runner: FakeRunner) -> Iterator[EngineLoop]:
    made = EngineLoop(lambda: fake_engine(blocks=64, runner=runner, max_waiting=10_000))
    yield made
    made.stop()


def submit(loop: EngineLoop, prompt: list[int], params: object = None) -> SimpleQueue[Event]:
    inbox: SimpleQueue[Event] = SimpleQueue()
    wanted = params or greedy()
    loop.submit([lambda engine: engine.submit(prompt, wanted)], inbox.put).result(10)  # type: ignore[arg-type]
    return inbox


def drain(inbox: SimpleQueue[Event]) -> list[Event]:
    """Return all events of a request, up to its last."""
    events: list[Event] = []
    while True:
        events.append(inbox.get(timeout=20))
        last = events[-1]
        if not isinstance(last, StreamChunk) or last.usage is not None:
            return events


def tokens_of(events: list[Event]) -> list[int]:
    assert all(isinstance(event, StreamChunk) for event in events), events
    return [t for event in events if isinstance(event, StreamChunk) for t in event.token_ids]


def check_alive(loop: EngineLoop) -> None:
    prompt = BOOKS[2][:30]
    expected = expected_completion(Oracle(), prompt, greedy(), 0, 3000)[0]
    assert tokens_of(drain(submit(loop, prompt))) == expected


def mailboxes(loop: EngineLoop) -> int:
    return loop.call(lambda _: len(loop._mailboxes)).result(10)


def free_blocks(engine: Engine) -> int:
    if engine.memory.tree is not None:
        engine.memory.tree.clear()
    engine.memory.check()
    return engine.pool.num_blocks - engine.pool.free_blocks


def test_a_failing_step_ends_its_requests_and_no_others(
    loop: EngineLoop, runner: FakeRunner
) -> None:
    runner.failures = [None, ValueError("no weights today")]
    failed = drain(submit(loop, BOOKS[0][:20]))
    assert isinstance(failed[-1], Failed)
    assert "no weights today" in str(failed[-1].error)
    assert isinstance(failed[-1].error.__cause__, ValueError)
    check_alive(loop)
    assert loop.call(free_blocks).result(10) == 0


def test_a_crash_ends_everybody_and_refuses_the_next(
    loop: EngineLoop, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inboxes = [submit(loop, book[:20], FOREVER) for book in BOOKS]

    def crash(*_: object) -> list[Event]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(OpenRequests, "take", crash)
    for inbox in inboxes:
        last = drain(inbox)[-1]
        assert isinstance(last, Failed)
        assert "a bug" in str(last.error)
    loop._thread.join(10)
    with pytest.raises(KvloomError, match=r"crashed \(a bug\)"):
        submit(loop, BOOKS[0][:5])
    loop.cancel("request-0")
    loop.stop()


def test_stopping_while_busy_ends_everybody(loop: EngineLoop) -> None:
    inboxes = [submit(loop, book[:20], FOREVER) for book in BOOKS]
    loop.stop()
    for inbox in inboxes:
        last = drain(inbox)[-1]
        assert isinstance(last, Failed)
        assert "closed" in str(last.error)
    with pytest.raises(KvloomError, match="closed"):
        submit(loop, BOOKS[0][:5])
    loop.stop()


def test_what_was_asked_just_before_the_end_is_refused_not_forgotten(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Future[list[str]]] = []
    inbox: SimpleQueue[Event] = SimpleQueue()

    def crash() -> list[Event]:
        late.append(loop.submit([lambda engine: engine.submit([1], FOREVER)], inbox.put))
        raise ZeroDivisionError("a bug")

    loop.call(lambda engine: monkeypatch.setattr(engine, "step", crash)).result(10)
    submit(loop, BOOKS[0][:20])
    loop._thread.join(10)
    with pytest.raises(KvloomError, match="a bug"):
        late[0].result(10)


def test_an_error_of_a_task_goes_to_its_caller_only(loop: EngineLoop) -> None:
    with pytest.raises(RequestError, match="empty"):
        submit(loop, [])
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda _: 1 // 0).result(10)
    check_alive(loop)


def test_a_batch_with_a_wrong_prompt_submits_nothing(loop: EngineLoop) -> None:
    prompts = [BOOKS[0][:9], BOOKS[1][:9], [99]]
    inbox: SimpleQueue[Event] = SimpleQueue()
    tasks = [lambda engine, p=p: engine.submit(p, FOREVER) for p in prompts]
    with pytest.raises(RequestError, match="99"):
        loop.submit_and_wait(tasks, inbox.put)
    assert loop.call(lambda engine: engine.has_work).result(10) is False
    assert mailboxes(loop) == 0
    with pytest.raises(Empty):
        inbox.get_nowait()


def test_a_batch_is_taken_as_far_as_the_queue_goes() -> None:
    loop = EngineLoop(lambda: fake_engine(max_running=2, max_waiting=1))
    tasks = [lambda engine, p=b[:9]: engine.submit(p, FOREVER) for b in [*BOOKS, *BOOKS]]
    inbox: SimpleQueue[Event] = SimpleQueue()
    assert len(loop.submit_and_wait(tasks, inbox.put)) == 3
    while loop.call(lambda engine: engine.stats().running).result(10) < 2:
        pass
    with pytest.raises(CapacityError) as refused:
        loop.submit_and_wait(tasks, inbox.put)
    assert refused.value.retry_after_s is not None
    loop.stop()


def test_a_submission_that_nobody_waits_for_leaves_nothing(loop: EngineLoop) -> None:
    inbox: SimpleQueue[Event] = SimpleQueue()
    for _ in range(50):
        submitted = loop.submit([lambda engine: engine.submit(BOOKS[0][:9], FOREVER)], inbox.put)
        loop.cancel_submitted(submitted)
    refused = loop.submit([lambda engine: engine.submit([], FOREVER)], inbox.put)
    loop.cancel_submitted(refused)
    with pytest.raises((CancelledError, RequestError)):
        refused.result(10)
    loop.call(lambda _: None).result(10)
    assert mailboxes(loop) == 0
    assert loop.call(lambda engine: engine.has_work).result(10) is False
    assert loop.call(free_blocks).result(10) == 0


def test_finished_requests_leave_no_mailbox(loop: EngineLoop, runner: FakeRunner) -> None:
    for _ in range(20):
        drain(submit(loop, BOOKS[0][:9]))
    inbox: SimpleQueue[Event] = SimpleQueue()
    loop.submit_and_wait([lambda engine: engine.submit(BOOKS[0][:9], None)], inbox.put)
    computed = inbox.get(timeout=10)
    assert isinstance(computed, Computed)
    assert mailboxes(loop) == 0
    runner.failures = [ValueError()]
    drain(submit(loop, BOOKS[0][:9]))
    assert mailboxes(loop) == 0


def test_receivers_that_are_gone_end_their_requests() -> None:
    gone: list[str] = []
    loop = EngineLoop(fake_engine, lambda: [gone.pop()] if gone else [])
    inbox: SimpleQueue[Event] = SimpleQueue()
    tasks = [lambda engine: engine.submit(BOOKS[0][:9], FOREVER)]
    (request_id,) = loop.submit_and_wait(tasks, inbox.put)
    inbox.get(timeout=10)
    loop.call(lambda _: gone.append(request_id)).result(10)
    loop.call(lambda _: None).result(10)
    assert loop.call(lambda engine: engine.has_work).result(10) is False
    loop.stop()


def test_eight_threads_submit_and_cancel_and_none_is_mixed_up(loop: EngineLoop) -> None:
    oracle = Oracle()
    prompts = [book[:length] for book in BOOKS for length in (1, 5, 70)]
    expected = [expected_completion(oracle, prompt, greedy(), 0, 3000)[0] for prompt in prompts]
    problems: list[BaseException] = []

    def client(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(150):
                inbox: SimpleQueue[Event] = SimpleQueue()
                number = choose.randrange(len(prompts))
                if choose.random() < 0.8:
                    one_cancel(number, choose.random() < 0.5, inbox)
                else:
                    events = drain(submit(loop, prompts[number]))
                    assert tokens_of(events) == expected[number]
        except BaseException as error:
            problems.append(error)

    def one_cancel(number: int, wait: bool, inbox: SimpleQueue[Event]) -> None:
        tasks = [lambda engine: engine.submit(prompts[number], FOREVER)]
        submitted = loop.submit(tasks, inbox.put)
        if wait:
            (request_id,) = submitted.result(20)
            loop.cancel(request_id)
            loop.cancel(request_id)
        else:
            loop.cancel_submitted(submitted)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not problems, problems[0]
    assert mailboxes(loop) == 0
    assert loop.call(lambda engine: engine.has_work).result(10) is False
    assert loop.call(free_blocks).result(10) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_told_and_the_engine_goes_on(loop: EngineLoop) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loop.call(lambda engine: engine.has_work)
            os.write(writing, b"no error")
        except KvloomError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        assert b"spawn" in answer.read()
    os.waitpid(child, 0)
    assert loop.call(lambda engine: engine.has_work).result() is False


def test_memory_goes_back_once_after_every_burst_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[None] = []
    monkeypatch.setattr("kvloom.engine.loop.TIDY_AFTER_S", 0.02)
    monkeypatch.setattr("kvloom.engine.loop.release_freed_memory", lambda: done.append(None))
    loop = EngineLoop(fake_engine)
    for count in (1, 2):
        deadline = time.monotonic() + 30
        while len(done) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(done) == count
        loop.call(lambda engine: engine.stats()).result()
    loop.stop()
