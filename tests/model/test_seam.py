"""The seam runner gives the numbers of plain transformers, however rows are packed and cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvloom.errors import CapacityError
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool
from kvloom.model.probe import probe
from kvloom.model.seam import SeamRunner
from tests.model.families import FAMILIES, Family, build, parameters
from tests.model.running import (
    BY_NAME,
    ROOT,
    assert_same,
    cached,
    owned_blocks,
    plain_logits,
    pool_for,
    prepared,
    rows_of,
    some_tokens,
)
from tests.model.texts import Texts

RUNNING = [entry for entry in FAMILIES if entry.expect != "refused"]
# One of each kind: window beside full, sinks, softcap, interleaved beside none, latent keys,
# learned positions, its own rotation.
KINDS = [
    "llama",
    "gemma3_text",
    "gpt_oss",
    "gemma2",
    "cohere2",
    "deepseek_v3_yarn",
    "gpt2",
    "deepseek_v2",
]
LENGTHS = (41, 23, 58)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, SeamRunner]:
    return prepared("llama")


@pytest.mark.parametrize("entry", parameters(RUNNING))
def test_family_equals_transformers(entry: Family) -> None:
    plain, runner = prepared(entry.name)
    random = np.random.default_rng(len(entry.name))
    texts = Texts(plain, runner, LENGTHS, seed=7)
    texts.go_on({2: LENGTHS[2]})
    while texts.docs[0].length < LENGTHS[0] or texts.docs[1].length < LENGTHS[1]:
        texts.go_on({int(n): int(random.choice([1, 1, 5, 17])) for n in random.permutation(2)})
    subsets = {n: random.permutation(count)[: count // 2] for n, count in enumerate(LENGTHS)}
    texts.scatter({n: subset.tolist() for n, subset in subsets.items()})
    texts.docs[2].truncate(37)
    texts.go_on({2: 1})
    texts.finish()
    texts.close()


def test_enough_families_are_equal() -> None:
    assert len({entry.config().model_type for entry in RUNNING}) >= 38


lengths = st.tuples(*[st.integers(1, 60)] * 3)
steps = st.lists(
    st.dictionaries(st.integers(0, 2), st.integers(1, 40), min_size=1, max_size=3), max_size=8
)


@pytest.mark.parametrize("name", KINDS)
def test_cuts_and_packing_change_nothing(name: str) -> None:
    plain, runner = prepared(name)

    @settings(max_examples=12)
    @given(lengths, steps, st.integers(0, 99), st.data())
    def law(
        lengths: tuple[int, ...], steps: list[dict[int, int]], seed: int, data: st.DataObject
    ) -> None:
        texts = Texts(plain, runner, lengths, seed)
        for step in steps:
            texts.go_on(step)
            whole = {n: doc.length for n, doc in enumerate(texts.docs) if doc.length}
            if data.draw(st.booleans()) and whole:
                n = data.draw(st.sampled_from(sorted(whole)))
                pos = st.lists(st.integers(0, whole[n] - 1), min_size=1, unique=True)
                texts.scatter({n: data.draw(pos)})
        texts.finish()
        texts.close()

    law()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_forks_share_what_they_have_in_common(name: str) -> None:
    plain, runner = prepared(name)
    pool = pool_for(runner)
    stem = some_tokens(70)
    first = cached(runner, pool, stem)
    used = pool.used_bytes
    docs = [first, first.fork(), first.fork()]
    assert pool.used_bytes == used
    ends = [some_tokens(count, seed=count) for count in (9, 1, 30)]
    found = runner.forward([rows_of(doc, end) for doc, end in zip(docs, ends, strict=True)])
    for logits, end in zip(found.logits, ends, strict=True):
        assert_same(logits, plain_logits(plain, np.concatenate([stem, end]))[len(stem) :])


def test_rows_may_be_read_and_written_in_one_step(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    tokens = some_tokens(50)
    doc = cached(runner, pool_for(runner), tokens[:40])
    truth = plain_logits(plain, tokens)
    found = runner.forward(
        [
            rows_of(doc, tokens[[30, 3]], [30, 3], write="none"),
            rows_of(doc, tokens[40:]),
            rows_of(doc, tokens[40:45], np.arange(40, 45), write="none"),
        ]
    ).logits
    assert_same(found[0], truth[[30, 3]])
    assert_same(found[1], truth[40:])
    assert_same(found[2], truth[40:45])
    assert doc.tokens == tokens.tolist()
    assert doc.exact_length() == 50


def test_other_tokens_may_be_tried_in_a_place(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    tokens, other = some_tokens(40), some_tokens(40, seed=5)
    doc = cached(runner, pool_for(runner), tokens)
    place = np.arange(20, 40)[::-1]
    found = runner.forward([rows_of(doc, other[place], place, write="none")]).logits[0]
    mixed = np.concatenate([tokens[:20], other[20:]])
    assert_same(found, plain_logits(plain, mixed)[place.copy()])


def test_scattered_rows_over_a_full_pool_of_holes(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    pool = pool_for(runner, num_blocks=6)
    tokens = some_tokens(150)
    doc, *fillers = (KVDoc(pool, ROOT) for _ in range(4))
    for filler in fillers:
        runner.forward([rows_of(filler, tokens[:64], logits="none")])
    fillers[0].close()
    runner.forward([rows_of(doc, tokens, logits="none")])
    fillers[2].close()
    assert pool.free_blocks == 2
    pos = np.random.default_rng(1).permutation(150)[:100]
    found = runner.forward([rows_of(doc, tokens[pos], pos, write="none")]).logits[0]
    assert_same(found, plain_logits(plain, tokens)[pos])


# Shifts: the oracle is transformers' own cache with every key turned by its own rotary table.


@dataclass(frozen=True)
class Moved:
    """A cached text whose second part, and a question behind it, stand `shift` positions later."""

    first: np.ndarray
    second: np.ndarray
    question: np.ndarray
    shift: int

    @property
    def text(self) -> np.ndarray:
        return np.concatenate([self.first, self.second])

    @property
    def question_pos(self) -> np.ndarray:
        return len(self.text) + self.shift + np.arange(len(self.question))


@torch.inference_mode()
def logits_with_turned_keys(model: Any, moved: Moved) -> Tensor:
    """Turn the cached keys of the second part one by one, and ask the question behind them."""
    import sys

    cache = model(input_ids=torch.from_numpy(moved.text)[None], use_cache=True).past_key_values
    rotary = model.base_model.rotary_emb
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    count = len(moved.second)
    cos, sin = rotary(torch.zeros(1), torch.full((1, count), moved.shift))
    cos, sin = cos / rotary.attention_scaling, sin / rotary.attention_scaling
    part = 2 * rotary.inv_freq.numel()
    for layer in cache.layers:
        keys = layer.keys[:, :, len(moved.first) :, :part]
        layer.keys[:, :, len(moved.first) :, :part] = apply(keys, keys, cos, sin)[1]
    rows, past = len(moved.question), len(moved.text)
    mask = torch.full((rows, past + rows), torch.finfo(torch.float32).min).triu(past + 1)
    logits: Tensor = model(
        input_ids=torch.from_numpy(moved.question)[None],
        position_ids=torch.from_numpy(moved.question_pos)[None],
        attention_mask=mask[None, None],
        past_key_values=cache,
    ).logits[0]
    return logits


def shifted(doc: KVDoc, start: int, shift: int) -> KVDoc:
    """Return a document whose tokens from `start` on stand `shift` positions later."""
    doc.close_tail()
    (span,) = doc.spans
    second = replace(span.sub(start, doc.length), shift=shift)
    return KVDoc(doc.pool, doc.root, (span.sub(0, start), second))


@pytest.mark.parametrize("name", ["llama", "glm", "cohere", "phi", "gpt_neox", "llama_yarn"])
def test_shift_equals_keys_turned_one_by_one(name: str) -> None:
    plain, runner = prepared(name)

    @settings(max_examples=10)
    @given(st.integers(1, 40), st.integers(2, 40), st.integers(1, 9), st.integers(-30, 300))
    def law(first: int, second: int, question: int, shift: int) -> None:
        shift = max(shift, 1 - second)  # every query stands behind every key
        moved = Moved(
            some_tokens(first, 1), some_tokens(second, 2), some_tokens(question, 3), shift
        )
        pool = pool_for(runner)
        doc = cached(runner, pool, moved.text)
        there = shifted(doc, first, shift)
        found = runner.forward([rows_of(there, moved.question, moved.question_pos)]).logits[0]
        assert_same(found, logits_with_turned_keys(plain, moved))
        # The unmoved document still reads its keys where they were.
        again = runner.forward([rows_of(doc, moved.question, write="none")]).logits[0]
        whole = np.concatenate([moved.text, moved.question])
        assert_same(again, plain_logits(plain, whole)[len(moved.text) :])
        assert there.exact_length() == (first if shift else len(whole))

    law()


def test_whole_text_elsewhere_is_the_same_text(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    tokens = some_tokens(40)
    doc = cached(runner, pool_for(runner), tokens[:30])
    there = shifted(doc, 0, 100)
    assert there.end_pos == 130
    found = runner.forward([rows_of(there, tokens[30:])]).logits[0]
    assert_same(found, plain_logits(plain, tokens)[30:])


# One process, several runners and formats.


def test_heads_may_be_grouped_in_any_way() -> None:
    for name in ("llama_mha", "llama", "llama_mqa"):
        plain, runner = prepared(name)
        texts = Texts(plain, runner, (20, 30), seed=0)
        for step in ({0: 7, 1: 20}, {0: 1, 1: 1}):
            texts.go_on(step)
        texts.finish()


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama_yarn", "cohere2", "phi"])
def test_bfloat16_is_as_near_as_its_rounding(name: str) -> None:
    plain, runner = prepared(name, torch.bfloat16)
    assert runner.spec.positions == "movable"
    layers = prepared(name)[1].spec.layers
    assert runner.spec.layers == layers, "half precision finds the same rotations"
    tokens = some_tokens(50)
    pool = pool_for(runner, dtype=torch.bfloat16)
    doc, truth = KVDoc(pool, ROOT), plain_logits(plain, tokens)
    for start, stop in ((0, 30), (30, 49), (49, 50)):
        found = runner.forward([rows_of(doc, tokens[start:stop])]).logits[0]
        assert_same(found, truth[start:stop], "bfloat16")


def test_runners_do_not_know_of_each_other() -> None:
    llama_plain, llama_runner = prepared("llama")
    other_plain, other_runner = prepared("gemma3_text")
    twin_plain, twin_runner = build(BY_NAME["llama"], seed=1), probe(build(BY_NAME["llama"], 1))
    pairs = ((llama_plain, llama_runner), (other_plain, other_runner), (twin_plain, twin_runner))
    sides = [Texts(plain, runner, (30,), seed=n) for n, (plain, runner) in enumerate(pairs)]
    for count in (11, 1, 1, 17):
        for side in sides:
            side.go_on({0: count})
    for side in sides:
        side.finish()


# Steps that end early, fail, or are watched.


@dataclass
class Witness:
    """An observer that notes what it sees, and may object."""

    objects_at: int | None = None
    layers: list[int] = field(default_factory=list)
    shapes: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.layers.append(layer)
        self.shapes.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        self.keys.append(k.clone())
        if layer == self.objects_at:
            raise ValueError("seen enough")


def test_observer_sees_each_layer_once_after_rotation(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    tokens, witness = some_tokens(12), Witness()
    doc = KVDoc(pool_for(runner), ROOT)
    runner.forward([rows_of(doc, tokens)], observe=witness)
    assert witness.layers == [layer.index for layer in runner.spec.layers]
    assert set(witness.shapes) == {((4, 12, 16), (2, 12, 16), (2, 12, 16))}
    with torch.inference_mode():
        cache = plain(input_ids=torch.from_numpy(tokens)[None], use_cache=True).past_key_values
    for seen, layer in zip(witness.keys, cache.layers, strict=True):
        torch.testing.assert_close(seen, layer.keys[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("last", [0, 2])
def test_stop_after_ends_behind_that_layer(llama: tuple[Any, SeamRunner], last: int) -> None:
    plain, runner = llama
    tokens, witness = some_tokens(20), Witness()
    doc = cached(runner, pool_for(runner), tokens[:10])
    check = rows_of(doc, tokens[:10], np.arange(10), write="none")
    output = runner.forward([check], observe=witness, stop_after=last)
    assert output.logits == (None,)
    assert witness.layers == list(range(last + 1))
    found = runner.forward([rows_of(doc, tokens[10:])]).logits[0]
    assert_same(found, plain_logits(plain, tokens)[10:])


def test_logits_come_as_asked_for(llama: tuple[Any, SeamRunner]) -> None:
    plain, runner = llama
    tokens = some_tokens(15)
    truth = plain_logits(plain, tokens)
    pool = pool_for(runner)
    docs = [KVDoc(pool, ROOT) for _ in range(4)]
    modes = ("last", "none", "all", "last")
    counts = (15, 6, 9, 1)
    rows = [
        rows_of(doc, tokens[:count], logits=mode)
        for doc, count, mode in zip(docs, counts, modes, strict=True)
    ]
    first, second, third, fourth = runner.forward(rows).logits
    assert second is None
    assert_same(first, truth[14:])
    assert_same(third, truth[:9])
    assert_same(fourth, truth[:1])
    assert first is not None
    assert first.dtype == torch.float32


def test_models_without_a_choice_of_rows_give_the_same_ones() -> None:
    plain, runner = prepared("whisper")
    tokens = some_tokens(9)
    doc = KVDoc(pool_for(runner), ROOT)
    assert_same(
        runner.forward([rows_of(doc, tokens, logits="last")]).logits[0],
        plain_logits(plain, tokens)[8:],
    )
    assert runner.forward([rows_of(doc, tokens[:1], logits="none")]).logits == (None,)


def states(docs: list[KVDoc], pool: Pool) -> list[Any]:
    for doc in docs:
        doc.shrink()  # room that was taken for more is no trace
    kept = [(doc.tokens, doc.end_pos, doc.exact_length(), doc.lineage()) for doc in docs]
    return [kept, pool.free_blocks]


@pytest.mark.parametrize("write", ["append", "none"])
def test_step_that_fails_midway_leaves_no_trace(llama: tuple[Any, SeamRunner], write: Any) -> None:
    plain, runner = llama
    tokens = some_tokens(60)
    pool = pool_for(runner)
    docs = [cached(runner, pool, tokens[:count]) for count in (20, 64)]
    before = states(docs, pool)
    place = np.arange(20, 40) if write == "append" else np.arange(19, -1, -1)
    rows = [rows_of(docs[0], tokens[place], place, write=write), rows_of(docs[1], tokens[:30])]
    with pytest.raises(ValueError, match="seen enough"):
        runner.forward(rows, observe=Witness(objects_at=2))
    assert states(docs, pool) == before
    assert pool.owners().tolist() == owned_blocks(pool, docs).tolist()
    found = runner.forward([rows_of(docs[0], tokens[20:])]).logits[0]
    assert_same(found, plain_logits(plain, tokens)[20:])


@pytest.mark.parametrize("write", ["append", "none"])
def test_step_that_does_not_fit_leaves_no_trace(llama: tuple[Any, SeamRunner], write: Any) -> None:
    plain, runner = llama
    tokens = some_tokens(100)
    pool = pool_for(runner, num_blocks=3)
    docs = [cached(runner, pool, tokens[:count]) for count in (70, 30)]
    docs.append(KVDoc(pool, ROOT))
    before = states(docs, pool)
    place = np.arange(70) if write == "none" else 70 + np.arange(30)
    with pytest.raises(CapacityError):
        runner.forward(
            [
                rows_of(docs[1], tokens[30:60]),
                rows_of(docs[0], some_tokens(len(place)), place, write=write),
                rows_of(docs[2], tokens[:90]),
            ]
        )
    assert states(docs, pool) == before
    found = runner.forward([rows_of(docs[1], tokens[30:60])]).logits[0]
    assert_same(found, plain_logits(plain, tokens[:60])[30:])
    for doc in docs:
        doc.close()
    assert pool.free_blocks == pool.num_blocks


def test_rows_that_stay_must_continue_their_document(llama: tuple[Any, SeamRunner]) -> None:
    runner = llama[1]
    doc = cached(runner, pool_for(runner), some_tokens(10))
    for pos in ([11, 12], [9, 10], [11, 10]):
        with pytest.raises(AssertionError, match="must continue"):
            runner.forward([rows_of(doc, some_tokens(2), pos)])
        assert doc.length == 10
    with pytest.raises(AssertionError, match="at one position"):
        runner.forward([rows_of(doc, some_tokens(2), [4, 4], write="none")])


def test_model_that_makes_a_mask_later_is_stopped() -> None:
    from kvloom.errors import UnsupportedModelError

    runner = probe(build(BY_NAME["llama"]))
    attention = runner.model.model.layers[0].self_attn
    inner = attention.forward

    def masking(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **{**kwargs, "attention_mask": torch.zeros(1, 1, 3, 3)})

    attention.forward = masking
    doc = KVDoc(pool_for(runner), ROOT)
    with pytest.raises(UnsupportedModelError, match="mask of its own"):
        runner.forward([rows_of(doc, some_tokens(3))])
    assert doc.length == 0
