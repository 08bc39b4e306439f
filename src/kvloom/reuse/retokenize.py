"""From edits of a text to edits of its tokens.

Knows: that tokens spell bytes, and that a change of text moves token borders near it.
Does not know: models, or how any tokenizer works; what its tokens become is found by asking it.

Only a margin around a change is tokenised again, and widened until the tokens at both its ends are
those that stood there. Whether the result is what the tokenizer makes of the whole text can be
proved by tokenising all of it, which costs far more (ADR 0014).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from kvloom.errors import RequestError
from kvloom.kv.edit import Replace, Several
from kvloom.reuse.prefix import common_prefix
from kvloom.reuse.token_diff import hunks

MARGIN_TOKENS = 16
"""Tokens on each side of a change that are tokenised again at first."""
AGREEING_TOKENS = 4
"""So many equal tokens at an end of the margin say that it is wide enough."""


class EditTokenizer(Protocol):
    """What this room asks of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens, which no text may become."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; nothing for special and unknown tokens."""
        ...


@dataclass(frozen=True, slots=True)
class TokenEdit:
    """What an edit of a text comes to in tokens.

    Attributes:
        replaced: ranges of old tokens with what comes in their place, ascending.
        canonical: the tokens are proved to be those of the whole new text; False if they are not
            or nobody asked.
        lossless: the tokens spell the new text; False where the tokenizer changes it or lacks
            characters.
    """

    replaced: tuple[Replace, ...]
    canonical: bool
    lossless: bool

    @property
    def edit(self) -> Several:
        """The edit of a document of the old tokens."""
        return Several(self.replaced)

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(len(part.tokens) for part in self.replaced)

    def applied(self, tokens: Sequence[int]) -> list[int]:
        """Return the new tokens."""
        new, edge = list[int](), 0
        for part in self.replaced:
            new += [*tokens[edge : part.start], *part.tokens]
            edge = part.stop
        return [*new, *tokens[edge:]]


@dataclass(frozen=True, slots=True)
class _Spelled:
    """Tokens with the bytes they spell.

    Attributes:
        tokens: what is spelled.
        data: all bytes.
        edges: where each token starts in them, and the end.
        lead: bytes at the start that the tokenizer leaves out of the text.
    """

    tokens: Sequence[int]
    data: bytes
    edges: list[int]
    lead: int

    def byte_of(self, character: int) -> int:
        """Return where a character starts; bytes that are no character count as U+FFFD does."""
        place = self.lead
        while True:
            try:
                good, broken_stop = self.data[place:].decode(), None
            except UnicodeDecodeError as error:
                good = self.data[place : place + error.start].decode()
                broken_stop = place + error.end
            if broken_stop is None or character <= len(good):
                return place + len(good[:character].encode())
            character -= len(good) + 1
            place = broken_stop

    def starts_character(self, token: int) -> bool:
        """Whether a token does not start inside a character."""
        edge = self.edges[token]
        return edge == len(self.data) or self.data[edge] & 0xC0 != 0x80


@dataclass(frozen=True, slots=True)
class _Margin:
    """Old tokens around a change.

    Attributes:
        low: first token.
        high: token behind the last.
        low_is_border: nothing before it can matter.
        high_is_border: nothing behind it can matter.
    """

    low: int
    high: int
    low_is_border: bool
    high_is_border: bool


