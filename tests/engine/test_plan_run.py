"""What every planner must do, through real joins on a tiny model: see `tests/contract` as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom import LLM, Chunk, Document
from kvloom.kv.doc import KVDoc
from kvloom.ops.rope import rotate, shift_table
from kvloom.reuse.planner import PLANNERS
from kvloom.types import Taint
from tests.engine.conftest import make_rows_dear
from tests.model.tiny_models import tiny_llama, write_folder
from tests.tolerances import TOLERANCE

every_planner = pytest.mark.parametrize("planner", PLANNERS)
NEAR = TOLERANCE["float32"]["logits"]
SYSTEM = "Read this. "
CHUNKS = [
    Chunk("def add(left, right):\n    return left + right\n"),
    Chunk("The quick brown fox jumps over the lazy dog.\n"),
    Chunk("for number in range(10):\n    print(number)\n"),
    Chunk("A baker in Rome bakes bread for a pilot.\n"),
]
QUESTION = "What does it say?"
BEHIND = " It says so."


def asked(order: str, question: str = QUESTION) -> list[str | Chunk]:
    return [SYSTEM, *(CHUNKS[int(number)] for number in order), question]


def shown(llm: LLM, document: Document, stop: int) -> list[Tensor]:
    """Return per layer what first tokens show: keys where they stand now beside values."""

    def look(_: Any) -> list[Tensor]:
        kv: KVDoc = document.kv
        kv.close_tail()
        assert kv.length == len(document.tokens)
        found = []
        for spec in llm.spec.layers:
            assert spec.rope is not None
            pieces = []
            for span in kv.order:
                k, v = kv.pool.read(spec.index, *span.pool_slots)
                k = rotate(k.float(), *shift_table(spec.rope, span.shift), spec.rope)
                pieces.append(torch.cat([k, v.float()], dim=-1))
            found.append(torch.cat(pieces, dim=1)[:, :stop])
        return found

    return llm.loop.call(look).result(10)


def repaired_places(llm: LLM, document: Document) -> list[int]:
    def look(_: Any) -> list[int]:
        places, place = [], 0
        for span, taint in document.kv.taints():
            places += range(place, place + span.length) if Taint.REPAIRED in taint else ()
            place += span.length
        return places

    return llm.loop.call(look).result(10)


def length(parts: list[str | Chunk], llm: LLM) -> int:
    texts = [part.text if isinstance(part, Chunk) else part for part in parts]
    return sum(
        len(llm.tokenizer.encode(text, add_special_tokens=number == 0))
        for number, text in enumerate(texts)
    )


def logits(llm: LLM, document: Document) -> Tensor:
    """What a document's own KV says: an exact beginning that is known would answer in its place."""
    forget_prefixes(llm)
    return document.score(BEHIND, return_logits=True)[1]


def forget_prefixes(llm: LLM) -> None:
    llm.loop.call(lambda engine: engine.memory.tree.clear()).result(10)


def fresh_document(llm: LLM, tokens: list[int]) -> Document:
    forget_prefixes(llm)
    return llm.document(tokens)


