"""How near to a fresh prefill an edited document is to be: what a user may ask for.

Knows: the names, their settings and their limits.
Does not know: how anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from kvloom.errors import RequestError
from kvloom.kv.baseline import Baseline, baseline
from kvloom.outputs import Fidelity
from kvloom.reuse.select import Selector, selector

REPAIRED_SHARE = 0.15
"""Source: CacheBlend (Yao et al. 2025), figure 16: the least share without a loss of quality."""
SINK_TOKENS = 4
"""An edit within so many first tokens changes what all others attend to most.

Source: StreamingLLM (Xiao et al. 2024), section 3.1: four attention sinks.
"""


@dataclass(frozen=True, slots=True)
class Approximation:
    """How an edit is to be carried out.

    Attributes:
        fidelity: what it is called.
        share: of the stale rows that are computed again, if it is `repaired`.
        rule: chooses them.
        baseline: how moved KV is shown instead, for comparisons.
    """

    fidelity: Fidelity
    share: float
    rule: Selector
    baseline: Baseline | None


def check_edit(
    fidelity: Fidelity, share: float, selector_name: str, baseline_name: str | None = None
) -> Approximation:
    """Return what an edit asks for.

    Raises:
        RequestError: a name is unknown, the share is none, or a baseline is to be made better.
    """
    if fidelity not in get_args(Fidelity):
        raise RequestError(
            f"fidelity is {fidelity!r}; it must be one of {', '.join(get_args(Fidelity))}.",
            param="fidelity",
        )
    valid = isinstance(share, int | float) and not isinstance(share, bool)
    if not valid or not 0 <= share <= 1:
        raise RequestError(f"share is {share!r}; give a number from 0 to 1.", param="share")
    shown = None if baseline_name is None else baseline(baseline_name)
    if shown is not None and fidelity != "shifted":
        raise RequestError(
            f"A baseline shows moved KV and nothing else, and fidelity is {fidelity!r}; "
            "ask for `shifted`.",
            param="baseline",
        )
    return Approximation(fidelity, share, selector(selector_name), shown)
