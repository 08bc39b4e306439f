"""The documents that clients keep on the server: whose they are, and which version they have.

Knows: ids, owners, versions, limits, and that changes of one document wait for each other.
Does not know: HTTP or JSON.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvloom.outputs import EditReceipt, Fidelity, Provenance
from kvloom.serve.backend import BackendDocument
from kvloom.serve.errors import StaleVersionError, TooManyDocumentsError, UnknownDocumentError

T = TypeVar("T")
ID_PATTERN = re.compile(r"doc-[0-9a-f]{32}")
EXACT_STATES = {"exact", "forgotten"}


@dataclass(frozen=True, slots=True)
class Lead:
    """What the tokenizer puts before a text; no part of the client's.

    Attributes:
        text: what it spells.
        tokens: token ids.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class HeldDocument:
    """A document that a client keeps.

    Attributes:
        id: its name in the API; cannot be guessed.
        document: the engine's.
        lead: the tokenizer's own beginning.
        name: a label.
        version: counts the changes of its text.
        fidelity: how its KV came about.
        created: Unix time.
        last_used: Unix time.
        deleted: nobody may use it any more.
    """

    id: str
    document: BackendDocument
    lead: Lead
    name: str | None
    version: int = 1
    fidelity: Fidelity = "exact"
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    deleted: bool = False
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def text(self) -> str:
        """The client's text."""
        return self.document.text[len(self.lead.text) :]

    def snapshot(self) -> Snapshot:
        """Return the document as it is now; later changes do not touch what is returned."""
        self.last_used = time.time()
        tokens, lead = self.document.tokens, len(self.lead.tokens)
        return Snapshot(
            self.id,
            self.version,
            self.text,
            tokens,
            self.fidelity,
            self.document.kv,
            lead if tuple(tokens[:lead]) == self.lead.tokens else 0,
        )

    def note(self, receipt: EditReceipt) -> None:
        """Take over what an edit did to the KV."""
        # A repair that repaired no row left the KV as moving did.
        repaired = receipt.fidelity == "repaired" and receipt.repaired == 0
        self.fidelity = "shifted" if repaired else receipt.fidelity
        self.note_states(receipt.tokens.keys())

    def note_states(self, states: Iterable[str]) -> None:
        """Take over that all KV is exact, where it is; forgotten KV comes back exact."""
        if set(states) <= EXACT_STATES:
            self.fidelity = "exact"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a request reads of a document.

    Attributes:
        id: its name.
        version: the version that was read.
        text: the client's text.
        tokens: token ids, those before the client's text included.
        fidelity: how its KV came about.
        kv: its KV, for the engine alone.
        num_lead: tokens before the client's text.
    """

    id: str
    version: int
    text: str
    tokens: list[int]
    fidelity: Fidelity
    kv: Any
    num_lead: int = 0


class Documents:
    """All documents of a server.

    Args:
        max_documents: per owner.
    """

    def __init__(self, max_documents: int) -> None:
        self._max_documents = max_documents
        self._held: dict[str, dict[str, HeldDocument]] = {}
        self._making: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def of(self, owner: str) -> list[HeldDocument]:
        """Return an owner's documents, oldest first."""
        return list(self._held.get(owner, {}).values())

    def get(self, owner: str, document_id: str) -> HeldDocument:
        """Return a document.

        Raises:
            UnknownDocumentError: the owner has none of this id.
        """
        held = self._held.get(owner, {}).get(document_id)
        if held is None or not ID_PATTERN.fullmatch(document_id):
            raise UnknownDocumentError(
                "There is no such document; it may have been deleted, or the server started "
                "again. Create it with POST /v1/kv/documents."
            )
        return held

    async def add(
        self,
        owner: str,
        name: str | None,
        make: Callable[[], Awaitable[tuple[BackendDocument, Lead]]],
    ) -> HeldDocument:
        """Make a document and keep it.

        Args:
            owner: whose it is.
            name: a label.
            make: gives the engine's document, and what stands before the client's text.

        Raises:
            TooManyDocumentsError: the owner has as many as it may have.
        """
        count = len(self.of(owner)) + self._making[owner]
        if count >= self._max_documents:
            raise TooManyDocumentsError(
                f"There are {count} documents of this API key, and no more may be kept; delete "
                "one, or start the server with a higher --max-documents."
            )
        self._making[owner] += 1
        try:
            document, lead = await make()
        finally:
            self._making[owner] -= 1
        held = HeldDocument(f"doc-{secrets.token_hex(16)}", document, lead, name)
        self._held.setdefault(owner, {})[held.id] = held
        return held

    async def change(
        self,
        held: HeldDocument,
        version: int | None,
        work: Callable[[], Awaitable[T]],
        *,
        new_text: bool = True,
    ) -> T:
        """Change a document after all changes before; what has begun is carried out.

        Args:
            held: the document.
            version: the one that the client knows; None if it does not say.
            work: the change.
            new_text: whether the text may be another one then.

        Raises:
            StaleVersionError: the document has another version by now.
            UnknownDocumentError: it was deleted meanwhile.
        """

        async def change() -> T:
            async with held.changing:
                if held.deleted:
                    raise UnknownDocumentError("The document was deleted meanwhile.")
                if version is not None and version != held.version:
                    raise StaleVersionError(
                        f"The document has version {held.version}, not {version}; read it, and "
                        "make the change of the text it has now."
                    )
                result = await work()
                held.version += new_text
                held.last_used = time.time()
                return result

        return await self._carried_out(change())

    async def delete(self, owner: str, held: HeldDocument) -> None:
        """Let go of a document, after the change that it is in.

        Raises:
            UnknownDocumentError: it was deleted meanwhile.
        """

        async def delete() -> None:
            held.deleted = True
            self._held[owner].pop(held.id, None)
            await held.document.close()

        await self.change(held, None, delete, new_text=False)

    async def close(self) -> None:
        """Wait for the changes under way, and let go of everything."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for owner in list(self._held):
            for held in self.of(owner):
                held.deleted = True
                await held.document.close()
            del self._held[owner]

    async def provenance(self, held: HeldDocument) -> tuple[Provenance, int]:
        """Return the states of a document's tokens, and the bytes of its KV."""
        kv = held.document.kv
        provenance, nbytes = await held.document.provenance, await held.document.nbytes
        if held.document.kv is kv:
            held.note_states(provenance.tokens.keys())
        return provenance, nbytes

    async def refresh(self, held: HeldDocument) -> None:
        """Take note if a document has become exact while nothing else ran."""
        if held.fidelity != "exact":
            await self.provenance(held)

    async def _carried_out(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; it goes on when nobody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def is_at_least(has: Fidelity, wanted: Fidelity | None) -> bool:
    """Whether a document's KV is at least as near to a fresh prefill as a request wants it."""
    order: tuple[Fidelity, ...] = ("shifted", "repaired", "exact")
    return wanted is None or order.index(has) >= order.index(wanted)
