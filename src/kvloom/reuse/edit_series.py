"""Several edits of one text, one after the other, as one edit of its tokens.

Knows: that each edit names places in the text that those before it left.
Does not know: documents or KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import RequestError
from kvloom.kv.edit import Replace
from kvloom.reuse.retokenize import Retokenizer, TokenEdit
from kvloom.reuse.text_range import LineColumn, line_column_range
from kvloom.reuse.token_diff import hunks


@dataclass(frozen=True, slots=True)
class TextEdit:
    """A text that comes in the place of a range, or of the whole text where there is no range.

    Attributes:
        text: what comes in their place.
        start: first character replaced, or its (line, column) from zero, in UTF-16 units.
        end: character behind the last, likewise.
    """

    text: str
    start: int | LineColumn | None = None
    end: int | LineColumn | None = None


def edit_series(
    retokenizer: Retokenizer,
    tokens: Sequence[int],
    edits: Sequence[TextEdit],
    *,
    lossless_only: bool = False,
) -> TokenEdit:
    """Return what edits come to in tokens, each in the text that those before it left.

    Args:
        retokenizer: finds the tokens.
        tokens: the old ones.
        edits: at least one.
        lossless_only: refuse a text that the tokenizer cannot spell.

    Raises:
        RequestError: a text has no such range, or cannot be spelled and that matters: later edits
            would name other places than their maker sees.
    """
    if not edits:
        raise RequestError("There is no edit to make; give at least one.", param="edits")
    now: Sequence[int] = tokens
    for number, edit in enumerate(edits, 1):
        found = _edited(retokenizer, now, edit)
        if not found.lossless and (lossless_only or number < len(edits)):
            raise RequestError(
                "The tokenizer cannot spell the new text as it is, so places in it would shift; "
                "leave out control characters, or what the tokenizer normalises.",
                param="text",
            )
        if len(edits) == 1:
            return found
        now = found.applied(now)
    parts = tuple(
        Replace(hunk.old_start, hunk.old_stop, tuple(now[hunk.new_start : hunk.new_stop]))
        for hunk in hunks(tokens, now)
    )
    return TokenEdit(parts, found.canonical, found.lossless)


def _edited(retokenizer: Retokenizer, tokens: Sequence[int], edit: TextEdit) -> TokenEdit:
    start, end = edit.start, edit.end
    if start is None or end is None:
        if start is not None or end is not None:
            raise RequestError("The range has one end only; give both, or none.", param="range")
        return retokenizer.replace_text(tokens, edit.text)
    if isinstance(start, tuple) and isinstance(end, tuple):
        start, end = line_column_range(retokenizer.text(tokens), start, end)
    elif isinstance(start, tuple) or isinstance(end, tuple):
        raise RequestError(
            "One end of the range is a character and the other a line and column; give both in "
            "the same way.",
            param="range",
        )
    return retokenizer.edit_text(tokens, start, end, edit.text)
