"""Receipts in words and tables."""

from __future__ import annotations

import io

from rich.console import Console

from kvloom.cli.answer import cost_table, summary, tokens_per_second
from kvloom.outputs import Usage


def usage(first: float | None = 0.5, total: float | None = 2.5, generated: int = 21) -> Usage:
    return Usage(
        prompt_tokens=3456,
        completion_tokens=generated,
        cached_tokens=3400,
        computed_tokens=56,
        time_to_first_token_s=first,
        total_s=total,
    )


def test_speed_counts_the_tokens_after_the_first() -> None:
    assert tokens_per_second(usage()) == 10.0


def test_speed_of_one_token_is_unknown() -> None:
    assert tokens_per_second(usage(generated=1)) is None
    assert tokens_per_second(usage(total=None)) is None
    assert tokens_per_second(usage(first=None)) is None
    assert tokens_per_second(usage(first=2.5)) is None


def test_summary_names_computed_reused_first_token_and_speed() -> None:
    line = "computed 56 tokens · reused 3,400 · first token after 0.50 s · 10.0 tokens/s"
    assert summary(usage()) == line
    assert summary(usage(None, None)) == "computed 56 tokens · reused 3,400"


def test_table_has_a_row_per_question() -> None:
    shown = Console(file=io.StringIO(), width=100)
    shown.print(cost_table(["Why?\nHow [b]?", "x" * 80], [usage(12.34), usage(None, None)]))
    assert isinstance(shown.file, io.StringIO)
    lines = shown.file.getvalue().splitlines()
    assert lines[0].split() == ["question", "computed", "reused", "first", "token", "tokens/s"]
    assert "3,400" in lines[1]
    assert "12.3 s" in lines[1]
    assert lines[2].split()[-2:] == ["–", "–"]
    assert len(lines) == 3


def test_table_cuts_questions_and_never_numbers() -> None:
    shown = Console(file=io.StringIO(), width=60)
    shown.print(cost_table(["word " * 40], [usage(12.34, 16.34)]))
    assert isinstance(shown.file, io.StringIO)
    _, row = shown.file.getvalue().splitlines()
    assert "…" in row
    assert row.split()[-5:] == ["56", "3,400", "12.3", "s", "5.0"]
