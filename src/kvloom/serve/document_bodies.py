"""The bodies that clients send to `/v1/kv/documents`, as pydantic models.

Knows: field names, types, and which edits may stand beside each other.
Does not know: any document's text.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.outputs import Fidelity
from kvloom.reuse.edit_series import TextEdit
from kvloom.serve.schemas import Body, CacheSalt
from kvloom.serve.unsupported import refusal

MAX_NAME_CHARS = 200
MAX_EDITS = 1000

Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]


class CreateBody(Body):
    """Body of `POST /v1/kv/documents`: a text or token ids."""

    model: str | None = None
    cache_salt: CacheSalt | None = None
    name: Name | None = None
    text: str | None = None
    tokens: list[int] | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.text is None) == (self.tokens is None):
            raise refusal("text", "Send either text or tokens.")
        return self


class Position(Body):
    """A place as the Language Server Protocol names it; columns count UTF-16 units."""

    line: int
    character: int


class Range(Body):
    """From a place up to another."""

    start: Position
    end: Position


class Edit(Body):
    """A text and where it comes: characters start to end - 1, a range, or everything."""

    text: str
    start: int | None = None
    end: int | None = None
    range: Range | None = None
    rangeLength: int | None = None  # noqa: N815 -- LSP's own name

    @model_validator(mode="after")
    def _check_one_place(self) -> Self:
        if (self.start is None) != (self.end is None):
            raise refusal("end", "start and end go together.")
        if self.start is not None and self.range is not None:
            raise refusal("range", "Send either start and end or range.")
        if self.start is not None and self.end is not None and not 0 <= self.start <= self.end:
            raise refusal("end", "The edit ends before it starts; give the lower number first.")
        return self

    @property
    def by_characters(self) -> bool:
        """Whether the place is given by start and end."""
        return self.start is not None


class PatchBody(Body):
    """Body of `PATCH /v1/kv/documents/{document_id}`: edits, a whole new text, or more text."""

    append: str | None = None
    edits: Annotated[list[Edit], Field(min_length=1, max_length=MAX_EDITS)] | None = None
    text: str | None = None
    fidelity: Fidelity | None = None
    selector: Literal["blend", "first", "random"] | None = None
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    version: int | None = None

    @model_validator(mode="after")
    def _check_patch(self) -> Self:
        given = [name for name in ("append", "edits", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise refusal("edits", "Send one of edits, text and append.")
        if self.append is not None and self.fidelity not in (None, "exact"):
            raise refusal("fidelity", "Appended text is always computed; leave fidelity out.")
        if self.fidelity != "repaired" and (self.share, self.selector) != (None, None):
            name = "selector" if self.share is None else "share"
            raise refusal(name, f"{name} goes with the fidelity `repaired`.")
        by_characters = {edit.by_characters for edit in self.edits or ()}
        if len(by_characters) > 1:
            raise refusal("edits", "Give the places of all edits in one way, not in two.")
        if by_characters == {True}:
            self._check_overlaps()
        return self

    def _check_overlaps(self) -> None:
        for before, after in pairwise(sorted(map(_place, self.edits or ()))):
            if after[0] < before[1]:
                raise refusal(
                    "edits",
                    f"The edits of characters {before[0]} to {before[1]} and {after[0]} to "
                    f"{after[1]} overlap; places are those of the text before the request.",
                )

    def text_edits(self, lead: str) -> list[TextEdit]:
        """Return the edits, each in terms of the text that those before it left.

        Args:
            lead: text before the client's own.
        """
        if self.text is not None:
            return [TextEdit(lead + self.text)]
        edits = self.edits or []
        if edits[0].by_characters:
            # Places are those before the request, so the last one is changed first.
            edits = sorted(edits, key=_place)[::-1]
        return [_text_edit(edit, lead) for edit in edits]

    @property
    def share_or_default(self) -> float:
        """The share of old tokens that is computed again where `repaired`."""
        return REPAIRED_SHARE if self.share is None else self.share


def _place(edit: Edit) -> tuple[int, int]:
    return edit.start or 0, edit.end or 0


def _text_edit(edit: Edit, lead: str) -> TextEdit:
    if edit.start is not None and edit.end is not None:
        return TextEdit(edit.text, edit.start + len(lead), edit.end + len(lead))
    if edit.range is None:
        return TextEdit(lead + edit.text)
    return TextEdit(
        edit.text, _line_column(edit.range.start, lead), _line_column(edit.range.end, lead)
    )


def _line_column(place: Position, lead: str) -> tuple[int, int]:
    """Return a place in the whole text; what stands before the client's has no end of line."""
    if place.line != 0:
        return place.line, place.character
    # A negative column must stay one.
    shift = len(lead.encode("utf-16-le")) // 2 if place.character >= 0 else 0
    return 0, place.character + shift


class ScoreBody(Body):
    """Body of `POST /v1/kv/documents/{document_id}/score`."""

    text: str


class ForkBody(Body):
    """Body of `POST /v1/kv/documents/{document_id}/fork`."""

    name: Name | None = None


class RepairBody(Body):
    """Body of `POST /v1/kv/documents/{document_id}/repair`; may be left out."""

    version: int | None = None


class DocumentQuery(BaseModel):
    """Query of `GET /v1/kv/documents/{document_id}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: bool = False
