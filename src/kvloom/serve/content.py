"""What stands in messages and before prompts: texts, kept documents and chunks.

Knows: how clients write them.
Does not know: what any of them says, or its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.serve.unsupported import refusal

FIELDS = {"text": "text", "document": "document_id", "chunk": "text"}


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """A place where a document's text stands.

    Attributes:
        document_id: the document.
    """

    document_id: str


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """A text whose KV may be computed alone, and used at any place of any prompt.

    Attributes:
        text: what it says; not empty.
    """

    text: str


Reusable = DocumentPart | ChunkPart
Content = tuple[str | Reusable, ...]


def content_of(value: object) -> Content:
    """Return the parts of a message.

    Raises:
        PydanticCustomError: it is neither a text nor a list of parts.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise refusal(
            None, "A message's content must be a text, or parts: text, documents and chunks."
        )
    return tuple(_part(part) for part in value)


def before_prompt(value: object) -> Reusable:
    """Return what stands before a prompt.

    Raises:
        PydanticCustomError: it is neither a document's id nor a chunk.
    """
    if isinstance(value, str):
        return DocumentPart(value)
    if isinstance(value, dict) and set(value) == {"text"} and isinstance(value["text"], str):
        return _chunk(value["text"])
    raise refusal(
        None, 'Before a prompt stand ids of documents, and chunks as {"text": ...}; nothing else.'
    )


def _part(part: object) -> str | Reusable:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in FIELDS:
        raise refusal(
            None,
            f"Content parts of type {kind!r} are not supported yet; send parts of the types "
            "text, document and chunk only.",
        )
    name = FIELDS[kind]
    text = part.get(name)
    if set(part) != {"type", name} or not isinstance(text, str):
        raise refusal(None, f"A {kind} part holds `type` and the text `{name}`, nothing else.")
    if kind == "text":
        return text
    return DocumentPart(text) if kind == "document" else _chunk(text)


def _chunk(text: str) -> ChunkPart:
    if not text:
        raise refusal(None, "A chunk is empty; give it text, or leave it out.")
    return ChunkPart(text)
