"""An edit of a text and the edit of its tokens come to the same text."""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.model.tokenizer import FastTokenizer, load_tokenizer
from kvloom.reuse.retokenize import Retokenizer, TokenEdit
from tests.kv.worlds import ROOT, small_pool
from tests.model.tiny_models import byte_level_tokenizer, metaspace_backend

CODE = [
    "def add(left, right):",
    "\n    return left + right\n",
    "    ",
    "\t",
    "\n\n\n",
    "\r\n",
    "1234",
]
PROSE = [
    "The quick brown",
    " fox",
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "👩\u200d👩\u200d👧",
    "naß",
    " ",
    "a",
]
CONTROL = ["<|end|>", "<|turn|>", "<|im_start|>", "<|im_end|>", "<|", "|>"]
words = st.sampled_from(CODE + PROSE + CONTROL)
texts = st.lists(words, max_size=30).map("".join)
short = st.lists(words, max_size=3).map("".join)
ends = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


@lru_cache
def tiny() -> FastTokenizer:
    return FastTokenizer(byte_level_tokenizer())


@lru_cache
def pieces(scheme: str) -> FastTokenizer:
    return FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=metaspace_backend(scheme)))


@lru_cache
def default(path: Path) -> FastTokenizer:
    return load_tokenizer(path)


def specials(tokenizer: FastTokenizer, tokens: list[int]) -> list[int]:
    return [token for token in tokens if token in tokenizer.special_ids]


def check_edit(tokenizer: FastTokenizer, tokens: list[int], ends_: tuple[int, int], text: str):
    """Edit, and hold the result against the edit of the text."""
    retokenizer = Retokenizer(tokenizer)
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    start, end = sorted(number % (len(whole) + 1) for number in ends_)
    expected = whole[:start] + text + whole[end:]
    found = retokenizer.edit_text(tokens, start, end, text, prove=True)
    new = found.applied(tokens)
    made = tokenizer.decode(new, skip_special_tokens=False)
    assert found.lossless == (made == expected)
    assert found.canonical == (new == tokenizer.encode(expected, add_special_tokens=False))
    assert len(specials(tokenizer, new)) <= len(specials(tokenizer, tokens))
    quick = retokenizer.edit_text(tokens, start, end, text)
    assert (quick.replaced, quick.lossless) == (found.replaced, found.lossless)
    assert found.canonical or not quick.canonical
    return found


@settings(max_examples=60)
@given(text=texts, ends_=ends, put=short)
def test_editing_what_was_tokenised_at_once(default_model_path, text, ends_, put):
    for tokenizer in (default(default_model_path), tiny()):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert check_edit(tokenizer, tokens, ends_, put).lossless


@settings(max_examples=60)
@given(parts=st.lists(short, max_size=6), ends_=ends, put=short)
def test_editing_what_was_put_together_piece_by_piece(default_model_path, parts, ends_, put):
    for tokenizer in (default(default_model_path), tiny()):
        tokens = [t for part in parts for t in tokenizer.encode(part, add_special_tokens=False)]
        assert check_edit(tokenizer, tokens, ends_, put).lossless


@settings(max_examples=60)
@given(tokens=st.lists(st.integers(0, 319), max_size=40), ends_=ends, put=short)
def test_editing_any_tokens_even_halves_of_characters(tokens, ends_, put):
    assert check_edit(tiny(), tokens, ends_, put).lossless


@pytest.mark.parametrize("scheme", ["never", "first", "always"])
@settings(max_examples=30)
@given(tokens=st.lists(st.integers(0, 300), max_size=30), text=short, ends_=ends, put=short)
def test_tokenizers_that_add_spaces_are_lossless_or_say_so(scheme, tokens, text, ends_, put):
    tokenizer = pieces(scheme)
    check_edit(tokenizer, tokenizer.encode(text, add_special_tokens=False), ends_, put)
    check_edit(tokenizer, tokens, ends_, put)


@given(text=texts, changed=st.lists(st.tuples(ends, short), max_size=3), pieced=st.booleans())
def test_a_whole_new_text(text, changed, pieced):
    tokenizer = tiny()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if pieced:
        tokens = [t for x in text for t in tokenizer.encode(x, add_special_tokens=False)]
    new_text = tokenizer.decode(tokens, skip_special_tokens=False)
    for ends_, put in changed:
        start, end = sorted(number % (len(new_text) + 1) for number in ends_)
        new_text = new_text[:start] + put + new_text[end:]
    found = Retokenizer(tokenizer).replace_text(tokens, new_text)
    new = found.applied(tokens)
    assert found.lossless
    assert tokenizer.decode(new, skip_special_tokens=False) == new_text
    if found.canonical:
        assert new == tokenizer.encode(new_text, add_special_tokens=False)
    assert len(specials(tokenizer, new)) <= len(specials(tokenizer, tokens))


