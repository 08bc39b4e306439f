"""The routes of `/v1/kv/documents`: from a checked body to a document's state.

Knows: paths, versions in headers, and the JSON of a document.
Does not know: how a document is kept or changed.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from kvloom.errors import RequestError
from kvloom.outputs import EditReceipt
from kvloom.serve.backend import BackendDocument, Tokenizer
from kvloom.serve.document_bodies import (
    CreateBody,
    DocumentQuery,
    ForkBody,
    PatchBody,
    RepairBody,
    ScoreBody,
)
from kvloom.serve.documents import HeldDocument, Lead
from kvloom.serve.logprobs import finite, token_label
from kvloom.serve.prompting import lead_of
from kvloom.serve.service import Service, owner_of, salt_of, service_of
from kvloom.serve.strict_json import StrictJSONRoute

ETAG = re.compile(r'"(\d{1,18})"')
Parts = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]

router = APIRouter(route_class=StrictJSONRoute, prefix="/v1/kv/documents", tags=["documents"])


def held_document(document_id: str, service: Parts, owner: Owner) -> HeldDocument:
    """Return the document that a path names.

    Raises:
        UnknownDocumentError: the sender has none of this id.
    """
    return service.documents.get(owner, document_id)


Held = Annotated[HeldDocument, Depends(held_document)]


@router.post("", status_code=201)
async def create(body: CreateBody, request: Request, service: Parts, owner: Owner) -> Response:
    """Keep a text, compute its KV, and give it an id."""
    service.check_model(body.model)

    async def make() -> tuple[BackendDocument, Lead]:
        lead, tokens = await service.with_tokenizer(lambda tokenizer: _read(tokenizer, body))
        document = await service.llm.document(tokens, cache_salt=salt_of(owner, body.cache_salt))
        if body.text is not None and document.text != lead.text + body.text:
            raise RequestError(
                "The tokenizer cannot spell this text as it is, so places in it would shift; "
                "leave out control characters, or what the tokenizer normalises.",
                param="text",
            )
        return document, lead

    adding = service.documents.add(owner, body.name, make)
    held = await service.guard.run(adding, request.receive)
    return _reply(service, held, status=201)


@router.get("")
async def list_documents(service: Parts, owner: Owner) -> Response:
    """List the documents of this API key, oldest first."""
    found = service.documents.of(owner)
    await asyncio.gather(*map(service.documents.refresh, found))
    data = [_fields(service, held) for held in found]
    return JSONResponse({"object": "list", "data": data})


@router.get("/{document_id}")
async def describe(
    held: Held, request: Request, service: Parts, query: Annotated[DocumentQuery, Query()]
) -> Response:
    """Describe a document and its KV; with `text=true` its text as well."""
    fields = _fields(service, held) | ({"text": held.text} if query.text else {})
    states = service.documents.provenance(held)
    provenance, nbytes = await service.guard.run(states, request.receive)
    if fields["version"] == held.version:
        fields["fidelity"] = held.fidelity
    fields["bytes"] = nbytes
    fields["provenance"] = {"tokens": provenance.tokens, "bytes": provenance.nbytes}
    return _reply(service, held, fields, version=fields["version"])


@router.patch("/{document_id}")
async def patch(body: PatchBody, held: Held, request: Request, service: Parts) -> Response:
    """Change a document's text, all of the changes or none, and keep the KV that can be kept."""

    async def work() -> Response:
        receipt = None
        if body.append is not None:
            await _append(held, body.append)
        else:
            receipt = await held.document.edit_all(
                body.text_edits(held.lead.text),
                fidelity=body.fidelity or "exact",
                share=body.share_or_default,
                selector=body.selector or "blend",
                lossless_only=True,
            )
            held.note(receipt)
            service.metrics.edited(receipt, len(held.document.tokens))
        return _reply(service, held, _receipt(receipt), version=held.version + 1)

    version = _known_version(request, body.version)
    changing = service.documents.change(held, version, work)
    return await service.guard.run(changing, request.receive)


@router.delete("/{document_id}")
async def delete(held: Held, service: Parts, owner: Owner) -> Response:
    """Let go of a document."""
    await service.documents.delete(owner, held)
    return JSONResponse({"id": held.id, "object": "kv.document", "deleted": True})


