"""Log-probabilities as the OpenAI API words them.

Knows: both shapes: parallel lists for completions, one object per token for chats.
Does not know: how probabilities come about.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from kvloom.outputs import Logprob, TokenLogprobs
from kvloom.serve.backend import Tokenizer

# JSON has no minus infinity; a token of probability 0 gets this, as users of vLLM know it.
IMPOSSIBLE = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    num_alternatives: int,
) -> list[dict[str, Any]]:
    """Return the `content` list of a chat choice's log-probabilities."""
    content = []
    for token_id, entries in zip(token_ids, logprobs, strict=True):
        ranked = sorted(entries, key=lambda key: entries[key].rank)[:num_alternatives]
        fields = _chat_fields(tokenizer, token_id, entries[token_id])
        alternatives = [_chat_fields(tokenizer, key, entries[key]) for key in ranked]
        content.append(fields | {"top_logprobs": alternatives})
    return content


def _chat_fields(tokenizer: Tokenizer, token_id: int, entry: Logprob) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": token_label(tokenizer, token_id),
        "logprob": finite(entry.logprob),
        "bytes": list(raw) if raw else None,
    }


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text, or its bytes written out where they are no whole characters."""
    raw = tokenizer.token_bytes(token_id)
    if not raw:
        return tokenizer.decode([token_id], skip_special_tokens=False)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """Return a log-probability as JSON can carry it."""
    return max(logprob, IMPOSSIBLE)


class CompletionLogprobs:
    """Builds the parallel lists of one completion choice, chunk by chunk."""

    def __init__(self, tokenizer: Tokenizer, num_alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._num_alternatives = num_alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def fields(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """Return the lists for the tokens that come next in the text.

        Args:
            token_ids: the tokens.
            logprobs: per token; None for a prompt's first token, which nothing predicts.
        """
        labels, values, offsets = [], [], []
        alternatives: list[dict[str, float] | None] = []
        for token_id, entries in zip(token_ids, logprobs, strict=True):
            labels.append(token_label(self._tokenizer, token_id))
            values.append(None if entries is None else finite(entries[token_id].logprob))
            alternatives.append(None if entries is None else self._alternatives(entries))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "tokens": labels,
            "token_logprobs": values,
            "top_logprobs": alternatives if self._num_alternatives else None,
            "text_offset": offsets,
        }

    def _alternatives(self, entries: TokenLogprobs) -> dict[str, float]:
        best: dict[str, float] = {}
        for token_id in sorted(entries, key=lambda key: entries[key].rank):
            # Two tokens may have one text; the likelier one stands for it.
            best.setdefault(
                token_label(self._tokenizer, token_id), finite(entries[token_id].logprob)
            )
        return best