@given(text=texts, ends_=ends, put=short)
def test_a_document_takes_the_edit(text, ends_, put):
    tokenizer = tiny()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = check_edit(tokenizer, tokens, ends_, put)
    doc = KVDoc(small_pool(20), ROOT)
    doc.append(tokens)
    plan = doc.apply(found.edit)
    assert plan.tokens(doc) == found.applied(tokens)
    assert plan.num_computed == found.num_tokens


def test_the_spelling_of_a_control_token_becomes_none(default_model_path):
    tokenizer = default(default_model_path)
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    tokens = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n", add_special_tokens=False)
    retokenizer = Retokenizer(tokenizer)
    place = retokenizer.text(tokens).index("hi")
    for text in ("<|im_end|>", "a<|im_end|>\n<|im_start|>system\n"):
        found = retokenizer.edit_text(tokens, place, place, text, prove=True)
        assert found.lossless
        assert not found.canonical
        assert specials(tokenizer, found.applied(tokens)) == specials(tokenizer, tokens)
    # Typed one character at a time it is none either, and one that is cut is none any more.
    typed: list[int] = []
    for number, letter in enumerate("<|im_end|>"):
        typed = retokenizer.edit_text(typed, number, number, letter).applied(typed)
    assert retokenizer.text(typed) == "<|im_end|>"
    assert end not in typed
    cut = retokenizer.edit_text([end], 3, 4, "").applied([end])
    assert retokenizer.text(cut) == "<|i_end|>"
    assert not specials(tokenizer, cut)


def test_ranges_that_are_not_there_are_refused() -> None:
    retokenizer = Retokenizer(tiny())
    tokens = tiny().encode("abc", add_special_tokens=False)
    for start, end in ((-1, 2), (2, 1), (0, 4), (4, 4)):
        with pytest.raises(RequestError, match="has 3 characters") as error:
            retokenizer.edit_text(tokens, start, end, "x")
        assert error.value.param == "range"
    with pytest.raises(RequestError, match="surrogate"):
        retokenizer.edit_text(tokens, 0, 1, "\ud800")
    assert retokenizer.edit_text(tokens, 1, 1, "") == TokenEdit((), False, True)


def test_an_edit_touches_what_is_near_it(default_model_path) -> None:
    tokenizer = default(default_model_path)
    text = "".join(f"line {n} = compute(left, right)\n" for n in range(300))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    place = text.index("line 150") + 5
    found = Retokenizer(tokenizer).edit_text(tokens, place, place + 3, "151", prove=True)
    assert found.canonical
    assert found.num_tokens == 1


@pytest.mark.parametrize("length", [3, 100, 1001])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_change_that_reaches_far_is_followed(length: int, place: int) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    backend.decoder = decoders.Fuse()
    tokenizer = FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    tokens = tokenizer.encode("a" * length, add_special_tokens=False)
    found = Retokenizer(tokenizer).edit_text(tokens, place, place, "a", prove=True)
    assert found.canonical


@pytest.mark.shared_data
def test_real_edits_are_canonical_and_touch_little(shared_data, default_model_path):
    tokenizer = default(default_model_path)
    retokenizer = Retokenizer(tokenizer)
    lines = (shared_data / "edits_llm.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines[::5]):
        text, goal = row["before"], row["after"]
        tokens = tokenizer.encode(text, add_special_tokens=False)
        whole = retokenizer.replace_text(tokens, goal)
        assert whole.canonical
        assert whole.lossless
        place = 0
        old, new = text.splitlines(keepends=True), goal.splitlines(keepends=True)
        for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new).get_opcodes():
            gone, put = "".join(old[a:b]), "".join(new[c:d])
            if tag != "equal":
                found = retokenizer.edit_text(tokens, place, place + len(gone), put, prove=True)
                assert found.canonical
                tokens = found.applied(tokens)
            place += len(put)
        assert tokens == tokenizer.encode(goal, add_special_tokens=False)
        assert whole.applied(tokenizer.encode(text, add_special_tokens=False)) == tokens
