from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvloom.decode.detokenize import CONTEXT_TOKENS, Detokenizer, TextDecoder

from .texts import LibraryText

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("ab the  .,!é�🙂👩‍👩‍👧‍👦नमस्ते你好\n\x00", max_size=40),
)
TOKENIZERS = ("smollm", "metaspace", "sentencepiece")


@pytest.fixture(scope="module", params=TOKENIZERS)
def decoder(request: pytest.FixtureRequest) -> TextDecoder:
    return TextDecoder.probe(request.getfixturevalue(request.param))


def token_lists(tokenizer: LibraryText) -> st.SearchStrategy[list[int]]:
    """Texts, single bytes in any order, special, unknown and arbitrary tokens, mixed."""
    bytes_alone = [
        token for token in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(token)) == 1
    ]
    characters = "é€🙂"
    parts = st.one_of(
        TEXTS.map(tokenizer.encode),
        st.lists(st.sampled_from(bytes_alone), max_size=12),
        st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3),
        st.lists(st.integers(0, tokenizer.vocab_size + 50), max_size=6),
        st.sampled_from([tokenizer.encode(letter)[:-1] for letter in characters]),
    )
    return st.lists(parts, max_size=6).map(lambda found: list(chain.from_iterable(found)))


@pytest.fixture(scope="module")
def tokens_of_all_kinds(decoder: TextDecoder) -> st.SearchStrategy[list[int]]:
    return token_lists(decoder.tokenizer)


def pieces_of(
    decoder: TextDecoder, tokens: Sequence[int], *, skip: bool = True, context: Sequence[int] = ()
) -> list[str]:
    detokenizer = Detokenizer(decoder, skip_special_tokens=skip, context=context)
    return [*map(detokenizer.push, tokens), detokenizer.flush()]


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_tokenizers_text(
    decoder: TextDecoder, tokens_of_all_kinds: st.SearchStrategy, data: st.DataObject, skip: bool
) -> None:
    tokens = data.draw(tokens_of_all_kinds)
    expected = decoder.tokenizer.decode(tokens, skip_special_tokens=skip)
    assert "".join(pieces_of(decoder, tokens, skip=skip)) == expected


@settings(deadline=None)
@given(data=st.data())
def test_every_prefix_shows_only_what_the_whole_text_begins_with(
    decoder: TextDecoder, tokens_of_all_kinds: st.SearchStrategy, data: st.DataObject
) -> None:
    """Against half characters: what was shown is never taken back, whatever comes next."""
    tokens = data.draw(tokens_of_all_kinds)
    detokenizer = Detokenizer(decoder)
    shown = ""
    for place, token in enumerate(tokens):
        shown += detokenizer.push(token)
        for following in ([], tokens[:place], [tokens[0]] * 4):
            whole = decoder.tokenizer.decode([*tokens[: place + 1], *following])
            assert whole.startswith(shown)


@settings(deadline=None)
@given(text=TEXTS)
def test_valid_text_shows_no_replacement_character(decoder: TextDecoder, text: str) -> None:
    text = text.replace("�", "")
    # Some vocabularies lack bytes that never occurred in training.
    assume(decoder.tokenizer.decode(decoder.tokenizer.encode(text)).strip(" ") == text.strip(" "))
    pieces = pieces_of(decoder, decoder.tokenizer.encode(text))
    assert "�" not in "".join(pieces)


@settings(deadline=None)
@given(data=st.data(), text=TEXTS)
def test_text_after_a_context_is_what_the_tokens_add(
    decoder: TextDecoder, tokens_of_all_kinds: st.SearchStrategy, data: st.DataObject, text: str
) -> None:
    context = decoder.tokenizer.encode(text + "a")
    tokens = data.draw(tokens_of_all_kinds)
    before = decoder.tokenizer.decode(context)
    expected = decoder.tokenizer.decode(context + tokens)
    assert before + "".join(pieces_of(decoder, tokens, context=context)) == expected


def test_the_space_between_prompt_and_completion_is_kept(sentencepiece: LibraryText) -> None:
    decoder = TextDecoder.probe(sentencepiece)
    prompt, answer = sentencepiece.encode("a"), sentencepiece.encode("the")
    assert "".join(pieces_of(decoder, answer, context=prompt)) == " the"
    assert "".join(pieces_of(decoder, answer)) == "the"


