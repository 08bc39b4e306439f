"""A report of joined chunks for people and for programs: what only chunks have to say.

Knows: the columns, the wording and the warnings of joined chunks.
Does not know: how tables are drawn, or how anything was measured.
"""

from __future__ import annotations

from kvloom.bench.case_picture import Wording
from kvloom.bench.case_show import ERRORS, ROWS, Column, Presentation, share
from kvloom.bench.reuse_results import ReuseReport

_COLUMNS: tuple[Column, ...] = (
    ROWS,
    ("repaired", lambda row: share(row.repaired)),
    ("loaded MiB", lambda row: f"{row.loaded_bytes.median / 2**20:,.1f}"),
    *ERRORS,
)
_LEGEND = (
    "KL and top-1: next tokens against exact, a full prefill · NLL: of the real answer per token, "
    "or of all scored ones · ± standard error of the mean · rows and times: median (quartiles) · "
    "prefix: what two orders begin with alike is reused · blend, craft, first, random: planners, "
    "which choose the rows that are computed again · none: chunks as they were computed alone"
)


def reuse_warnings(report: ReuseReport) -> list[str]:
    """Return what a reader of the figures of joined chunks must know."""
    unanswered = sum(result.answered == 0 for result in report.results)
    if not unanswered:
        return []
    return [
        f"{unanswered} prompts have no real answer: what exact says is scored, which favours it."
    ]


def _measured(report: ReuseReport) -> str:
    options = report.options
    size = f"about {options.chunk_tokens:,} tokens" if options.chunk_tokens else "any length"
    kept = "from disk after a restart" if options.from_disk else "from memory"
    return (
        f"{options.chunks} chunks of {size} {kept} in another order (seed {options.seed}) · "
        f"{options.scored} tokens scored: the answer, then what exact says behind it"
    )


JOINS = Presentation(
    kind=ReuseReport,
    wording=Wording("prompt", "the answer and what exact says behind it", ("blend", "none")),
    columns=lambda _: _COLUMNS,
    legend=_LEGEND,
    measured=_measured,
    warnings=reuse_warnings,
)
