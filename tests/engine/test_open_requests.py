"""Open requests end once, with what they were asked for, and take nobody with them."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.engine.request import Failed
from kvloom.errors import KvloomError
from kvloom.outputs import StreamChunk
from tests.engine.worlds import BOOKS, World, fake_engine, greedy
from tests.fake_model import FakeRunner

LETTERS = BOOKS[0]


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


def test_forks_share_the_prompt() -> None:
    world = World(blocks=64)
    asked = world.submit(LETTERS[:200], greedy(8, n=8, ignore_eos=True))
    world.step()
    world.step()
    used = world.engine.pool.num_blocks - world.engine.pool.free_blocks
    # Four blocks of prompt, and one to write in per completion but the one that goes on there.
    assert used == 4 + 7
    world.run()
    assert asked.usage is not None
    assert asked.usage.computed_tokens == 200
    world.close()


@pytest.mark.parametrize("caching", [True, False])
def test_a_cancelled_request_s_pages_are_free_at_once(caching: bool) -> None:
    world = World(enable_prefix_caching=caching)
    for wanted, steps in ((greedy(50, n=3), 3), (greedy(50), 1), (greedy(50), 0)):
        world.submit(LETTERS[:150], wanted)
        for _ in range(steps):
            world.step()
        world.cancel(world.open[0])
        if world.engine.memory.tree is not None:
            world.engine.memory.tree.clear()
        assert world.engine.pool.free_blocks == world.engine.pool.num_blocks
    assert world.engine.stats().requests_finished == {"stop": 0, "length": 0, "abort": 3}


def test_prompt_logprobs_of_one_token_are_none() -> None:
    world = World()
    asked = world.submit([5], greedy(2, prompt_logprobs=3))
    world.run()
    assert asked.chunks[0][0].prompt_logprobs == (None,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_fail_their_request_alone(bad: float) -> None:
    class Broken(FakeRunner):
        def forward(self, rows: Any, *rest: Any) -> Any:
            output = super().forward(rows, *rest)
            for entry, logits in zip(rows, output.logits, strict=True):
                if entry.doc.tokens[0] == 7 and logits is not None:
                    logits[:] = bad
            return output

    engine = fake_engine(runner=Broken())
    ids = [
        engine.submit([7, 1, 2], greedy(2)),
        engine.submit([7, 1, 3], greedy(2, prompt_logprobs=1)),
        engine.submit([7, 1, 4], greedy(2, n=3)),
        engine.submit([6, 1, 2], greedy(2, ignore_eos=True)),
    ]
    events = [event for _ in range(2) for event in engine.step()]
    engine.memory.check()
    failed = [event for event in events if isinstance(event, Failed)]
    assert sorted(event.request_id for event in failed) == ids[:3]
    assert all(isinstance(event.error, KvloomError) for event in failed)
    assert [e.request_id for e in events if isinstance(e, StreamChunk)] == [ids[3]] * 2
    assert not engine.has_work


def test_unknown_requests_are_cancelled_without_a_word() -> None:
    engine = fake_engine()
    assert engine.cancel("request-17") == []
    assert engine.step() == []
    assert engine.stats().requests_finished["abort"] == 0


def test_only_the_failed_step_s_requests_fail(runner: FakeRunner) -> None:
    engine = fake_engine(runner=runner, step_tokens=10, max_running=1)
    runner.failures = [RuntimeError("out of order")]
    first, second = (engine.submit(book[:10], greedy(2, ignore_eos=True)) for book in BOOKS[:2])
    (failed,) = engine.step()
    assert isinstance(failed, Failed)
    assert failed.request_id == first
    events = [event for _ in range(3) for event in engine.step()]
    assert [event.request_id for event in events] == [second, second]
    assert engine.stats().requests_finished == {"stop": 0, "length": 1, "abort": 1}
