"""Kinds are held against the exact one by plain softmaxes; what is refused is a reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom import RequestError
from kvloom.bench.case_kinds import compare, in_all_ways
from kvloom.bench.case_results import Outcome
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]


@dataclass(frozen=True)
class Kind:
    name: str
    logits: Tensor | None


def carry_out(kind: Kind) -> tuple[Outcome, Tensor]:
    if kind.logits is None:
        raise RequestError(f"{kind.name} cannot be")
    return Outcome(kind=kind.name, rows=7), kind.logits


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 6), scale=st.floats(0.1, 20))
def test_divergence_and_agreement_are_those_of_torch(seed: int, rows: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    full, other = (scale * torch.randn(2, rows, 11, generator=random)).unbind()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=full.double()),
        torch.distributions.Categorical(logits=other.double()),
    ).mean()
    divergence, agreement = compare(full, other)
    assert divergence == pytest.approx(float(expected), rel=NEAR["probabilities"])
    best = zip(full.numpy(), other.numpy(), strict=True)
    assert agreement == np.mean([np.argmax(a) == np.argmax(b) for a, b in best])
    assert compare(full, full) == (0.0, 1.0)
    assert compare(full, full + 3)[0] == pytest.approx(0, abs=NEAR["probabilities"])


def test_all_kinds_are_held_against_the_first() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    kinds = [Kind("exact", logits), Kind("same", logits + 1), Kind("other", logits.flip(0))]
    exact, same, other = in_all_ways(kinds, carry_out)
    assert exact == Outcome(kind="exact", rows=7, agreement=1.0)
    assert (same.divergence, same.agreement) == (
        pytest.approx(0, abs=NEAR["probabilities"]),
        1.0,
    )
    assert (other.divergence, other.agreement) == compare(logits, logits.flip(0))


def test_what_is_refused_is_a_reason_unless_it_is_the_exact_kind() -> None:
    logits = torch.zeros(1, 2)
    found = in_all_ways([Kind("exact", logits), Kind("odd", None), Kind("last", logits)], carry_out)
    assert [outcome.failure for outcome in found] == [None, "odd cannot be", None]
    with pytest.raises(RequestError, match="exact cannot be"):
        in_all_ways([Kind("exact", None), Kind("last", logits)], carry_out)
