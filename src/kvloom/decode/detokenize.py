"""Text from tokens as they come, never half a character.

Knows: that a tokenizer's text grows at its end, except for an unfinished UTF-8 character and, with
byte-fallback tokenizers, for a run of byte tokens.
Does not know: which tokenizer it is; what joins is found out by experiment.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"
# Tokens of context that keep a decoder from treating new tokens as the start of a text.
CONTEXT_TOKENS = 8


class TokenText(Protocol):
    """What this room asks of a tokenizer.

    `decode` must not clean up spaces, because that changes text behind its end.
    """

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out when it skips special tokens."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of the tokens."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; nothing for special and unknown tokens."""
        ...

    @property
    def joins_bytes(self) -> bool:
        """Whether a text is its tokens' bytes one behind the other, wherever they stand."""
        ...


@dataclass(frozen=True, slots=True)
class TextDecoder:
    """A tokenizer with what must be known of it to decode piece by piece; one per tokenizer.

    Attributes:
        tokenizer: decodes whole sequences.
        fallback_ids: tokens of single bytes that a byte-fallback decoder joins: a run of them is
            valid or replaced as a whole, so none of it is sure before the run has ended.
    """

    tokenizer: TokenText
    fallback_ids: frozenset[int]

    @classmethod
    def probe(cls, tokenizer: TokenText) -> TextDecoder:
        """Find out by experiment how the tokenizer joins bytes; may read the whole vocabulary."""
        return cls(tokenizer, _fallback_ids(tokenizer))


def _fallback_ids(tokenizer: TokenText) -> frozenset[int]:
    single: dict[int, bytes] = {}
    lead = follow = None
    for token_id in range(tokenizer.vocab_size):
        if len(token_bytes := tokenizer.token_bytes(token_id)) != 1:
            continue
        single[token_id] = token_bytes
        if lead is None and b"\xc2" <= token_bytes <= b"\xdf":
            lead = token_id
        if follow is None and b"\x80" <= token_bytes <= b"\xbf":
            follow = token_id
        if lead is not None and follow is not None and not _joins(tokenizer, [lead, follow], lead):
            return frozenset()
    if lead is None or follow is None:
        return frozenset()
    # Bytes of ASCII may have a token of their own besides the one that joins.
    return frozenset(
        token_id
        for token_id, token_bytes in single.items()
        if token_bytes >= b"\x80" or _joins(tokenizer, [token_id], lead)
    )


def _joins(tokenizer: TokenText, valid: list[int], broken: int) -> bool:
    """Whether a byte that cannot be decoded takes valid bytes before it along."""
    text = tokenizer.decode([*valid, broken])
    return text == REPLACEMENT * (len(valid) + 1)


class Detokenizer:
    """Turns one sequence's tokens into pieces of text.

    The pieces joined, with that of `flush`, equal the tokenizer's text of all tokens; after a
    context they equal what the tokens add to the context's text.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        *,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        """Begin a text.

        Args:
            decoder: the tokenizer, probed.
            skip_special_tokens: leave special tokens out.
            context: tokens before the first; their text is not repeated.
        """
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run_open = False
        self._window = self._context_window(context)
        for token_id in self._window:
            self._follow_bytes(token_id)
        self._text = self._decode(self._window)
        self._sent = self._settled_length()

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that can no longer change."""
        if self._is_skipped(token_id):
            return ""
        self._window.append(token_id)
        if piece := self._plain_piece(token_id):
            self._text += piece
            return self._send(len(self._text))
        if token_id in self._decoder.fallback_ids:
            self._run_open = True
            return ""
        text = self._decode(self._window)
        if (self._run_open or text == self._text) and not self._decode([token_id, token_id]):
            # Unknown to the tokenizer: no text, no end of a run, and no use as context.
            self._window.pop()
            return ""
        self._run_open = False
        self._follow_bytes(token_id)
        self._text = text
        return self._send(self._settled_length())

    def _plain_piece(self, token_id: int) -> str:
        """Return what a token adds where that is sure without decoding; else nothing."""
        tokenizer = self._decoder.tokenizer
        if not tokenizer.joins_bytes or self._utf8.getstate()[0]:
            return ""
        token_bytes = tokenizer.token_bytes(token_id)
        return token_bytes.decode() if token_bytes.isascii() else ""

    def preview(self) -> str:
        """Return the text behind the last piece as it would be if no token followed.

        Unfinished characters are left out, so that the text may be searched for stop strings.
        """
        if not self._run_open:
            return ""
        text = self._decode(self._window)[self._sent :]
        return "" if REPLACEMENT in text else text

    def flush(self) -> str:
        """Return what was held back; unfinished characters come as replacement characters."""
        self._text = self._decode(self._window)
        self._run_open = False
        return self._send(len(self._text))

    def _send(self, settled: int) -> str:
        piece = self._text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if len(self._window) > 2 * CONTEXT_TOKENS:
            self._shorten_window()
        return piece

    def _shorten_window(self) -> None:
        unsent = len(self._text) - self._sent
        self._window = self._window[-CONTEXT_TOKENS:]
        self._text = self._decode(self._window)
        self._sent = len(self._text) - unsent

    def _settled_length(self) -> int:
        unfinished = bool(self._utf8.getstate()[0]) and self._text.endswith(REPLACEMENT)
        return len(self._text) - unfinished

    def _follow_bytes(self, token_id: int) -> None:
        self._utf8.decode(self._decoder.tokenizer.token_bytes(token_id))

    def _context_window(self, context: Sequence[int]) -> list[int]:
        window: list[int] = []
        for token_id in reversed(context):
            if len(window) == CONTEXT_TOKENS:
                break
            # A run of byte tokens in front would join the first bytes generated.
            joins = not window and token_id in self._decoder.fallback_ids
            if not joins and not self._is_skipped(token_id):
                window.append(token_id)
        return window[::-1]

    def _is_skipped(self, token_id: int) -> bool:
        return self._skip and token_id in self._decoder.tokenizer.special_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.tokenizer.decode(token_ids, skip_special_tokens=self._skip)
