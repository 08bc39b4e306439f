"""Where documents and chunks stand in the text that a chat template writes.

Knows: that a template is a program, which may move, drop, repeat or change what it is given.
Does not know: templates, tokens, or what a part says.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Marked:
    """A text in which parts stand.

    Attributes:
        pieces: texts, and numbers of parts where these stand; in order.
        faithful: the pieces with the parts' texts are the text that is written without marks, but
            for white space; elsewhere the template does more with a part than to show it.
    """

    pieces: tuple[str | int, ...]
    faithful: bool


def cut_at_parts(render: Callable[[Sequence[str]], str], texts: Sequence[str]) -> Marked:
    """Return what a template writes, cut where parts stand.

    White space may differ, because many templates strip the ends of a message: they then strip
    what stands beside a part, and not the part.

    Args:
        render: writes the text, with these spellings in the places of the parts.
        texts: what the parts say.

    Raises:
        RequestError: the template does not take the messages.
    """
    # Random for each request, so that no text can hold one; letters and digits only, so that
    # templates that strip or escape leave them alone.
    nonce = secrets.token_hex(16)
    marks = {f"part{nonce}n{number}e": number for number in range(len(texts))}
    found = re.split(f"({'|'.join(marks)})", render(list(marks))) if marks else [render([])]
    pieces = tuple(marks.get(piece, piece) for piece in found if piece)
    spelled = "".join(texts[piece] if isinstance(piece, int) else piece for piece in pieces)
    return Marked(pieces, _squeezed(spelled) == _squeezed(render(texts)))


def _squeezed(text: str) -> str:
    return "".join(text.split())
