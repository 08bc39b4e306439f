"""Tokens, their bytes, and chats."""

from __future__ import annotations

import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvloom.errors import ModelLoadError, RequestError, UnsupportedModelError
from kvloom.model.tokenizer import FastTokenizer, load_tokenizer
from tests.model.tiny_models import (
    byte_level_backend,
    byte_level_tokenizer,
    metaspace_backend,
)

USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def byte_level() -> FastTokenizer:
    return FastTokenizer(byte_level_tokenizer())


@pytest.fixture(scope="module")
def metaspace() -> FastTokenizer:
    return FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=metaspace_backend()))


@pytest.fixture(scope="module")
def smollm2(default_model_path: Path) -> FastTokenizer:
    return load_tokenizer(default_model_path)


def joined(tokenizer: FastTokenizer, token_ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids)


@given(text=st.text())
@example(text=" \n\t\r  👩‍👩‍👧 e\u0301 \u00a0\u200b \x00 \x7f \u0100\u0143 Ġ ▁ ")
def test_byte_level_tokens_spell_the_text(byte_level: FastTokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    assert joined(byte_level, ids) == text.encode()
    assert byte_level.decode(ids) == text


@given(text=st.text(st.characters(blacklist_characters="▁", blacklist_categories=("Cs",))))
@example(text="  two  spaces 日本語 <0x41> ")
def test_metaspace_tokens_spell_the_text(metaspace: FastTokenizer, text: str) -> None:
    ids = metaspace.encode(text, add_special_tokens=False)
    assert joined(metaspace, ids) == text.encode()
    assert metaspace.decode(ids) == text


@given(
    text=st.text(st.characters(blacklist_characters="▁ ", blacklist_categories=("Cs",)), min_size=1)
)
def test_a_prepended_space_belongs_to_the_first_token(text: str) -> None:
    backend = metaspace_backend("always")
    tokenizer = FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert joined(tokenizer, ids) == b" " + text.encode()


@given(text=st.text())
@example(text="In 2024,  x = 12345;\tdef f(x): return '🙂'")
def test_smollm2_tokens_spell_the_text(
    smollm2: FastTokenizer, smollm2_bytes: frozenset[int], text: str
) -> None:
    ids = smollm2.encode(text, add_special_tokens=False)
    known = bytes(byte for byte in text.encode() if byte in smollm2_bytes)
    assert joined(smollm2, ids) == known


def test_smollm2_lacks_no_byte_of_an_assigned_character(smollm2_bytes: frozenset[int]) -> None:
    lacking = set(range(256)) - smollm2_bytes
    for codepoint in range(sys.maxunicode + 1):
        if unicodedata.category(chr(codepoint)) not in {"Cn", "Co", "Cs", "Cc"}:
            assert lacking.isdisjoint(chr(codepoint).encode()), hex(codepoint)


@given(data=st.data())
def test_bytes_of_any_tokens_decode_like_the_tokenizer(
    byte_level: FastTokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=20))
    assert joined(byte_level, ids).decode(errors="replace") == byte_level.decode(ids)


def test_every_smollm2_token_decodes_to_its_bytes(smollm2: FastTokenizer) -> None:
    for token_id in range(smollm2.vocab_size):
        text = smollm2.decode([token_id])
        assert smollm2.token_bytes(token_id).decode(errors="replace") == text


def test_special_and_unknown_tokens_stand_for_nothing(smollm2: FastTokenizer) -> None:
    assert {smollm2.token_bytes(token_id) for token_id in smollm2.special_ids} == {b""}
    for unknown in (-1, smollm2.vocab_size, 10**9):
        assert smollm2.token_bytes(unknown) == b""
    assert smollm2.decode([smollm2.vocab_size + 5]) == ""


def test_added_tokens_that_are_not_special_stand_for_their_text() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<think>", "straße ▁Ġ"])
    wrapped = FastTokenizer(tokenizer)
    text = "a<think>straße ▁Ġb"
    ids = wrapped.encode(text)
    assert joined(wrapped, ids) == text.encode()
    assert wrapped.vocab_size == len(tokenizer)


def test_spelled_special_tokens_become_special_as_in_transformers(
    smollm2: FastTokenizer, default_model_path: Path
) -> None:
    text = "Hi<|im_end|> there"
    reference = AutoTokenizer.from_pretrained(default_model_path)
    assert smollm2.encode(text) == reference.encode(text)
    assert smollm2.decode(smollm2.encode(text)) == "Hi there"
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