def test_a_character_begun_in_the_context_is_shown_whole(smollm: LibraryText) -> None:
    decoder = TextDecoder.probe(smollm)
    *begun, last = smollm.encode("x🙂")
    assert smollm.decode(begun).endswith("�")
    assert pieces_of(decoder, [last], context=begun) == ["🙂", ""]


def test_bytes_of_the_context_do_not_join_the_first_bytes_generated(
    metaspace: LibraryText,
) -> None:
    context = metaspace.encode("a€")
    broken = metaspace.backend.token_to_id("<0xFF>")
    assert pieces_of(TextDecoder.probe(metaspace), [broken], context=context) == ["", "�"]


def test_a_context_of_special_tokens_is_no_context(sentencepiece: LibraryText) -> None:
    decoder = TextDecoder.probe(sentencepiece)
    start = sentencepiece.backend.token_to_id("<s>")
    tokens = sentencepiece.encode("the b")
    assert "".join(pieces_of(decoder, tokens, context=[start] * 30)) == "the b"


def test_ordinary_text_comes_without_delay(decoder: TextDecoder) -> None:
    tokens = decoder.tokenizer.encode("the ab, b a the")
    detokenizer = Detokenizer(decoder)
    shown = ""
    for place, token in enumerate(tokens):
        shown += detokenizer.push(token)
        assert shown == decoder.tokenizer.decode(tokens[: place + 1])


def test_a_character_of_several_tokens_comes_when_it_is_complete(smollm: LibraryText) -> None:
    tokens = smollm.encode("🙂")
    assert len(tokens) > 1
    assert pieces_of(TextDecoder.probe(smollm), tokens) == [*[""] * (len(tokens) - 1), "🙂", ""]


def test_text_before_an_unfinished_character_is_not_held_back(smollm: LibraryText) -> None:
    lead = next(
        token for token in range(smollm.vocab_size) if smollm.token_bytes(token) == b" \xf0\x9f"
    )
    assert pieces_of(TextDecoder.probe(smollm), [lead, lead]) == [" ", "� ", "�"]


class Counting:
    """A tokenizer that counts how many tokens it is asked to decode."""

    def __init__(self, tokenizer: LibraryText) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("kind", ["text", "lead bytes", "special", "unknown", "byte run"])
def test_the_work_per_token_is_bounded(decoder: TextDecoder, kind: str) -> None:
    tokenizer = decoder.tokenizer
    lead = next(
        token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xe2"
    )
    tokens = {
        "text": tokenizer.encode("the a " * 200),
        "lead bytes": [lead] * 500,
        "special": [*tokenizer.encode("a"), *[min(tokenizer.special_ids)] * 500],
        "unknown": [tokenizer.vocab_size + 3] * 500,
        "byte run": tokenizer.encode("ह" * 300),
    }[kind]
    counting = Counting(tokenizer)
    pieces_of(TextDecoder(counting, decoder.fallback_ids), tokens)
    assert counting.decoded <= 4 * CONTEXT_TOKENS * (len(tokens) + 1)


def test_the_probe_finds_the_bytes_that_join(
    smollm: LibraryText, metaspace: LibraryText, sentencepiece: LibraryText
) -> None:
    assert TextDecoder.probe(smollm).fallback_ids == frozenset()
    for tokenizer in (metaspace, sentencepiece):
        expected = {tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        assert TextDecoder.probe(tokenizer).fallback_ids == expected


@pytest.mark.parametrize("kind", ["metaspace", "sentencepiece"])
def test_the_preview_is_the_run_of_bytes_once_it_is_valid(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    detokenizer = Detokenizer(TextDecoder.probe(tokenizer))
    previews = []
    for token in tokenizer.encode("a€\n"):
        detokenizer.push(token)
        previews.append(detokenizer.preview())
    assert previews[-5:] == ["", "", "", "€", "€\n"]
    assert detokenizer.flush() == "€\n"
    assert detokenizer.preview() == ""
