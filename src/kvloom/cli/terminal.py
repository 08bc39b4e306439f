"""Where a command writes: answers to standard output, everything else to standard error.

Knows: the two streams, and what must not reach a terminal.
Does not know: what is written.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

# A model's text may hold escape sequences; on a terminal these would be carried out.
_HARMLESS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\ufffd")
_HARMLESS |= {ord("\n"): "\n", ord("\t"): "\t"}
PIPE_COLUMNS = 1000


class Terminal:
    """The streams of a command.

    Attributes:
        messages: standard error: progress, notes, tables about the work itself, errors.
        results: standard output, for tables and JSON that were asked for.
    """

    def __init__(self) -> None:
        self.messages = Console(stderr=True, highlight=False, markup=False, emoji=False)
        # Whoever reads a pipe wants lines whole.
        width = None if sys.stdout.isatty() else PIPE_COLUMNS
        self.results = Console(highlight=False, markup=False, emoji=False, width=width)

    def write(self, text: str) -> None:
        """Write a piece of an answer at once; a terminal gets no control characters."""
        stream = sys.stdout
        text = text.translate(_HARMLESS) if stream.isatty() else text
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()

    def note(self, text: str) -> None:
        """Write a dim line to standard error."""
        self.messages.print(Text(text, style="dim"), soft_wrap=True)

    def say(self, text: str) -> None:
        """Write a line to standard error."""
        self.messages.print(Text(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """Write one red line to standard error."""
        self.messages.print(Text(f"Error: {' '.join(text.split())}", style="red"), soft_wrap=True)


def set_up_logging(level: str) -> None:
    """Send log records to standard error: kvloom's from this level on, others' warnings."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for earlier in [h for h in root.handlers if isinstance(h, _CurrentStderr)]:
        root.removeHandler(earlier)  # the program may be run twice in one process
    root.addHandler(handler)
    chosen = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(chosen, logging.WARNING))
    logging.getLogger("kvloom").setLevel(chosen)


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to whatever is standard error now: a live bar replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)