class Retokenizer:
    """Turns edits of text into edits of tokens; one per tokenizer."""

    def __init__(self, tokenizer: EditTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._bytes: dict[int, bytes] = {i: self.text([i]).encode() for i in self._special}
        spellings = sorted((x.decode() for x in self._bytes.values() if x), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens spelled out."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def edit_text(
        self, tokens: Sequence[int], start: int, end: int, text: str, *, prove: bool = False
    ) -> TokenEdit:
        """Return what replacing characters start to end - 1 of the tokens' text comes to.

        Control tokens outside the range stay, and the spelling of one becomes none.

        Args:
            tokens: the old tokens, however they came about.
            start: first character replaced.
            end: character behind the last.
            text: what comes in their place.
            prove: tokenise the whole new text to find out whether the result is canonical.

        Raises:
            RequestError: the text has no such range, or the new text is no Unicode text.
        """
        whole = self.text(tokens)
        if not 0 <= start <= end <= len(whole):
            raise RequestError(
                f"The text has {len(whole)} characters and no range {start} to {end}; give numbers "
                f"from 0 to {len(whole)}, the lower one first.",
                param="range",
            )
        new_text = whole[:start] + text + whole[end:]
        old = self._spelled(tokens, whole)
        if old is None:
            return self.replace_text(tokens, new_text)
        part = self._edit_margin(old, old.byte_of(start), old.byte_of(end), text)
        found = TokenEdit((part,) if part.tokens or part.start < part.stop else (), False, True)
        if not self._spells(old, part, new_text):
            everything = self.replace_text(tokens, new_text)
            if everything.lossless:
                return everything
            found = TokenEdit(found.replaced, False, False)
        if prove and self._encode(new_text) == found.applied(tokens):
            found = TokenEdit(found.replaced, True, found.lossless)
        return found

    def replace_text(self, tokens: Sequence[int], new_text: str) -> TokenEdit:
        """Return what it comes to when the tokens' text becomes another.

        Control tokens may stay where the new text spells them, and none is added.

        Raises:
            RequestError: the new text is no Unicode text.
        """
        new = self._encode(new_text)
        replaced, canonical = [], True
        for hunk in hunks(tokens, new):
            part = new[hunk.new_start : hunk.new_stop]
            if not self._special.isdisjoint(part):
                part, canonical = self._without_specials(part), False
            replaced.append(Replace(hunk.old_start, hunk.old_stop, tuple(part)))
        found = TokenEdit(tuple(replaced), canonical, True)
        if self.text(found.applied(tokens)) == new_text:
            return found
        return TokenEdit(found.replaced, canonical, False)

    def _edit_margin(self, old: _Spelled, first: int, last: int, text: str) -> Replace:
        """Tokenise around a change of bytes, in a margin that is widened as long as it needs."""
        left = bisect_left(old.edges, first)
        left -= old.edges[left] > first
        right = max(bisect_left(old.edges, last), left)
        if first == last and not text:
            return Replace(left, left, ())
        width = MARGIN_TOKENS
        while True:
            margin = self._margin(old, left, right, width)
            begin = max(old.edges[margin.low], old.lead)
            before = old.data[begin:first].decode("utf-8", "replace")
            behind = old.data[last : old.edges[margin.high]].decode("utf-8", "replace")
            new = self._encode_plainly(before + text + behind)
            growth = len(text.encode()) - (last - first)
            found = self._agreement(old, margin, (left, right), new, growth)
            if found is not None:
                return found
            if margin.low_is_border and margin.high_is_border:
                return Replace(margin.low, margin.high, tuple(new))
            width *= 2

    def _margin(self, old: _Spelled, left: int, right: int, width: int) -> _Margin:
        """Return tokens around a range, from the start of a character to the end of one.

        No margin holds a control token outside the range: no token reaches across it.
        """
        low, high, end = left, right, len(old.tokens)
        while low > 0 and old.tokens[low - 1] not in self._special:
            if left - low >= width and old.starts_character(low):
                break
            low -= 1
        while high < end and old.tokens[high] not in self._special:
            if high - right >= width and old.starts_character(high):
                break
            high += 1
        return _Margin(
            low,
            high,
            low == 0 or old.tokens[low - 1] in self._special,
            high == end or old.tokens[high] in self._special,
        )

    def _agreement(
        self, old: _Spelled, margin: _Margin, cut: tuple[int, int], new: list[int], growth: int
    ) -> Replace | None:
        """Return the tokens that change, if on both sides of them the old ones come out again."""
        # Counted from the end, where no tokenizer adds anything.
        sizes = [len(self._bytes_of(token)) for token in new]
        start = old.edges[margin.high] + growth - sum(sizes)
        place_of = {edge: place for place, edge in enumerate(accumulate(sizes, initial=start))}
        before = self._agreeing_before(old, margin, cut[0], new, place_of)
        behind = self._agreeing_behind(old, margin, cut[1], new, place_of, growth)
        if before is None or behind is None:
            return None
        (kept, first), (rest, last) = before, behind
        # What is put in may begin or end as what is taken out does.
        last = max(first, last)
        same = common_prefix(old.tokens[kept:rest], new[first:last])
        kept, first = kept + same, first + same
        while rest > kept and last > first and old.tokens[rest - 1] == new[last - 1]:
            rest, last = rest - 1, last - 1
        return Replace(kept, rest, tuple(new[first:last]))

    def _agreeing_before(
        self, old: _Spelled, margin: _Margin, left: int, new: list[int], place_of: dict[int, int]
    ) -> tuple[int, int] | None:
        """Return the last old and new token before a change up to which both are the same."""
        for token in range(left, margin.low - 1, -1):
            place = place_of.get(old.edges[token])
            if place is None:
                continue
            count = min(AGREEING_TOKENS, token - margin.low)
            enough = count == AGREEING_TOKENS or (margin.low_is_border and count == place)
            if enough and list(old.tokens[token - count : token]) == new[place - count : place]:
                return token, place
        return None

    def _agreeing_behind(
        self,
        old: _Spelled,
        margin: _Margin,
        right: int,
        new: list[int],
        place_of: dict[int, int],
        growth: int,
    ) -> tuple[int, int] | None:
        """Return the first old and new token behind a change from which on both are the same."""
        for token in range(right, margin.high + 1):
            place = place_of.get(old.edges[token] + growth)
            if place is None:
                continue
            count = min(AGREEING_TOKENS, margin.high - token)
            enough = count == AGREEING_TOKENS or (
                margin.high_is_border and count == len(new) - place
            )
            if enough and list(old.tokens[token : token + count]) == new[place : place + count]:
                return token, place
        return None

    def _spelled(self, tokens: Sequence[int], text: str) -> _Spelled | None:
        """Return the bytes of tokens; None if the tokenizer's text is not made of them."""
        pieces = [self._bytes_of(token) for token in tokens]
        data = b"".join(pieces)
        edges = list(accumulate(map(len, pieces), initial=0))
        for lead in (0, 1):
            if data[lead:].decode("utf-8", "replace") == text:
                return _Spelled(tokens, data, edges, lead)
        return None

    def _spells(self, old: _Spelled, part: Replace, new_text: str) -> bool:
        """Whether tokens spell a text once a part of them is replaced."""
        middle = b"".join(map(self._bytes_of, part.tokens))
        data = old.data[: old.edges[part.start]] + middle + old.data[old.edges[part.stop] :]
        text = data[old.lead :].decode("utf-8", "replace")
        # Tokenizers differ in what they do to the start, and to bytes that are no character.
        if part.start == 0 or "\ufffd" in text:
            text = self.text(TokenEdit((part,), False, True).applied(old.tokens))
        return text == new_text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_plainly(self, text: str) -> list[int]:
        """Return the tokens of a text; the spelling of a control token is cut, so that none is."""
        tokens, begin = list[int](), 0
        while self._spelling is not None and (found := self._spelling.search(text, begin)):
            tokens += self._encode(text[begin : found.start() + 1])
            begin = found.start() + 1
        return tokens + self._encode(text[begin:])

    def _without_specials(self, tokens: Iterable[int]) -> list[int]:
        """Return tokens with every control token spelled by others."""
        plain: list[int] = []
        for token in tokens:
            spelled = token in self._special
            plain += self._encode_plainly(self._bytes[token].decode()) if spelled else [token]
        return plain

    def _bytes_of(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._tokenizer.token_bytes(token)
        return known
