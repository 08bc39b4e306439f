"""Exactness: which stretches hold what a fresh prefill would, and why the others do not.

Knows: how taints and lineages follow from stretches in the order of their tokens.
Does not know: documents, pools or how KV is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.kv.lineage import Lineage
from kvloom.kv.span import Span
from kvloom.types import Taint


@dataclass(frozen=True, slots=True)
class Judged:
    """One stretch, behind those before it.

    Attributes:
        span: the stretch.
        taint: why it is not exact.
        stop_pos: position behind its last token.
        expected: lineage there after a fresh prefill.
        actual: lineage that a row there attends to.
    """

    span: Span
    taint: Taint
    stop_pos: int
    expected: Lineage
    actual: Lineage


def judge(
    order: Sequence[Span], root: Lineage, start_pos: int, known: Sequence[Judged] = ()
) -> list[Judged]:
    """Judge every stretch.

    Args:
        order: the stretches in the order of their tokens.
        root: lineage in front of the first.
        start_pos: position of the first token.
        known: what stretches behind the same root and position came to; those that still stand
            first are not judged again.
    """
    judged: list[Judged] = []
    for before, span in zip(known, order, strict=False):
        if before.span is not span:
            break
        judged.append(before)
    for span in order[len(judged) :]:
        last = judged[-1] if judged else None
        if last is None:
            judged.append(_behind(span, start_pos, root, root))
        else:
            judged.append(_behind(span, last.stop_pos, last.expected, last.actual))
    return judged


def _behind(span: Span, pos: int, expected: Lineage, actual: Lineage) -> Judged:
    """Judge one stretch, whose first token stands at `pos`."""
    segment = span.segment
    taint = Taint.EXACT
    if span.shift:
        taint |= Taint.MOVED
    if span.hidden:
        taint |= Taint.PRUNED
    if segment.placed:
        taint |= Taint.REPAIRED
    elif segment.lineage_at(span.start) != expected:
        taint |= Taint.FOREIGN
    if taint is Taint.EXACT and segment.base + span.start != pos:
        taint = Taint.MOVED
    stop_pos = pos + span.length
    if taint is Taint.EXACT and actual == expected:
        expected = segment.lineage_at(span.stop)
        return Judged(span, taint, stop_pos, expected, expected)
    # Rows behind an exact stretch attend to the inexact ones before it as well.
    recipe = f"shift={span.shift};hidden={[tuple(cut) for cut in span.hidden]}"
    if segment.placed:
        recipe += f";pos={segment.rotated_at(span.start, span.stop).tolist()}"
    altered = actual.alter(recipe, segment.lineage_at(span.stop))
    return Judged(span, taint, stop_pos, expected.extend(span.tokens), altered)
