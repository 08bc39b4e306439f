"""All ways to carry out a case, one after the other, held against the exact one.

Knows: how two predictions differ, and that what is refused is an outcome with a reason.
Does not know: what the ways are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvloom import KvloomError, SamplingParams
from kvloom.bench.case_results import Outcome

if TYPE_CHECKING:
    from torch import Tensor

EXACT = "exact"
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class NamedKind(Protocol):
    """One way, with the name that it has in tables and files."""

    @property
    def name(self) -> str:
        """Which one it is."""
        ...


K = TypeVar("K", bound=NamedKind)


def in_all_ways(
    kinds: Sequence[K], carry_out: Callable[[K], tuple[Outcome, Tensor]]
) -> tuple[Outcome, ...]:
    """Carry out a case in all ways; what kvloom refuses is an outcome with the reason.

    Args:
        kinds: the exact one first.
        carry_out: returns an outcome without comparison, and the logits (s, v).

    Raises:
        KvloomError: the exact way fails.
    """
    assert kinds[0].name == EXACT, "nothing to hold the other kinds against"
    outcomes: list[Outcome] = []
    full: Tensor | None = None
    for kind in kinds:
        try:
            outcome, logits = carry_out(kind)
        except KvloomError as error:
            if full is None:
                raise
            outcomes.append(Outcome(kind=kind.name, failure=str(error)))
            continue
        full = logits if full is None else full
        divergence, agreement = compare(full, logits)
        outcomes.append(replace(outcome, divergence=divergence, agreement=agreement))
    return tuple(outcomes)


def compare(full: Tensor, logits: Tensor) -> tuple[float, float]:
    """Return mean KL(full || other) in nats and the share of equal likeliest tokens.

    Args:
        full: fp32 logits (s, v).
        logits: likewise.
    """
    reference, other = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (reference.exp() * (reference - other)).sum(-1).clamp_min(0).mean()
    agreement = (full.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(divergence), float(agreement)
