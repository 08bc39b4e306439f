"""The routes: from a checked body to a reply.

Knows: paths, and which part answers which.
Does not know: engine internals or the shape of replies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.errors import RequestError
from kvloom.outputs import EngineStats
from kvloom.serve.backend import Tokenizer
from kvloom.serve.chats import ChatWriter
from kvloom.serve.completions import CompletionWriter, Prompt
from kvloom.serve.infill import Gap, InfillPrompt, infill_prompt
from kvloom.serve.infill_body import InfillBody
from kvloom.serve.infills import InfillWriter
from kvloom.serve.joins import Joined, JoinOptions
from kvloom.serve.logprobs import token_label
from kvloom.serve.notes import Notes
from kvloom.serve.parts import Ask, PromptPart, cut_end, is_joined, joined
from kvloom.serve.prompting import chat_prompt, completion_prompts, contents, document_ids
from kvloom.serve.replies import Head, Writer, new_id, stream_events, whole_reply
from kvloom.serve.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    SamplingBody,
    TokenizeBody,
)
from kvloom.serve.service import PromptChunks, Service, owner_of, service_of, tenant_for
from kvloom.serve.sse import EventStream
from kvloom.serve.strict_json import StrictJSONRoute

# The engine answers between two steps, and a step over a long prompt takes seconds.
STATS_TIMEOUT_S = 30.0
SCORED = (
    "With echo and logprobs every token of the prompt is computed, so that there was nothing to "
    "join."
)

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
    notes = Notes(body.kvloom is not None)
    if body.suffix:
        return await _fill_gaps(body, request, service, notes, tenant)
    known = service.snapshots(owner, document_ids(body.beginning), tenant)
    notes = replace(notes, documents=tuple(known.values()))
    beginning, prompts = await service.with_tokenizer(
        lambda tokenizer: completion_prompts(tokenizer, body, known)
    )
    ends = [prompt.token_ids[prompt.num_known :] for prompt in prompts]
    start = await _start(service, request, body, beginning, max(map(len, ends)), tenant)
    notes = replace(notes, joined=start.joined, read_as_text=start.read_as_text)
    head = Head(new_id("cmpl"), service.model_name, int(time.time()))
    writer = CompletionWriter(head, body, prompts, service.llm.tokenizer, notes)
    asks = [start.ask.followed_by(end) for end in ends]
    chunks = service.generate(asks, params, start.joined)
    return await _answer(service, request, chunks, writer, head.id if body.stream else None)


@router.post("/v1/chat/completions", tags=["openai"], response_class=JSONResponse)
async def chat(body: ChatBody, request: Request, service: Parts, owner: Owner) -> Response:
    """Answer a conversation, in which documents and chunks may stand."""
    service.check_model(body.model)
    params = body.sampling_params()
    tenant = tenant_for(owner, body.cache_salt)
    known = service.snapshots(owner, document_ids(contents(body.messages)), tenant)
    # Where all is to be exact, a conversation is one text; known beginnings of it are found anyway.
    by_parts = body.fidelity not in (None, "exact")
    prompt = await service.with_tokenizer(
        lambda tokenizer: chat_prompt(tokenizer, body.messages, known, by_parts=by_parts)
    )
    if prompt.read_as_text is not None:
        service.metrics.parts_read_as_text.inc()
    beginning, end = cut_end(prompt.parts)
    start = await _start(service, request, body, beginning, len(end), tenant)
    notes = Notes(
        body.kvloom is not None,
        tuple(known.values()),
        joined=start.joined,
        read_as_text=prompt.read_as_text,
    )
    head = Head(new_id("chatcmpl"), service.model_name, int(time.time()))
    writer = ChatWriter(head, body, service.llm.tokenizer, notes)
    chunks = service.generate([start.ask.followed_by(end)], params, start.joined)
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
        messages = body.messages
        known = service.snapshots(owner, document_ids(contents(messages)), None)
        prompt = await service.with_tokenizer(
            lambda tokenizer: chat_prompt(tokenizer, messages, known, by_parts=False)
        )
        token_ids = [token for part in prompt.parts for token in part.tokens]
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


@dataclass(frozen=True, slots=True)
class Start:
    """What prompts begin with.

    Attributes:
        ask: the beginning as the engine takes it.
        joined: what it was joined from; None where it was not.
        read_as_text: why it was not although it was asked for; None for no such reason.
    """

    ask: Ask
    joined: Joined | None = None
    read_as_text: str | None = None


async def _start(
    service: Service,
    request: Request,
    body: SamplingBody,
    beginning: Sequence[PromptPart],
    num_behind: int,
    tenant: str,
) -> Start:
    """Return what prompts begin with, joined where KV is to be shown elsewhere."""
    wanted = body.kvloom
    if wanted is None or wanted.fidelity is None or not is_joined(beginning, wanted.fidelity):
        return Start(joined(beginning, tenant, body.fidelity))
    if isinstance(body, CompletionBody) and body.scores_prompt:
        return Start(joined(beginning, tenant, "exact"), read_as_text=SCORED)
    share = REPAIRED_SHARE if wanted.share is None else wanted.share
    how = JoinOptions(wanted.fidelity, wanted.planner or "blend", share)
    joining = service.join(beginning, how, tenant, num_behind=num_behind)
    found = await service.guard.run(joining, request.receive)
    return Start(found.ask, found)


async def _fill_gaps(
    body: CompletionBody, request: Request, service: Service, notes: Notes, tenant: str
) -> Response:
    """Answer prompts with a suffix."""
    found = await service.with_tokenizer(lambda tokenizer: _infills(tokenizer, body))
    params = body.sampling_params()
    params = replace(params, stop_token_ids=params.stop_token_ids + found[0].stop_token_ids)
    head = Head(new_id("cmpl"), service.model_name, int(time.time()))
    prompts = [Prompt("", each.token_ids) for each in found]
    notes = replace(notes, infill=found[0].kind)
    writer = CompletionWriter(head, body, prompts, service.llm.tokenizer, notes)
    chunks = service.generate([Ask(each.token_ids, tenant) for each in found], params)
    return await _answer(service, request, chunks, writer, head.id if body.stream else None)


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
