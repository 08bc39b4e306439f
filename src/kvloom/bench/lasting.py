"""Approximations that last: what a bench asks of a model before it compares any.

Knows: which settings of a model would answer with exact KV, or make it of approximate one.
Does not know: what is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom import RequestError

if TYPE_CHECKING:
    from kvloom import LLM


def require_lasting(llm: LLM, noun: str) -> None:
    """Make sure that what is approximate stays so while a bench of `noun` looks at it.

    Raises:
        RequestError: exact KV would answer for approximate one, or be made of it meanwhile.
    """
    if llm.config.enable_prefix_caching or llm.config.repair_when_idle:
        raise RequestError(
            f"the bench of {noun} needs a model without prefix caching and without idle "
            "repairs; set enable_prefix_caching and repair_when_idle to False."
        )