@pytest.fixture(scope="module")
def deep_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A tiny Llama with more than two layers: values of the second depend on tokens alone."""
    model = tiny_llama(max_position_embeddings=512, num_hidden_layers=4)
    folder = write_folder(tmp_path_factory.mktemp("deep"), model)
    with LLM(str(folder), kv_memory="8MiB", repair_when_idle=False) as made:
        make_rows_dear(made)
        yield made


@pytest.fixture
def llm(deep_llm: LLM) -> LLM:
    """The model with two chunks that were computed behind others, and no known prefix."""

    def forget(engine: Any) -> None:
        engine.release_abandoned()
        engine.chunks.clear()
        engine.memory.tree.clear()

    deep_llm.loop.call(forget).result(10)
    deep_llm.join(asked("10"), planner="craft").close()
    forget_prefixes(deep_llm)
    return deep_llm


@every_planner
def test_exact_equals_a_fresh_prefill(llm: LLM, planner: str) -> None:
    for order in ("10", "012"):
        joined = llm.join(asked(order), planner=planner)
        fresh = fresh_document(llm, joined.tokens)
        assert joined.provenance.tokens == {"exact": len(joined.tokens)}
        torch.testing.assert_close(logits(llm, joined), logits(llm, fresh), atol=NEAR, rtol=NEAR)


@every_planner
def test_a_share_of_one_equals_a_fresh_prefill(llm: LLM, planner: str) -> None:
    if planner == "none":
        return  # repairs nothing whatever is asked
    joined = llm.join(asked("3021"), fidelity="repaired", share=1, planner=planner)
    fresh = fresh_document(llm, joined.tokens)
    torch.testing.assert_close(logits(llm, joined), logits(llm, fresh), atol=NEAR, rtol=NEAR)
    if planner == "craft":
        return  # it has kept what it computed, and shows that
    forget_prefixes(llm)
    less = llm.join(asked("3021"), fidelity="repaired", share=0.1, planner=planner)
    assert not torch.allclose(logits(llm, less), logits(llm, fresh), atol=NEAR, rtol=NEAR)


@every_planner
@pytest.mark.parametrize("between", ["", "\nNext: "])
def test_no_row_sees_what_stands_behind_it(llm: LLM, planner: str, between: str) -> None:
    """Other chunks in the places of the last two change nothing that stands before them."""
    docs = []
    for last in (CHUNKS[1:3], CHUNKS[:0:-2]):
        first: list[str | Chunk] = [SYSTEM, CHUNKS[3], between, CHUNKS[0], between]
        parts = [*first, last[0], between, last[1], QUESTION]
        docs.append(llm.join(parts, fidelity="repaired", share=0.3, planner=planner))
    stop = length(first, llm)
    places = [[p for p in repaired_places(llm, doc) if p < stop] for doc in docs]
    assert places[0] == places[1]
    assert places[0] or planner == "none"
    for one, other in zip(*(shown(llm, doc, stop) for doc in docs), strict=True):
        torch.testing.assert_close(one, other, atol=NEAR, rtol=NEAR)


@every_planner
def test_what_was_asked_before_changes_nothing(llm: LLM, planner: str) -> None:
    first = llm.join(asked("032"), fidelity="repaired", planner=planner)
    before = shown(llm, first, len(first.tokens))
    first.close()
    if planner == "craft":
        return  # it keeps more variants with every join, which is its point
    for order in ("320", "203"):
        llm.join(asked(order), fidelity="repaired", planner=planner).close()
    again = llm.join(asked("032"), fidelity="repaired", planner=planner)
    for one, other in zip(before, shown(llm, again, len(again.tokens)), strict=True):
        torch.testing.assert_close(one, other, atol=NEAR, rtol=NEAR)


def test_a_share_is_of_every_chunk(llm: LLM) -> None:
    for planner in ("blend", "first", "random"):
        receipt = llm.join(asked("23"), fidelity="repaired", share=0.25, planner=planner).receipt
        assert receipt is not None
        rows = [one.rows for one in receipt.actions if one.action == "repair"]
        lengths = [
            len(llm.tokenizer.encode(CHUNKS[n].text, add_special_tokens=False)) for n in (2, 3)
        ]
        assert rows == [math.ceil(0.25 * length) for length in lengths]
        assert receipt.repaired == sum(rows)


def test_first_rows_are_the_first(llm: LLM) -> None:
    doc = llm.join(asked("23"), fidelity="repaired", share=0.1, planner="first")
    start = length([SYSTEM], llm)
    second = start + len(llm.tokenizer.encode(CHUNKS[2].text, add_special_tokens=False))
    rows = [one.rows for one in doc.receipt.actions if one.action == "repair"]  # type: ignore[union-attr]
    expected = [*range(start, start + rows[0]), *range(second, second + rows[1])]
    assert repaired_places(llm, doc) == expected


def test_text_between_chunks_sees_what_was_repaired(llm: LLM) -> None:
    """A text behind a chunk whose rows are all repaired but one is nearer to exact than before."""
    parts = [SYSTEM, CHUNKS[3], CHUNKS[2], "\nNext: ", CHUNKS[0], QUESTION]
    exact = llm.join(parts)
    stop = length(parts[:4], llm)
    text = slice(length(parts[:3], llm), stop)
    truth = shown(llm, exact, stop)[-1][:, text]
    far = []
    for share in (0.0, 0.97):
        forget_prefixes(llm)
        doc = llm.join(parts, fidelity="repaired", share=share)
        far.append(float((shown(llm, doc, stop)[-1][:, text] - truth).square().sum()))
    assert far[1] < 0.5 * far[0]
