"""Carries out a plan's parts that need no model.

Knows: how kept and taken parts become spans of the document that is being built.
Does not know: how tokens are computed.

A plan is carried out from left to right on a new document, so that computed rows see what stands
before them and nothing else: `Compute` is an ordinary append, everything else comes here.
"""

from __future__ import annotations

from kvloom.kv.baseline import Baseline
from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import Keep, Mix, Take, placed_at, shown
from kvloom.kv.transplant import mixed


def add_part(
    built: KVDoc, doc: KVDoc, part: Keep | Take | Mix, baseline: Baseline | None = None
) -> None:
    """Show a part of a document's plan at the end of the document that is being built.

    Args:
        built: ends where the part begins.
        doc: the document that the plan changes.
        part: what is shown.
        baseline: how it is shown instead, for comparisons.

    Raises:
        CapacityError: a transplant of one half finds too few free blocks; nothing has changed.
    """
    doc.close_tail()
    if isinstance(part, Mix):
        with mixed(doc, part) as spans:
            built.extend(placed_at(spans, built.end_pos))
    else:
        spans = shown(doc, part, built.length)
        built.extend(spans if baseline is None else [baseline(span) for span in spans])
