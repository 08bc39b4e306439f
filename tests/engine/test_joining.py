"""Joined prompts: every part stands where it belongs, and a chunk's KV is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM
from kvloom.engine import building as building_module
from kvloom.engine import computing as computing_module
from kvloom.engine import holdings as holdings_module
from kvloom.engine import joining as joining_module
from kvloom.engine.building import Building
from kvloom.engine.chunks import MAX_VARIANTS, Variant
from kvloom.engine.joining import TokenPart
from kvloom.engine.parts import Chunk, join_tokens
from kvloom.engine.shelf import Shelf
from kvloom.errors import CapacityError, KvloomError, RequestError, UnsupportedModelError
from kvloom.outputs import EditReceipt, Fidelity
from kvloom.reuse.planner import PLANNERS
from kvloom.store.disk import DiskStore
from kvloom.store.key import ANYBODY, hash_tenant, hash_tokens
from kvloom.store.ram import RamStore
from kvloom.store.tiered import TieredStore
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

    @settings(max_examples=15)
    @given(parts, st.sampled_from(list(PLANNERS)))
    def run(asked: list[str | Chunk], planner: str) -> None:
        text = "".join(part.text if isinstance(part, Chunk) else part for part in asked)
        if not text:
            with pytest.raises(RequestError):
                llm.join(asked, fidelity=fidelity, planner=planner)
            return
        doc = llm.join(asked, fidelity=fidelity, share=0.3, planner=planner)
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


@pytest.mark.parametrize("planner", [name for name in PLANNERS if name != "none"])
def test_all_repaired_is_exact(make_llm: Make, planner: str) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    asked = ["abc", *map(Chunk, TEXTS), "xyz"]
    llm.join(asked[::-1], fidelity="repaired", planner=planner).close()
    doc = llm.join(asked, fidelity="repaired", share=1, planner=planner)
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
    assert (doc.receipt.tokens, doc.receipt.recomputed) == ({"exact": 93}, 1)
    assert doc.receipt.actions[1].variant == "prefix"


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


@pytest.mark.parametrize("passes", range(9))
def test_a_join_that_fails_leaves_nothing(make_llm: Make, passes: int) -> None:
    runner = FakeRunner(num_layers=8)
    llm = make_llm(runner=runner)
    runner.failures = [None] * passes + [ValueError("no weights")]
    with pytest.raises(KvloomError, match="no weights"):
        llm.join(["ab", Chunk(TEXTS[0]), "c", Chunk(TEXTS[1]), "d"], fidelity="repaired", share=0.3)
    assert books(llm) == 0


@pytest.mark.parametrize("passes", range(4))
def test_a_watched_pass_that_fails_leaves_nothing(make_llm: Make, passes: int) -> None:
    runner = FakeRunner(num_layers=2)
    llm = make_llm(runner=runner)
    runner.failures = [None] * passes + [ValueError("no weights")]
    with pytest.raises(KvloomError, match="no weights"):
        llm.join(["ab", Chunk(TEXTS[0]), "c", Chunk(TEXTS[1]), "d"], planner="craft")
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

    for module in (computing_module, building_module, holdings_module, joining_module):
        monkeypatch.setattr(module, "call", disturbed)
    asked = ["ab", Chunk(TEXTS[0]), "c", Chunk(TEXTS[0]), "d"]
    for planner, fidelity in itertools.product(("blend", "craft"), FIDELITIES):
        doc = llm.join(asked, fidelity=fidelity, share=0.3, planner=planner)
        assert doc.text == "ab" + TEXTS[0] + "c" + TEXTS[0] + "d"
        doc.repair()
        assert list(doc.generate("a", greedy(3)).outputs[0].token_ids) == exactly(doc.tokens)


def did(receipt: EditReceipt | None, part: int) -> list[str]:
    assert receipt is not None
    return [one.action for one in receipt.actions if one.part == part]


def test_receipts_say_what_was_done_with_each_part(make_llm: Make) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=8))
    asked = ["ab", Chunk(TEXTS[0]), Chunk(TEXTS[1]), "c"]
    first = llm.join(asked, fidelity="repaired", share=0.2).receipt
    assert did(first, 0) == ["recompute"]
    assert did(first, 1) == did(first, 2) == ["compute", "shift", "repair"]
    again = llm.join(asked, fidelity="repaired", share=0.2).receipt
    assert again is not None
    assert did(again, 1) == did(again, 2) == ["shift", "repair"]
    rows = sum(one.rows for one in again.actions)
    assert rows == 2 + 18 + 13 + 1
    assert again.recomputed == rows - 1  # of a known text one row runs
    assert again.repaired == 18 + 13
    assert again.deviation is not None
    assert again.deviation_left is not None
    assert again.deviation_left <= again.deviation
    assert did(llm.join(asked, fidelity="shifted").receipt, 1) == ["shift"]


def variants(llm: LLM, text: str) -> list[Variant]:
    tokens = TOKENIZER.encode(text)
    return llm.loop.call(lambda engine: engine.chunks.variants(tokens, ANYBODY)).result(10)


def test_craft_learns_where_it_computes_and_others_do_not(make_llm: Make) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=8))
    asked = ["ab", Chunk(TEXTS[0]), Chunk(TEXTS[1]), "c"]
    llm.join(asked, fidelity="repaired")
    assert [one.statistics for one in variants(llm, TEXTS[1])] == [None]
    other = make_llm(runner=FakeRunner(num_layers=8))
    first = other.join(asked, planner="craft").receipt
    assert first is not None
    assert first.tokens == {"exact": 157}
    (variant,) = variants(other, TEXTS[1])
    assert variant.statistics is not None
    assert variant.statistics.behind.lengths == (90,)
    assert variant.base == 2 + 90
    # Behind the same it is exact, which no planner repairs; behind others it is worth a repair.
    other.loop.call(lambda engine: engine.memory.tree.clear()).result(10)
    again = other.join(asked, fidelity="repaired", planner="craft").receipt
    assert again is not None
    assert again.tokens == {"exact": 157}
    assert did(again, 1) == did(again, 2) == ["shift"]
    turned = [asked[0], *asked[2:0:-1], asked[3]]
    moved = other.join(turned, fidelity="repaired", planner="craft").receipt
    assert did(moved, 1)[0] == did(moved, 2)[0] == "shift"
    assert variants(other, TEXTS[1])[0].saved_rows > 0


def test_a_chunk_keeps_few_variants(make_llm: Make) -> None:
    llm = make_llm()
    for number in range(MAX_VARIANTS + 2):
        llm.join(["ab"[: number % 3] + "c" * number, Chunk(TEXTS[2]), "d"], planner="craft")
    assert len(variants(llm, TEXTS[2])) == MAX_VARIANTS
    llm.loop.call(lambda engine: engine.memory.check()).result(10)
    assert books(llm) == 0


def test_parts_bring_kv_along(make_llm: Make) -> None:
    llm = make_llm()
    kept = llm.document(TEXTS[0])
    text = TokenPart(tuple(TOKENIZER.encode("ab")), reusable=False)
    mine = TokenPart(tuple(kept.tokens), reusable=True, kv=kept.kv)
    end = TokenPart((3,), reusable=False)
    joined = join_tokens(llm, [text, mine, end], fidelity="shifted")
    assert joined.text == "ab" + TEXTS[0] + "c"
    assert joined.receipt is not None
    assert (did(joined.receipt, 1), joined.receipt.recomputed) == (["shift"], 3)
    assert joined.receipt.actions[1].variant == "own 1"
    at_the_start = join_tokens(llm, [mine, end], fidelity="repaired")
    assert at_the_start.receipt is not None
    assert at_the_start.receipt.tokens == {"exact": 91}
    # What was forgotten of it, or is of other tokens, is computed as any chunk.
    other = TokenPart(tuple(TOKENIZER.encode(TEXTS[1])), reusable=True, kv=kept.kv)
    llm.loop.call(lambda engine: engine.memory.tree.clear()).result(10)
    assert did(join_tokens(llm, [text, other, end], fidelity="shifted").receipt, 1)[0] == "compute"
    llm.loop.call(lambda engine: kept.kv.truncate(0)).result(10)
    assert did(join_tokens(llm, [text, mine, end], fidelity="shifted").receipt, 1)[0] == "compute"
    for doc in (kept, joined, at_the_start):
        doc.close()
    assert books(llm) == 0


@pytest.mark.parametrize("edited", [False, True])
def test_the_end_of_a_document_is_brought_along(make_llm: Make, edited: bool) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    kept = llm.document("ab" + TEXTS[0])
    if edited:
        kept.edit(40, 40, "xyz", fidelity="repaired", share=0.3)
    tokens = tuple(kept.tokens[2:])
    text = TokenPart(tuple(TOKENIZER.encode("cdefgh")), reusable=False)
    mine = TokenPart(tokens, reusable=True, kv=kept.kv)
    joined = join_tokens(llm, [text, mine, mine], fidelity="shifted")
    assert joined.tokens == [*text.tokens, *tokens, *tokens]
    assert joined.receipt is not None
    assert (did(joined.receipt, 1), did(joined.receipt, 2)) == (["shift"], ["shift"])
    assert joined.receipt.recomputed == 6 + 1
    repaired = join_tokens(llm, [text, mine, mine], fidelity="repaired", share=1)
    assert list(repaired.generate("a", greedy(3)).outputs[0].token_ids) == exactly(repaired.tokens)
    at_its_place = join_tokens(llm, [TokenPart((1, 2), reusable=False), mine], fidelity="shifted")
    assert at_its_place.receipt is not None
    for doc in (kept, joined, repaired, at_its_place):
        doc.close()
    assert books(llm) == 0


@pytest.mark.parametrize("closed", [False, True])
def test_kv_that_is_let_go_of_meanwhile_is_no_gap(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    llm = make_llm()
    kept = llm.document(TEXTS[0])
    text = TokenPart(tuple(TOKENIZER.encode("ab")), reusable=False)
    mine = TokenPart(tuple(kept.tokens), reusable=True, kv=kept.kv)
    if closed:
        kept.close()
    else:
        plain = Building.show

        def show(self: Building, variant: Any, place: int) -> None:
            kept.edit(3, 5, "x")
            kept.close()
            llm.loop.call(lambda engine: engine.release_abandoned()).result(10)
            plain(self, variant, place)

        monkeypatch.setattr(Building, "show", show)
    joined = join_tokens(llm, [text, mine, text], fidelity="shifted")
    assert joined.text == "ab" + TEXTS[0] + "ab"
    joined.repair()
    assert list(joined.generate("a", greedy(3)).outputs[0].token_ids) == exactly(joined.tokens)
    joined.close()
    assert books(llm) == 0


def test_tenants_share_no_chunks(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    asked = [TokenPart((1, 2), reusable=False), TokenPart(tuple(BOOKS[0][:90]), reusable=True)]
    rows = []
    for tenant in (hash_tenant("alice"), hash_tenant("bob"), hash_tenant("alice")):
        receipt = join_tokens(llm, asked, fidelity="shifted", tenant=tenant).receipt
        assert receipt is not None
        rows.append(receipt.recomputed)
    assert rows == [2 + 92 + 1, 2 + 92 + 1, 2 + 1]


class Odd(TieredStore):
    """A store that knows chunks and gives something else for them."""

    gives: str = "as it is"

    def fetch(self, key: Any) -> Future[Any]:
        future: Future[Any] = Future()
        chunk = self.get(key)
        assert chunk is not None
        match self.gives:
            case "hangs":
                pass
            case "raises":
                future.set_exception(OSError("no such file"))
            case "gone":
                future.set_result(None)
            case "moved":
                future.set_result(replace(chunk, base=chunk.base + 1))
            case "another":
                tokens = chunk.tokens[::-1].copy()
                key = chunk.key.place.key(hash_tokens(tokens))
                future.set_result(replace(chunk, tokens=tokens, key=key))
            case "doubles":
                found = {name: x.double() for name, x in chunk.tensors.items()}
                future.set_result(replace(chunk, tensors=found))
            case _:
                future.set_result(chunk)
        return future


def shelved(make_llm: Make, store: TieredStore) -> LLM:
    """An engine with a shelf, whose prefixes are not found again."""
    llm = make_llm()

    def give(engine: Any) -> None:
        memory = engine.memory
        memory.shelf = Shelf(store, engine.pool, memory.root, b"one model", lambda tokens: [])

    llm.loop.call(give).result(10)
    return llm


ASKED: list[str | Chunk] = ["ab", Chunk(TEXTS[0]), Chunk(TEXTS[1]), "c"]


def test_chunks_come_back_after_a_restart(make_llm: Make, tmp_path: Path) -> None:
    def store() -> TieredStore:
        return TieredStore(RamStore(2**24), DiskStore(tmp_path, 2**24))

    before = shelved(make_llm, store())
    cold = before.join(ASKED, fidelity="shifted")
    said = cold.generate("a", greedy(3)).outputs[0].token_ids
    before.close()
    after = shelved(make_llm, store())
    turned = after.join([ASKED[0], *ASKED[2:0:-1], ASKED[3]], fidelity="shifted").receipt
    assert turned is not None
    assert did(turned, 1) == did(turned, 2) == ["load", "shift"]
    assert {one.tier for one in turned.actions if one.action == "load"} == {"disk"}
    assert turned.loaded_bytes > 0
    assert turned.recomputed == 2 + 1
    warm = after.join(ASKED, fidelity="shifted")
    assert did(warm.receipt, 1) == ["shift"]
    assert warm.generate("a", greedy(3)).outputs[0].token_ids == said


@pytest.mark.parametrize("gives", ["hangs", "raises", "gone", "moved", "another", "doubles"])
def test_a_failed_load_is_a_miss(
    make_llm: Make, gives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings_module, "LOADING_S", 0.2)
    store = Odd(RamStore(2**24))
    before = shelved(make_llm, store)
    said = before.join(ASKED, fidelity="shifted").generate("a", greedy(3)).outputs[0].token_ids

    def put_by(engine: Any) -> None:
        while engine.idle.has_work:
            engine.idle.step()
        engine.memory.shelf._scanner.drain(10)

    before.loop.call(put_by).result(20)
    after = shelved(make_llm, store)
    store.gives = gives
    joined = after.join(ASKED, fidelity="shifted")
    assert did(joined.receipt, 1) == did(joined.receipt, 2) == ["compute", "shift"]
    assert joined.generate("a", greedy(3)).outputs[0].token_ids == said
    counts = after.loop.call(lambda engine: engine.memory.shelf.counts).result(10)
    assert counts["missed"] == 2
    joined.close()
    assert books(after) == 0
