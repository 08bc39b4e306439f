"""Checks of documents that tests have in common.

Knows: what a document of the fake model must answer, and when nothing is held.
Does not know: how a document came to be what it is.
"""

from __future__ import annotations

from typing import Any

from kvloom import LLM, Document
from tests.engine.worlds import BOOKS, TOKENIZER, expected_completion, greedy
from tests.fake_model import Oracle

STORY = TOKENIZER.decode(BOOKS[0])


def used(llm: LLM) -> int:
    """Bytes in use, prefixes not counted."""

    def count(engine: Any) -> int:
        engine.release_abandoned()
        if engine.memory.tree is not None:
            engine.memory.tree.clear()
        engine.memory.check()
        return int(engine.pool.used_bytes)

    return llm.loop.call(count).result(10)


def check(llm: LLM, doc: Document, tokens: list[int]) -> None:
    """Check a document's tokens, and that its KV is that of its tokens."""
    assert doc.tokens == tokens
    assert doc.text == TOKENIZER.decode(tokens, skip_special_tokens=False)
    answer = doc.generate("ab", greedy(4))
    prompt = [*tokens, 1, 2]
    expected = expected_completion(Oracle(), prompt, greedy(4), 0, 4000)
    assert list(answer.outputs[0].token_ids) == expected[0]
    assert list(answer.prompt_token_ids) == prompt
    assert sum(doc.provenance.tokens.values()) == len(tokens)
    assert set(doc.provenance.tokens) <= {"exact", "forgotten"}
