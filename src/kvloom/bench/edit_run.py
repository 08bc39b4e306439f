"""The bench of edits: what is measured of each of them.

Knows: how a changed file becomes a case.
Does not know: how an edit is carried out, or in which order edits are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvloom import RequestError
from kvloom.bench.case_run import Running, begin, run_cases
from kvloom.bench.case_source import Source
from kvloom.bench.edit_kinds import Case, Kind, make_kinds, measure
from kvloom.bench.edit_places import PlaceRule, choose_places
from kvloom.bench.edit_results import EditOptions, EditReport, EditResult
from kvloom.bench.edit_source import CutEdit, FileEdit

if TYPE_CHECKING:
    from kvloom import LLM

AnyEdit = FileEdit | CutEdit
FILE_GROUP = "edits"


def run_edits(
    llm: LLM, options: EditOptions, source: Source[AnyEdit], running: Running[EditReport]
) -> EditReport:
    """Measure edits until there are enough of them.

    Args:
        llm: without prefix caching, else equal texts would answer for approximate ones, and
            without repairs, else these would become exact.
        options: what is measured.
        source: the edits.
        running: how.

    Raises:
        RequestError: the earlier report is about something else, or there is no edit to measure.
    """
    kinds = make_kinds(options.shares)
    fresh = begin(EditReport, llm, source.title, options, [kind.name for kind in kinds])
    longest, most = options.places.context + options.places.scored, llm.spec.max_positions
    if longest > most:
        raise RequestError(
            f"The model takes {most} tokens, and context and scored come to {longest}; lower the "
            "context.",
            param="context",
        )

    def measured(edit: AnyEdit) -> EditResult | str:
        if isinstance(edit, FileEdit):
            case = file_case(llm, edit, options.places)
        else:
            case = cut_case(llm, edit, options.places)
        return case if isinstance(case, str) else _result(llm, case, kinds)

    return run_cases(fresh, source.cases, measured, running)


def _result(llm: LLM, case: Case, kinds: Sequence[Kind]) -> EditResult:
    return EditResult(
        name=case.name,
        group=case.group,
        tokens=len(case.new_tokens),
        first_change=case.change[0],
        hunks=case.hunks,
        cut=case.cut,
        scored=len(llm.tokenizer.encode(case.continuation, add_special_tokens=False)),
        outcomes=measure(llm, case, kinds),
    )


def file_case(llm: LLM, edit: FileEdit, rule: PlaceRule) -> Case | str:
    """Return what is measured of a changed file, or why nothing is."""
    encode, spell = llm.tokenizer.encode, llm.retokenizer.text
    old = encode(edit.before, add_special_tokens=False)
    new = encode(edit.after, add_special_tokens=False)

    def is_stable(start: int, stop: int) -> bool:
        return encode(spell(new[start:stop]), add_special_tokens=False) == new[start:stop]

    replaced = llm.retokenizer.replace_text(old, edit.after).replaced
    places = choose_places(replaced, len(new), rule, is_stable)
    if isinstance(places, str):
        return places
    leading = tuple(encode(""))
    return Case(
        name=edit.name,
        group=FILE_GROUP,
        old_tokens=leading + tuple(old[places.old_start : places.old_stop]),
        new_tokens=leading + tuple(new[places.new_start : places.new_stop]),
        change=(len(leading) + places.first_change, len(leading) + places.first_stop),
        continuation=spell(new[places.new_stop : places.new_stop + rule.scored]),
        hunks=places.hunks,
        cut=places.new_start,
    )


def cut_case(llm: LLM, edit: CutEdit, rule: PlaceRule) -> Case | str:
    """Return what is measured of a document that was cut already, or why nothing is."""
    old, new = llm.tokenizer.encode(edit.before), llm.tokenizer.encode(edit.after)
    if max(len(old), len(new)) > rule.context:
        return f"the document is longer than the context of {rule.context} tokens"
    replaced = llm.retokenizer.replace_text(old, llm.retokenizer.text(new)).replaced
    if not replaced:
        return "nothing changes"
    first = replaced[0]
    return Case(
        name=edit.name,
        group=edit.group,
        old_tokens=tuple(old),
        new_tokens=tuple(new),
        change=(first.start, first.start + len(first.tokens)),
        continuation=edit.continuation,
        other=edit.other,
        hunks=len(replaced),
    )
