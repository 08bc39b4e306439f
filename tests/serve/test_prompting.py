"""Prompts in tokens, part by part, with real tokenizers and templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from kvloom.model.tokenizer import FastTokenizer, load_tokenizer
from kvloom.serve.content import ChunkPart
from kvloom.serve.documents import Snapshot
from kvloom.serve.parts import PromptPart
from kvloom.serve.prompting import chat_prompt, completion_prompts, lead_of
from kvloom.serve.schemas import ChatMessage, CompletionBody
from tests.model.tiny_models import byte_level_tokenizer

from .test_marks import SHOUTING, STRIPPING

words = st.text("ab z\n<|im_start|>é", max_size=12)
# Per message, texts and parts: a document (True) or a chunk (False), with what it says.
contents = st.lists(
    st.lists(st.one_of(words, st.tuples(st.booleans(), words.filter(bool))), min_size=1),
    min_size=1,
    max_size=3,
)
Content = list[str | tuple[bool, str]]


def with_begin(template: str) -> FastTokenizer:
    """Return a tokenizer that puts a token before every text."""
    tokenizer = byte_level_tokenizer(chat_template=template)
    begin = tokenizer.eos_token
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.eos_token_id)]
    )
    return FastTokenizer(tokenizer)


def keep(tokenizer: FastTokenizer, number: int, text: str) -> Snapshot:
    lead = lead_of(tokenizer, text)
    tokens = [*lead, *tokenizer.encode(text, add_special_tokens=False)]
    return Snapshot(f"doc-{number}", 1, text, tokens, "exact", object(), len(lead))


def conversation(
    tokenizer: FastTokenizer, asked: list[Content]
) -> tuple[list[ChatMessage], dict[str, Snapshot]]:
    """Return messages and the documents in them."""
    known: dict[str, Snapshot] = {}
    messages = []
    for content in asked:
        parts: list[dict[str, str]] = []
        for part in content:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
            elif part[0]:
                kept = keep(tokenizer, len(known), part[1])
                known[kept.id] = kept
                parts.append({"type": "document", "document_id": kept.id})
            else:
                parts.append({"type": "chunk", "text": part[1]})
        messages.append(ChatMessage.model_validate({"role": "user", "content": parts}))
    return messages, known


def text_of(part: PromptPart) -> str:
    assert part.source is not None
    return part.source.text


@pytest.fixture(scope="module")
def tokenizers(default_model_path: Path) -> list[FastTokenizer]:
    return [load_tokenizer(default_model_path), with_begin(STRIPPING)]


@given(contents)
def test_parts_spell_the_conversation(
    tokenizers: list[FastTokenizer], asked: list[Content]
) -> None:
    for tokenizer in tokenizers:
        messages, known = conversation(tokenizer, asked)
        whole = chat_prompt(tokenizer, messages, known, by_parts=False)
        (everything,) = whole.parts
        prompt = chat_prompt(tokenizer, messages, known, by_parts=True)
        assert prompt.read_as_text is None
        tokens = [token for part in prompt.parts for token in part.tokens]
        spelled, expected = (
            "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
            for ids in (tokens, everything.tokens)
        )
        assert spelled == expected
        reusable = [part for part in prompt.parts if part.source is not None]
        written = [part[1] for content in asked for part in content if not isinstance(part, str)]
        assert [text_of(part) for part in reusable] == written
        for part in reusable:
            alone = tokenizer.encode(text_of(part), add_special_tokens=False)
            assert list(part.tokens) == alone


def test_an_odd_template_makes_one_text() -> None:
    tokenizer = with_begin(SHOUTING)
    messages, known = conversation(tokenizer, [["a", (True, "b"), (False, "c")]])
    prompt = chat_prompt(tokenizer, messages, known, by_parts=True)
    assert prompt.read_as_text is not None
    assert [part.source for part in prompt.parts] == [None]
    assert tokenizer.decode(prompt.parts[0].tokens) == "A\nB\nC"


@pytest.mark.parametrize("chunk_first", [False, True])
@pytest.mark.parametrize("add_special_tokens", [None, False])
def test_the_begin_token_stands_once(chunk_first: bool, add_special_tokens: bool | None) -> None:
    tokenizer = with_begin(STRIPPING)
    kept = keep(tokenizer, 1, "ab")
    documents: list[Any] = [{"text": "chunk"}, kept.id, kept.id]
    body = CompletionBody.model_validate(
        {
            "documents": documents if chunk_first else documents[::-1],
            "prompt": ["one", "two"],
            "echo": True,
            "add_special_tokens": add_special_tokens,
        }
    )
    beginning, (one, two) = completion_prompts(tokenizer, body, {kept.id: kept})
    begins = not chunk_first or add_special_tokens is None
    assert one.token_ids.count(kept.tokens[0]) == begins
    assert (one.token_ids[0] == kept.tokens[0]) == begins
    text = "chunkabab" if chunk_first else "ababchunk"
    assert tokenizer.decode(one.token_ids) == one.text == f"{text}one"
    assert two.token_ids[: two.num_known] == one.token_ids[: one.num_known]
    assert [part.source for part in beginning if part.source] == (
        [ChunkPart("chunk"), kept, kept] if chunk_first else [kept, kept, ChunkPart("chunk")]
    )
    # A document at the very beginning is whole, so that its KV stands where it was computed.
    assert chunk_first or beginning[0].first_row == 0
