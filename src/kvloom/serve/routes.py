"""The routes: from a checked body to a reply.

Knows: paths, and which part answers which.
Does not know: engine internals or the shape of replies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from kvloom.errors import RequestError
from kvloom.outputs import EngineStats
from kvloom.serve.backend import Tokenizer
from kvloom.serve.chats import ChatWriter
from kvloom.serve.completions import CompletionWriter, Prompt
from kvloom.serve.documents import Snapshot
from kvloom.serve.infill import Gap, InfillPrompt, infill_prompt
from kvloom.serve.infill_body import InfillBody
from kvloom.serve.infills import InfillWriter
from kvloom.serve.logprobs import token_label
from kvloom.serve.notes import Notes
from kvloom.serve.parts import Ask, joined
from kvloom.serve.replies import Head, Writer, new_id, stream_events, whole_reply
from kvloom.serve.schemas import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    document_ids,
)
from kvloom.serve.service import PromptChunks, Service, owner_of, service_of, tenant_for
from kvloom.serve.sse import EventStream
from kvloom.serve.strict_json import StrictJSONRoute

# The engine answers between two steps, and a step over a long prompt takes seconds.
STATS_TIMEOUT_S = 30.0

Parts = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]

router = APIRouter(route_class=StrictJSONRoute)


@router.get("/v1/models", tags=["openai"])
async def list_models(service: Parts) -> JSONResponse:
    """List the one model that is served."""
    return JSONResponse({"object": "list", "data": [_model_card(service)]})


@router.get("/v1/models/{model:path}", tags=["openai"])
async def get_model(model: str, service: Parts) -> JSONResponse:
    """Describe the model that is served."""
    service.check_model(model)
    return JSONResponse(_model_card(service))


@router.post("/v1/completions", tags=["openai"], response_class=JSONResponse)
async def complete(
    body: CompletionBody, request: Request, service: Parts, owner: Owner
) -> Response:
    """Continue prompts, given as text or token ids, or documents."""
    service.check_model(body.model)
    params = body.sampling_params()
    tenant = tenant_for(owner, body.cache_salt)
    documents = service.snapshots(owner, body.document_ids, tenant)
    prompts = await service.with_tokenizer(lambda tokenizer: _prompts(tokenizer, body, documents))
    notes = Notes(body.kvloom is not None, documents)
    if body.suffix:
        found = await service.with_tokenizer(lambda tokenizer: _infills(tokenizer, body))
        prompts = [Prompt("", each.token_ids) for each in found]
        asks = [Ask(each.token_ids, tenant) for each in found]
        params = replace(params, stop_token_ids=params.stop_token_ids + found[0].stop_token_ids)
        notes = replace(notes, infill=found[0].kind)
    else:
        ends = [prompt.token_ids[prompt.num_known :] for prompt in prompts]
        asks = [joined([*documents, end], tenant, body.fidelity) for end in ends]
    head = Head(new_id("cmpl"), service.model_name, int(time.time()))
    writer = CompletionWriter(head, body, prompts, service.llm.tokenizer, notes)
    chunks = service.generate(asks, params)
    return await _answer(service, request, chunks, writer, head.id if body.stream else None)


@router.post("/v1/chat/completions", tags=["openai"], response_class=JSONResponse)
async def chat(body: ChatBody, request: Request, service: Parts, owner: Owner) -> Response:
    """Answer a conversation, in which documents may stand."""
    service.check_model(body.model)
    params = body.sampling_params()
    tenant = tenant_for(owner, body.cache_salt)
    documents = service.snapshots(owner, document_ids(body.messages), tenant)
    token_ids = await service.chat_tokens(_for_template(body.messages, documents))
    head = Head(new_id("chatcmpl"), service.model_name, int(time.time()))
    notes = Notes(body.kvloom is not None, documents)
    writer = ChatWriter(head, body, service.llm.tokenizer, notes)
    # The template has made one text of all parts; known beginnings of it are found anyway.
    chunks = service.generate([joined([token_ids], tenant, body.fidelity)], params)
    return await _answer(service, request, chunks, writer, head.id if body.stream else None)


@router.post("/infill", tags=["llama.cpp"], response_class=JSONResponse)
async def infill(body: InfillBody, request: Request, service: Parts, owner: Owner) -> Response:
    """Find the text between a prefix and a suffix, as llama.cpp's server does."""
    service.check_model(body.model)
    gap, tenant = body.gap, tenant_for(owner, body.cache_salt)
    prompt = await service.with_tokenizer(lambda tokenizer: infill_prompt(tokenizer, gap))
    params = body.sampling_params(prompt.stop_token_ids)
    notes = Notes(body.kvloom is not None, infill=prompt.kind, ignored=body.ignored)
    writer = InfillWriter(service.model_name, body, prompt, service.llm.tokenizer, notes)
    chunks = service.generate([Ask(prompt.token_ids, tenant)], params)
    return await _answer(
        service, request, chunks, writer, new_id("infill") if body.stream else None
    )