@given(text=st.text(max_size=60))
def test_encode_equals_transformers(
    smollm2_reference: Any, smollm2: FastTokenizer, text: str
) -> None:
    assert smollm2.encode(text) == smollm2_reference.encode(text)


@pytest.fixture(scope="module")
def smollm2_bytes(smollm2_reference: Any) -> frozenset[int]:
    """The bytes that stand in the vocabulary, by transformers' own table."""
    vocab = smollm2_reference.get_vocab()
    return frozenset(byte for byte, letter in bytes_to_unicode().items() if letter in vocab)


@pytest.fixture(scope="module")
def smollm2_reference(default_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model_path)


def test_facts_of_smollm2(smollm2: FastTokenizer, smollm2_reference: Any) -> None:
    assert smollm2.vocab_size == len(smollm2_reference) == 49152
    assert smollm2.eos_token_ids == {smollm2_reference.convert_tokens_to_ids("<|im_end|>")}
    assert smollm2.bos_token_id == smollm2_reference.convert_tokens_to_ids("<|im_start|>")
    assert smollm2.special_ids == {
        token_id
        for token_id, token in smollm2_reference.added_tokens_decoder.items()
        if token.special
    }


def test_beginning_tokens_are_added_only_if_asked() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = byte_level_backend()
    backend.post_processor = TemplateProcessing("<|turn|> $A", None, [("<|turn|>", 1)])
    tokenizer = FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]


def test_eos_is_the_tokenizers_and_the_models() -> None:
    assert FastTokenizer(byte_level_tokenizer(), [7, 9]).eos_token_ids == {0, 7, 9}


def test_half_a_surrogate_pair_is_refused(byte_level: FastTokenizer) -> None:
    with pytest.raises(RequestError, match="character 1") as caught:
        byte_level.encode("a\ud83d")
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError) as caught:
        byte_level.chat_tokens([{"role": "user", "content": "a\ud83d"}])
    assert caught.value.param == "messages"


def test_a_tokenizers_own_truncation_and_padding_are_off() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    wrapped = FastTokenizer(tokenizer)
    assert wrapped.decode(wrapped.encode("a longer text than four tokens")) == (
        "a longer text than four tokens"
    )
    assert len(wrapped.encode("a")) == 1


def test_threads_may_share_a_tokenizer(smollm2: FastTokenizer) -> None:
    texts = [f"text number {number} " * number for number in range(1, 60)]
    expected = [smollm2.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2.encode, texts * 4)) == expected * 4


def test_chat_equals_transformers(smollm2: FastTokenizer, smollm2_reference: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello 🙂"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    rendered = smollm2_reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    tokens = smollm2_reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert smollm2.render_chat(messages) == rendered
    assert smollm2.chat_tokens(messages) == tokens


def test_without_a_chat_template_messages_are_refused() -> None:
    tokenizer = FastTokenizer(byte_level_tokenizer(chat_template=None))
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.render_chat(USER)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hello",
        {},
        ["Hello"],
        [None],
        [[{"role": "user", "content": "nested"}]],
        [{}],
        [{"content": "no role"}],
        [{"role": None, "content": "x"}],
        [{"role": 3, "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    ],
)
def test_messages_the_template_cannot_take_are_refused(
    smollm2: FastTokenizer, messages: Any
) -> None:
    with pytest.raises(RequestError) as caught:
        smollm2.chat_tokens(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['role'] + 1 }}",
        "{{ messages[9]['role'] }}",
        "{% if %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_is_a_bad_request(template: str) -> None:
    tokenizer = FastTokenizer(byte_level_tokenizer(chat_template=template))
    with pytest.raises(RequestError) as caught:
        tokenizer.render_chat(USER)
    assert caught.value.param == "messages"


def test_the_templates_own_reason_is_told() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = FastTokenizer(byte_level_tokenizer(chat_template=template))
    with pytest.raises(RequestError, match="roles must alternate"):
        tokenizer.render_chat(USER)


def test_digest_follows_what_text_becomes_and_nothing_else() -> None:
    plain, other_template = byte_level_tokenizer(), byte_level_tokenizer(chat_template=None)
    added = byte_level_tokenizer()
    added.add_tokens(["<think>"])
    digests = [FastTokenizer(tokenizer).digest() for tokenizer in (plain, other_template, added)]
    assert digests[0] == digests[1] != digests[2]


def test_a_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UnsupportedModelError, match="SlowTokenizer"):
        FastTokenizer(SlowTokenizer())


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": 3}'])
def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load_tokenizer(tmp_path)