@router.post("/{document_id}/repair")
async def repair(
    held: Held, request: Request, service: Parts, body: RepairBody | None = None
) -> Response:
    """Compute all KV again that is not exact, and wait for it."""

    async def work() -> Response:
        receipt = await held.document.repair()
        held.note(receipt)
        service.metrics.edited(receipt, len(held.document.tokens))
        return _reply(service, held, _receipt(receipt))

    version = _known_version(request, body.version if body is not None else None)
    changing = service.documents.change(held, version, work, new_text=False)
    return await service.guard.run(changing, request.receive)


@router.post("/{document_id}/fork", status_code=201)
async def fork(
    held: Held, request: Request, service: Parts, owner: Owner, body: ForkBody | None = None
) -> Response:
    """Keep a second document with the same text; both share their KV."""
    fidelity = held.fidelity

    async def make() -> tuple[BackendDocument, Lead]:
        return await held.document.fork(), held.lead

    name = body.name if body is not None else None
    forking = service.documents.add(owner, name, make)
    fork = await service.guard.run(forking, request.receive)
    fork.fidelity = fidelity
    return _reply(service, fork, status=201)


@router.post("/{document_id}/score")
async def score(body: ScoreBody, held: Held, request: Request, service: Parts) -> Response:
    """Return the log-probability of each token of a text behind the document."""
    await service.documents.refresh(held)
    snapshot = held.snapshot()
    scoring = held.document.score(body.text)
    logprobs = await service.guard.run(scoring, request.receive)
    tokens = await service.with_tokenizer(
        lambda tokenizer: tokenizer.encode(body.text, add_special_tokens=False)
    )
    labels = [token_label(service.llm.tokenizer, token) for token in tokens]
    return JSONResponse(
        {
            "document_id": held.id,
            "version": snapshot.version,
            "fidelity": snapshot.fidelity,
            "tokens": tokens,
            "token_strs": labels,
            "logprobs": [finite(logprob) for logprob in logprobs],
            "total": finite(sum(logprobs)),
        }
    )


def _read(tokenizer: Tokenizer, body: CreateBody) -> tuple[Lead, list[int]]:
    """Return what the tokenizer puts before a text, and all tokens."""
    if body.text is None:
        return Lead(), body.tokens or []
    plain = tokenizer.encode(body.text, add_special_tokens=False)
    tokens = lead_of(tokenizer, body.text)
    spelled = tokenizer.decode(tokens, skip_special_tokens=False)
    if "\n" in spelled or "\r" in spelled:  # would count as a line of the client's
        return Lead(), plain
    return Lead(spelled, tuple(tokens)), [*tokens, *plain]


async def _append(held: HeldDocument, text: str) -> None:
    before = held.document.text
    fork = await held.document.fork()
    await fork.append(text)
    if fork.text != before + text:
        await fork.close()
        raise RequestError(
            "The tokenizer cannot spell this text as it is, so places in it would shift; leave "
            "out control characters, or what the tokenizer normalises.",
            param="append",
        )
    old, held.document = held.document, fork
    await old.close()


def _known_version(request: Request, version: int | None) -> int | None:
    """Return the version that a client says it knows, in the body or as `If-Match`.

    Raises:
        RequestError: the header is malformed, or says something else than the body.
    """
    header = request.headers.get("if-match")
    if header is None or header.strip() == "*":
        return version
    found = ETAG.fullmatch(header.strip())
    if found is None or version not in (None, int(found[1])):
        raise RequestError(
            'If-Match must be one version in quotes, such as "3", and the one in the body.',
            param="If-Match",
        )
    return int(found[1])


def _receipt(receipt: EditReceipt | None) -> dict[str, Any]:
    return {"receipt": None if receipt is None else asdict(receipt)}


def _fields(service: Service, held: HeldDocument) -> dict[str, Any]:
    return {
        "id": held.id,
        "object": "kv.document",
        "model": service.model_name,
        "name": held.name,
        "version": held.version,
        "num_tokens": len(held.document.tokens),
        "fidelity": held.fidelity,
        "created": held.created,
        "last_used": held.last_used,
    }


def _reply(
    service: Service,
    held: HeldDocument,
    fields: dict[str, Any] | None = None,
    *,
    version: int | None = None,
    status: int = 200,
) -> Response:
    version = held.version if version is None else version
    body = _fields(service, held) | (fields or {}) | {"version": version}
    return JSONResponse(body, status_code=status, headers={"ETag": f'"{version}"'})