@router.post("/tokenize", tags=["tokens"])
async def tokenize(body: TokenizeBody, service: Parts, owner: Owner) -> JSONResponse:
    """Return the token ids of a prompt or of a conversation."""
    service.check_model(body.model)
    if body.messages is not None:
        documents = service.snapshots(owner, document_ids(body.messages), None)
        token_ids = await service.chat_tokens(_for_template(body.messages, documents))
    else:
        text, special = body.prompt or "", body.add_special_tokens is not False
        token_ids = await service.with_tokenizer(
            lambda tokenizer: tokenizer.encode(text, add_special_tokens=special)
        )
    labels = None
    if body.return_token_strs:
        labels = [token_label(service.llm.tokenizer, token_id) for token_id in token_ids]
    return JSONResponse(
        {
            "count": len(token_ids),
            "max_model_len": service.max_model_len,
            "tokens": token_ids,
            "token_strs": labels,
        }
    )


@router.post("/detokenize", tags=["tokens"])
async def detokenize(body: DetokenizeBody, service: Parts) -> JSONResponse:
    """Return the text of token ids."""
    service.check_model(body.model)
    vocab_size = service.llm.spec.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"Token id {token_id} is not in the vocabulary; ids go from 0 to {vocab_size - 1}.",
                param="tokens",
            )
    text = await service.with_tokenizer(
        lambda tokenizer: tokenizer.decode(body.tokens, skip_special_tokens=False)
    )
    return JSONResponse({"prompt": text})


@router.get("/health", tags=["operation"])
async def health(service: Parts) -> JSONResponse:
    """Say whether the engine answers."""
    stats = await _stats(service)
    return JSONResponse({"status": "ok", "running": stats.running, "waiting": stats.waiting})


@router.get("/metrics", tags=["operation"])
async def metrics(request: Request, service: Parts) -> Response:
    """Return the metrics in Prometheus' format."""
    accept, store = request.headers.get("accept", ""), service.llm.store
    use = None if store is None else await store.statistics()
    body, content_type = service.metrics.exposition(accept, await _stats(service), use)
    return Response(body, headers={"Content-Type": content_type})


async def _stats(service: Service) -> EngineStats:
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            return await service.llm.stats()
    except Exception as error:
        raise HTTPException(503, "The engine does not answer; the log holds the reason.") from error


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvloom",
        "max_model_len": service.max_model_len,
    }


def _for_template(
    messages: Sequence[ChatMessage], documents: Sequence[Snapshot]
) -> list[dict[str, Any]]:
    texts = {document.id: document.text for document in documents}
    return [message.for_template(texts) for message in messages]


def _prompts(
    tokenizer: Tokenizer, body: CompletionBody, documents: Sequence[Snapshot]
) -> list[Prompt]:
    special = body.add_special_tokens is not False and not documents
    skip = body.skip_special_tokens is not False
    text_before = "".join(document.text for document in documents)
    known = [token for document in documents for token in document.tokens]
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            text, token_ids = prompt, tokenizer.encode(prompt, add_special_tokens=special)
        else:
            text = tokenizer.decode(prompt, skip_special_tokens=skip) if body.echo else ""
            token_ids = prompt
        prompts.append(Prompt(text_before + text, [*known, *token_ids], len(known)))
    return prompts


def _infills(tokenizer: Tokenizer, body: CompletionBody) -> list[InfillPrompt]:
    gaps = [Gap(str(prompt), body.suffix or "") for prompt in body.prompts]
    return [infill_prompt(tokenizer, gap) for gap in gaps]


async def _answer(
    service: Service,
    request: Request,
    chunks: PromptChunks,
    writer: Writer,
    stream_id: str | None,
) -> Response:
    guard = service.guard
    if stream_id is None:
        body = await guard.run(whole_reply(chunks, writer), request.receive)
        return Response(body, media_type="application/json")
    events = stream_events(chunks, writer)

    async def first_event() -> bytes:
        return await anext(events)

    # Errors before the first event still get a status of their own.
    first = await guard.run(first_event(), request.receive)
    return EventStream(service, first, events, stream_id)
