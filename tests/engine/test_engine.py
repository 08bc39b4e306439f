"""The engine's laws over the fake model: whatever else runs, every answer is the oracle's."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.errors import CapacityError, RequestError
from kvloom.outputs import StreamChunk
from kvloom.store.key import ANYBODY
from tests.engine.machine import AnyMix, run_machine
from tests.engine.worlds import BOOKS, Held, World, fake_engine, greedy
from tests.fake_model import VOCAB_SIZE


def test_any_mix_of_requests_answers_as_if_each_were_alone() -> None:
    run_machine(AnyMix, max_examples=15, stateful_step_count=25)


@pytest.mark.long
def test_any_mix_for_long() -> None:
    run_machine(AnyMix, max_examples=150, stateful_step_count=50)


LETTERS = BOOKS[0]


def with_question(length: int, number: int) -> list[int]:
    """A prompt behind a prefix that many have in common."""
    return [*LETTERS[:length], 1 + number, *BOOKS[1][:4]]


@pytest.mark.parametrize("step_tokens", [16, 50, 64, 100, 104, 512])
@pytest.mark.parametrize("length", [64, 100, 130, 200])
def test_a_common_prefix_is_computed_once_for_all_who_come_together(
    length: int, step_tokens: int
) -> None:
    world = World(step_tokens=step_tokens)
    asked = [world.submit(with_question(length, number), greedy(3)) for number in range(6)]
    world.run()
    usages = [one.usage for one in asked if one.usage is not None]
    assert len(usages) == 6
    assert sum(usage.computed_tokens for usage in usages) == length + 6 * 5
    assert [usage.cached_tokens for usage in usages] == [0, *[length] * 5]
    stats = world.engine.stats()
    assert (stats.computed_tokens, stats.cached_tokens) == (length + 30, 5 * length)
    assert (stats.prefix_queries, stats.prefix_hits) == (6, 5)
    assert stats.prompt_tokens == 6 * (length + 5)
    world.close()


@pytest.mark.parametrize("length", [1, 2, 37, 63, 64, 65, 127, 128, 200])
@pytest.mark.parametrize("behind", [0, 1, 30])
def test_a_later_request_hits_at_token_granularity(length: int, behind: int) -> None:
    world = World()
    first = world.submit(LETTERS[:length], greedy(1))
    world.run()
    again = world.submit([*LETTERS[:length], *BOOKS[1][:behind]], greedy(4))
    world.run()
    assert first.usage is not None
    assert again.usage is not None
    assert (first.usage.cached_tokens, first.usage.computed_tokens) == (0, length)
    # The last token of a prompt is always run: its logits are nowhere.
    cached = length if behind else length - 1
    assert again.usage.cached_tokens == cached
    assert again.usage.computed_tokens == length + behind - cached
    world.close()


def test_an_answer_is_found_as_the_beginning_of_the_next_prompt() -> None:
    world = World()
    first = world.submit(LETTERS[:70], greedy(10, ignore_eos=True))
    world.run()
    turn = [*LETTERS[:70], *first.tokens(), 7, 8]
    second = world.submit(turn, greedy(2))
    world.run()
    assert second.usage is not None
    # The last token generated was never run.
    assert second.usage.cached_tokens == 70 + 9


def test_without_caching_nothing_is_found() -> None:
    world = World(enable_prefix_caching=False)
    for _ in range(2):
        asked = world.submit(LETTERS[:70], greedy(2))
        world.run()
        assert asked.usage is not None
        assert (asked.usage.cached_tokens, asked.usage.computed_tokens) == (0, 70)
        assert world.engine.pool.free_blocks == world.engine.pool.num_blocks
    assert world.engine.stats().prefix_hits == 0


def test_another_fingerprint_never_hits() -> None:
    one, other = fake_engine(fingerprint=b"weights"), fake_engine(fingerprint=b"other weights")
    prompt = LETTERS[:130]
    one.submit(prompt, greedy(1))
    while one.has_work:
        one.step()
    assert one.memory.tree is not None
    assert other.memory.tree is not None
    spans = one.memory.tree.match(prompt, ANYBODY)
    assert sum(span.length for span in spans) == 130
    # By force: the same tokens computed under the other fingerprint.
    foreign = one.memory.tree
    foreign.root = other.memory.root
    one.memory.root = other.memory.root
    one.submit(prompt, greedy(1))
    chunks = [event for _ in range(3) for event in one.step()]
    (usage,) = [c.usage for c in chunks if isinstance(c, StreamChunk) and c.usage is not None]
    assert usage.cached_tokens == 0
    assert foreign.refused == 1


def test_preemption_changes_no_answer_and_no_score() -> None:
    world = World(blocks=8, step_tokens=64)
    wanted = [greedy(60, ignore_eos=True), greedy(60, ignore_eos=True, prompt_logprobs=1)] * 3
    asked = [world.submit(book[:90], w) for book, w in zip(BOOKS * 2, wanted, strict=True)]
    world.run()
    assert world.engine.stats().preemptions > 0
    preempted = [one for one in asked if one.usage is not None and one.usage.preemptions]
    assert preempted
    assert asked[0] not in preempted, "the oldest gives way to nobody"
    for one in preempted:
        assert one.usage is not None
        assert one.usage.cached_tokens + one.usage.computed_tokens > 90
    world.close()


def test_a_reserve_never_takes_what_another_row_was_promised() -> None:
    world = World(blocks=12, step_tokens=64, enable_prefix_caching=False)
    asked = [world.submit([*[1 + n] * 9], greedy(500, ignore_eos=True)) for n in range(7)]
    world.run()
    assert all(one.failed is None for one in asked)


def test_a_prompt_as_long_as_the_memory_fits_whatever_was_cached_before() -> None:
    world = World(blocks=4)
    world.submit(LETTERS[:10], greedy(1))
    world.run()
    asked = world.submit([*LETTERS[:10], *BOOKS[1][:240]], greedy(6, ignore_eos=True))
    world.run()
    assert asked.failed is None
    assert len(asked.tokens()) == 6


def test_a_document_near_the_limit_grows_to_it_whatever_it_shares() -> None:
    world = World(blocks=4)
    world.submit(LETTERS[:10], greedy(1))
    world.run()
    asked = world.submit([*LETTERS[:10], *BOOKS[1][:150]], greedy(None, ignore_eos=True))
    world.run()
    assert asked.failed is None
    assert len(asked.prompt) + len(asked.tokens()) == 256


def test_idle_documents_are_forgotten_least_recently_used_first() -> None:
    world = World(blocks=6, enable_prefix_caching=False)
    held = []
    for book in BOOKS:
        kv = world.compute(book[:64])
        assert kv is not None
        held.append(Held(book[:64], kv))
    world.submit([*held[0].tokens, 1], greedy(1), held=held[0])
    world.run()
    world.submit([5] * 200, greedy(1))
    world.run()
    assert [one.kv.length for one in held] == [64, 0, 64]
    again = world.compute([*held[1].tokens, 3], held[1])
    assert again is not None
    assert again.length == 65


def test_a_request_without_room_forgets_nothing() -> None:
    world = World(blocks=6)
    world.submit(LETTERS[:60], greedy(1))
    world.run()
    running = world.submit([9] * 120, greedy(100, ignore_eos=True))
    world.step()
    world.submit([8] * 250, greedy(1))
    world.step()
    assert not running.done
    assert world.engine.memory.tree is not None
    assert len(world.engine.memory.tree.match(LETTERS[:60], ANYBODY)) == 1
    world.run()


def test_what_a_reader_lets_go_of_unseen_is_found_by_others() -> None:
    world = World(blocks=4, enable_prefix_caching=False)
    asked = world.submit(LETTERS[:200], None)
    world.run()
    assert asked.computed is not None
    # Nobody has taken the result yet, and still it makes room.
    other = world.submit(BOOKS[1][:200], greedy(1))
    world.run()
    assert other.failed is None
    assert asked.computed.doc.length == 0


def test_scores_do_not_depend_on_what_is_cached_or_on_chunks() -> None:
    for step_tokens in (7, 64, 512):
        world = World(step_tokens=step_tokens)
        for _ in range(2):
            world.submit(LETTERS[:150], greedy(2, prompt_logprobs=3))
            world.submit(LETTERS[:150], None, score_from=100)
            world.run()
        scored = list(world.asked.values())
        usages = [one.usage for one in scored if one.usage is not None]
        assert usages[2].cached_tokens == 0, "scoring from the start needs every row"
        assert usages[3].cached_tokens == 100
        for one in scored:
            if one.computed is not None:
                world.engine.release(one.computed.doc)
        world.close()


@pytest.mark.parametrize(
    ("prompt", "wanted", "param"),
    [
        ([], greedy(), "prompt"),
        ([VOCAB_SIZE], greedy(), "prompt"),
        ([-1], greedy(), "prompt"),
        ([1] * 640, greedy(), "prompt"),
        ([1], greedy(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
        ([1], greedy(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        ([1], {"temperature": 0.0}, "params"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    prompt: list[int], wanted: Any, param: str
) -> None:
    engine = fake_engine(blocks=10)
    with pytest.raises(RequestError) as refused:
        engine.submit(prompt, wanted)
    assert refused.value.param == param
    assert not engine.has_work
    assert engine.stats().waiting == 0


def test_a_request_waits_for_room_that_an_edit_holds() -> None:
    world = World(blocks=6, enable_prefix_caching=False)
    kv = world.compute(LETTERS[:250])
    assert kv is not None
    world.engine.memory.protect(kv)
    asked = world.submit(BOOKS[1][:200], greedy(2))
    for _ in range(10):
        world.step()
    assert not asked.done
    # The edit asks for more, which has room: it comes first.
    tokens = BOOKS[2][:70]
    name = world.engine.submit(tokens, None)
    events: list[Any] = []
    world.mailboxes[name] = events.append
    while not events:
        world.step()
    assert events[0].doc.tokens == tokens
    assert not asked.done
    # What has none is told so, and the edit lets go.
    name = world.engine.submit(BOOKS[2][:300], None)
    world.mailboxes[name] = events.append
    while len(events) < 2:
        world.step()
    assert isinstance(events[1].error, CapacityError)
    assert not asked.done
    world.engine.memory.unprotect(kv)
    world.run()
    assert asked.failed is None
    for doc in (kv, events[0].doc):
        world.engine.release(doc)
    world.close()
