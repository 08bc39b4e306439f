"""Joined prompts: every part stands where it belongs, and a chunk's KV is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM
from kvloom.engine import computing as computing_module
from kvloom.engine import joining as joining_module
from kvloom.engine.parts import Chunk
from kvloom.errors import CapacityError, KvloomError, RequestError, UnsupportedModelError
from kvloom.outputs import Fidelity
from tests.engine.worlds import BOOKS, TOKENIZER, check_states, expected_completion, greedy
from tests.fake_model import FakeRunner, Oracle

Make = Callable[..., LLM]
TEXTS = [TOKENIZER.decode(book[:length]) for book, length in zip(BOOKS, (90, 64, 33), strict=True)]
FIDELITIES: list[Fidelity] = ["exact", "repaired", "shifted"]


def exactly(tokens: list[int], count: int = 3) -> list[int]:
    return expected_completion(Oracle(), [*tokens, 1], greedy(count), 0, 4000)[0]


def books(llm: LLM) -> int:
    """Check the memory, and return the bytes in use but for chunks and prefixes."""

    def count(engine: Any) -> int:
        engine.release_abandoned()
        engine.chunks.clear()
        engine.memory.tree.clear()
        engine.memory.check()
        assert not engine.memory.in_work
        return int(engine.pool.used_bytes)

    return llm.loop.call(count).result(10)


parts = st.lists(
    st.one_of(st.sampled_from(TEXTS).map(Chunk), st.text("abc .", max_size=9)),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_parts_stand_in_order_and_receipts_add_up(make_llm: Make, fidelity: Fidelity) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))

    @settings(max_examples=8)
    @given(parts)
    def run(asked: list[str | Chunk]) -> None:
        text = "".join(part.text if isinstance(part, Chunk) else part for part in asked)
        if not text:
            with pytest.raises(RequestError):
                llm.join(asked, fidelity=fidelity)
            return
        doc = llm.join(asked, fidelity=fidelity, share=0.3)
        assert doc.text == text
        assert doc.receipt is not None
        assert doc.receipt.fidelity == fidelity
        check_states(doc.receipt.tokens, len(doc.tokens))
        assert doc.receipt.tokens == doc.provenance.tokens
        if fidelity == "exact":
            assert doc.receipt.tokens == {"exact": len(doc.tokens)}
        (fresh,) = llm.generate([[*doc.tokens, 1]], greedy(3))
        assert list(fresh.outputs[0].token_ids) == exactly(doc.tokens)
        doc.repair()
        assert list(doc.generate("a", greedy(3)).outputs[0].token_ids) == exactly(doc.tokens)
        doc.close()

    run()
    assert books(llm) == 0


def test_all_repaired_is_exact(make_llm: Make) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    doc = llm.join(["abc", *map(Chunk, TEXTS), "xyz"], fidelity="repaired", share=1)
    assert list(doc.generate("a", greedy(3)).outputs[0].token_ids) == exactly(doc.tokens)


def test_chunks_are_computed_once_in_whatever_order(make_llm: Make) -> None:
    llm = make_llm()
    chunks = [Chunk(text) for text in TEXTS]
    first = llm.join(["ab", *chunks, "c"], fidelity="shifted").receipt
    assert first is not None
    assert first.recomputed == sum(map(len, TEXTS)) + 2 + 3  # behind one sink of two
    again = llm.join(["ba", *reversed(chunks), chunks[0], "c"], fidelity="shifted").receipt
    assert again is not None
    assert again.recomputed == 3
    assert llm.loop.call(lambda engine: len(engine.chunks)).result(10) == 3


def test_forgotten_chunks_are_computed_again(make_llm: Make) -> None:
    llm = make_llm(blocks=6)
    for _ in range(2):
        llm.generate([BOOKS[2][:340]], greedy(2))
        receipt = llm.join(["ab", Chunk(TEXTS[0]), "c"], fidelity="shifted").receipt
        assert receipt is not None
        assert receipt.recomputed == 90 + 2 + 3
        assert llm.loop.call(lambda engine: len(engine.chunks)).result(10) == 1
    assert books(llm) == 0


def test_an_exact_prefix_is_shown_in_the_place_of_its_chunks(make_llm: Make) -> None:
    llm = make_llm()
    llm.generate("ab" + TEXTS[0], greedy(1))
    doc = llm.join(["ab", Chunk(TEXTS[0]), "c"], fidelity="shifted")
    assert doc.receipt is not None
    assert (doc.receipt.tokens, doc.receipt.recomputed) == ({"exact": 93}, 2)


def test_generated_parts_come_with_a_receipt(make_llm: Make) -> None:
    llm = make_llm()
    (output,) = llm.generate(parts=["ab", Chunk(TEXTS[0]), "c"], params=greedy(3))
    assert output.receipt is not None
    assert output.receipt.tokens == {"exact": 93}
    tokens = TOKENIZER.encode("ab" + TEXTS[0] + "c")
    assert (
        list(output.outputs[0].token_ids)
        == expected_completion(Oracle(), tokens, greedy(3), 0, 4000)[0]
    )
    with pytest.raises(RequestError):
        llm.generate("a", parts=["b"])
    with pytest.raises(RequestError):
        llm.generate(parts=[3])  # type: ignore[list-item]
    assert books(llm) == 0


def test_opaque_positions_are_refused_and_exact_works(make_llm: Make) -> None:
    llm = make_llm(runner=FakeRunner(positions="opaque"))
    asked: list[str | Chunk] = ["abcdef", Chunk(TEXTS[0]), "c"]
    for fidelity in FIDELITIES[1:]:
        with pytest.raises(UnsupportedModelError, match="opaque"):
            llm.join(asked, fidelity=fidelity)
    assert llm.join(asked).receipt is not None
    assert books(llm) == 0


@pytest.mark.parametrize("passes", range(5))
def test_a_join_that_fails_leaves_nothing(make_llm: Make, passes: int) -> None:
    runner = FakeRunner(num_layers=2)
    llm = make_llm(runner=runner)
    runner.failures = [None] * passes + [ValueError("no weights")]
    with pytest.raises(KvloomError, match="no weights"):
        llm.join(["ab", Chunk(TEXTS[0]), "c", Chunk(TEXTS[1]), "d"], fidelity="repaired", share=1)
    assert books(llm) == 0


def test_a_pool_that_is_too_small_is_said_and_left_as_it_was(make_llm: Make) -> None:
    llm = make_llm(blocks=4, runner=FakeRunner(num_layers=2))
    with pytest.raises((CapacityError, RequestError)):
        llm.join([*map(Chunk, TEXTS), *map(Chunk, TEXTS)], fidelity="repaired", share=1)
    assert books(llm) == 0


def test_chunks_forgotten_between_two_calls_are_no_gap(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(enable_prefix_caching=False)
    plain = computing_module.call

    def disturbed(loop: Any, task: Any) -> Any:
        loop.call(lambda engine: [doc.truncate(0) for doc in engine.memory.idle]).result(10)
        return plain(loop, task)

    for module in (computing_module, joining_module):
        monkeypatch.setattr(module, "call", disturbed)
    doc = llm.join(["ab", Chunk(TEXTS[0]), "c", Chunk(TEXTS[0]), "d"], fidelity="shifted")
    assert doc.text == "ab" + TEXTS[0] + "c" + TEXTS[0] + "d"
    doc.repair()
    assert list(doc.generate("a", greedy(3)).outputs[0].token_ids) == exactly(doc.tokens)
