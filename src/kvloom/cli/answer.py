"""Streams an answer to standard output, and says what it cost.

Knows: chunks, receipts, and the table that compares them.
Does not know: where questions come from.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, cast

from rich.table import Table
from rich.text import Text

from kvloom.cli.progress import prefill_progress
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from kvloom.engine.llm import LLM
    from kvloom.outputs import StreamChunk, Usage
    from kvloom.params import SamplingParams


class Answer:
    """An answer while it is streamed.

    Attributes:
        text: what has been written so far.
        usage: the receipt, once the answer is complete.
    """

    def __init__(self) -> None:
        self.text = ""
        self.usage: Usage | None = None

    def stream(
        self, llm: LLM, prompt: list[int], params: SamplingParams, terminal: Terminal
    ) -> None:
        """Write the answer to a prompt as it comes; leaving early cancels the request.

        Raises:
            RequestError: the prompt is too long.
        """
        self.follow(llm.stream(prompt, params), llm, len(prompt), terminal)

    def follow(
        self, stream: Iterator[StreamChunk], llm: LLM, num_tokens: int, terminal: Terminal
    ) -> None:
        """Write an answer to a prompt of so many tokens as it comes."""
        chunks = cast("Generator[StreamChunk, None, None]", stream)
        with closing(chunks):
            with prefill_progress(terminal.messages, llm.stats, num_tokens):
                first = next(chunks)
            self._take(first, terminal)
            for chunk in chunks:
                self._take(chunk, terminal)

    def _take(self, chunk: StreamChunk, terminal: Terminal) -> None:
        self.text += chunk.text
        terminal.write(chunk.text)
        self.usage = chunk.usage or self.usage


def tokens_per_second(usage: Usage) -> float | None:
    """Return the speed of an answer after its first token; None if there is no second one."""
    if usage.total_s is None or usage.time_to_first_token_s is None or usage.completion_tokens < 2:
        return None
    seconds = usage.total_s - usage.time_to_first_token_s
    return (usage.completion_tokens - 1) / seconds if seconds > 0 else None


def summary(usage: Usage) -> str:
    """Return what an answer cost, on one line."""
    parts = [f"computed {usage.computed_tokens:,} tokens", f"reused {usage.cached_tokens:,}"]
    if usage.time_to_first_token_s is not None:
        parts.append(f"first token after {as_seconds(usage.time_to_first_token_s)}")
    if (speed := tokens_per_second(usage)) is not None:
        parts.append(f"{speed:.1f} tokens/s")
    return " · ".join(parts)


def cost_table(questions: Sequence[str], usages: Sequence[Usage]) -> Table:
    """Return a table of what each answer cost."""
    table = Table("question", box=None, header_style="bold", pad_edge=False)
    for name in ("computed", "reused", "first token", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for question, usage in zip(questions, usages, strict=True):
        speed, first = tokens_per_second(usage), usage.time_to_first_token_s
        table.add_row(
            # The text, not the column, must not wrap: rich narrows only columns that may wrap.
            Text(" ".join(question.split()), no_wrap=True, overflow="ellipsis"),
            f"{usage.computed_tokens:,}",
            f"{usage.cached_tokens:,}",
            "–" if first is None else as_seconds(first),
            "–" if speed is None else f"{speed:.1f}",
        )
    return table


def as_seconds(seconds: float) -> str:
    """Return a time to three digits."""
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
