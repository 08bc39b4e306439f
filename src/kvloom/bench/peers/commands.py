"""Runs another program to its end and passes on what it says.

Knows: processes and their lines.
Does not know: what the programs are for.
"""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kvloom import KvloomError

_REMEMBERED_LINES = 20
_SHOWN_CHARACTERS = 600
# What a library says about itself is no reason for a failure.
_UNIMPORTANT = ("WARNING", "[notice]", "note:", "hint:")
_OURS = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


class CommandError(KvloomError):
    """A program failed, or could not be started."""


def run_command(
    command: Sequence[str],
    tell: Callable[[str], None],
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a program, passing on every line; it ends with this process.

    Raises:
        CommandError: it failed; the message holds its last lines.
    """
    last: deque[str] = deque(maxlen=_REMEMBERED_LINES)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**_outer_variables(), **(variables or {})},
        )
    except OSError as error:
        raise CommandError(f"{command[0]} cannot be started: {error}.") from error
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.strip():
                    last.append(text)
                    tell(text)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise CommandError(f"{_reason(last)} (status {process.returncode})")


def _outer_variables() -> dict[str, str]:
    """Return the environment variables without those that lead into this Python's packages."""
    return {name: value for name, value in os.environ.items() if name not in _OURS}


def _reason(lines: Sequence[str]) -> str:
    """Return the lines that say what went wrong, or the last one."""
    telling = [line for line in lines if not line.startswith(_UNIMPORTANT)]
    errors = [line for line in telling if "error" in line.lower()]
    shown = " / ".join(errors[-3:] or telling[-1:]) or "it wrote nothing"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"
