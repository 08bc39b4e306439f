"""What every policy must do: keep slots in order, within the budget, and all where all fit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.fold import fold, plan_fold
from kvloom.kv.span import Span
from kvloom.types import Policy, SlotRange, Taint
from tests.contract.cases import POLICIES
from tests.doubles import Streaming
from tests.kv.worlds import PLAIN, ROOT, World
from tests.tolerances import TOLERANCE

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.id)
counts = st.integers(0, 300)


@every_policy
@given(num_slots=counts, budget=counts)
def test_kept_slots_are_ascending_disjoint_and_within_the_budget(policy, num_slots, budget):
    kept = policy.keep(num_slots, budget)
    assert all(0 <= part.start < part.stop <= num_slots for part in kept)
    assert all(a.stop <= b.start for a, b in pairwise(kept))
    assert sum(part.length for part in kept) <= budget


@every_policy
@given(num_slots=counts, more=counts)
def test_a_budget_that_fits_keeps_everything(policy, num_slots, more):
    kept = policy.keep(num_slots, num_slots + more)
    assert [slot for part in kept for slot in range(*part)] == list(range(num_slots))


@every_policy
@given(num_slots=counts, budget=counts)
def test_the_same_question_gets_the_same_answer(policy, num_slots, budget):
    assert policy.keep(num_slots, budget) == policy.keep(num_slots, budget)
    assert policy.id


@given(sinks=st.integers(0, 8), num_slots=counts, budget=counts)
def test_streaming_keeps_the_first_and_the_last(sinks, num_slots, budget):
    kept = [slot for part in Streaming(sinks).keep(num_slots, budget) for slot in range(*part)]
    assert len(kept) == min(num_slots, budget)
    assert kept[: min(sinks, len(kept))] == list(range(min(sinks, len(kept))))
    recent = len(kept) - min(sinks, len(kept))
    assert kept[len(kept) - recent :] == list(range(num_slots - recent, num_slots))


def shown(span: Span, policy: Policy, budget: int) -> Span:
    """Show only what a policy keeps of a span."""
    kept = policy.keep(span.length, budget)
    edges = [0, *(edge for part in kept for edge in part), span.length]
    holes = zip(edges[::2], edges[1::2], strict=True)
    hidden = tuple(SlotRange(span.start + a, span.start + b) for a, b in holes if a < b)
    return Span(span.segment, span.start, span.stop, span.shift, hidden)


@every_policy
@given(seed=st.integers(0, 2**16), length=st.integers(1, 200), budget=counts)
def test_attention_over_what_is_kept_is_attention_without_the_rest(policy, seed, length, budget):
    world = World(seed, PLAIN)
    source = world.new(0, length)
    source.close_tail()
    (span,) = source.spans
    doc = KVDoc(world.pool, ROOT, [shown(span, policy, budget)])
    pruned = budget < length
    assert [taint for _, taint in doc.taints()] == [Taint.PRUNED if pruned else Taint.EXACT]
    pos = np.array([length + 3])
    scratch = doc.fork()
    slots = world.append_unwritten(scratch, 1)
    plan = plan_fold([doc], [pos], [slots], {None})
    q, rotated = world.query(0, pos)
    out = fold(plan, PLAIN[0], rotated, scale=world.scale(0))
    kept = {slot for part in policy.keep(length, budget) for slot in range(*part)}
    world.bias[[slot for slot in range(length) if slot not in kept]] = -torch.inf
    expected = world.attended(source, 0, q, pos)
    near = TOLERANCE["float32"]["attention"]
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=near)
