"""When a generation ends, by token or by text, and which text may be shown before that is known.

Knows: stop strings across token boundaries, end tokens, length.
Does not know: tokenizers, sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvloom.outputs import FinishReason
from kvloom.params import SamplingParams


class Finish(NamedTuple):
    """Why a generation ended.

    Attributes:
        reason: `stop`, `length` or `abort`.
        stop_reason: the stop string or token id; None for the end-of-text token.
    """

    reason: FinishReason
    stop_reason: str | int | None = None


def finish_by_token(
    params: SamplingParams, token_id: int, num_generated: int, eos_token_ids: frozenset[int]
) -> Finish | None:
    """Return why this token ends the text, if it does.

    Args:
        params: what the caller asked for.
        token_id: the token just generated.
        num_generated: tokens generated, this one included.
        eos_token_ids: the model's end-of-text tokens.
    """
    if num_generated < params.min_tokens:
        return None
    if token_id in eos_token_ids and not params.ignore_eos:
        return Finish("stop")
    if token_id in params.stop_token_ids:
        return Finish("stop", token_id)
    return None


class _Match(NamedTuple):
    end: int
    start: int
    stop: str


class StopText:
    """Searches growing text for stop strings and holds back what may become one.

    The match that is complete first wins, and of two complete at once the longer, so that the
    result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        """Begin a text.

        Args:
            stops: strings that end the text.
            include_stop: leave the stop string at the end of the text.
        """
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take text and return what may be shown, and the stop string that ended it if one did.

        Args:
            text: text that can no longer change.
            may_stop: False treats stop strings that are complete now as text.
        """
        if not self._stops:
            return text, None
        held, self._held = self._held + text, ""
        shown = ""
        while match := self._first_match(held):
            if may_stop:
                return shown + held[: match.end if self._include_stop else match.start], match.stop
            shown, held = shown + held[: match.end], held[match.end :]
        boundary = len(held) - self._open_length(held)
        self._held = held[boundary:]
        return shown + held[:boundary], None

    def finds(self, text: str) -> bool:
        """Whether a stop string would be complete after this text."""
        return bool(text) and self._first_match(self._held + text) is not None

    def flush(self) -> str:
        """Return the text held back; no stop string can be completed any more."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> _Match | None:
        matches = (
            _Match(start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        )
        return min(matches, default=None)

    def _open_length(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
