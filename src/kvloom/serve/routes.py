"""The routes: from a checked body to a reply.

Knows: paths, and which part answers which.
Does not know: engine internals or the shape of replies.
"""

from __future__ import annotations

import asyncio
import time
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
from kvloom.serve.logprobs import token_label
from kvloom.serve.replies import Head, Writer, new_id, stream_events, whole_reply
from kvloom.serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from kvloom.serve.service import PromptChunks, Service
from kvloom.serve.sse import EventStream
from kvloom.serve.strict_json import StrictJSONRoute

# The engine answers between two steps, and a step over a long prompt takes seconds.
STATS_TIMEOUT_S = 30.0

router = APIRouter(route_class=StrictJSONRoute)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]


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
async def complete(body: CompletionBody, request: Request, service: Parts) -> Response:
    """Continue prompts, given as text or token ids."""
    service.check_model(body.model)
    params = body.sampling_params()
    prompts = await service.with_tokenizer(lambda tokenizer: _prompts(tokenizer, body))
    head = Head(new_id("cmpl"), service.model_name, int(time.time()))
    writer = CompletionWriter(head, body, prompts, service.llm.tokenizer)
    chunks = service.generate([prompt.token_ids for prompt in prompts], params)
    return await _answer(service, request, chunks, writer, head if body.stream else None)


@router.post("/v1/chat/completions", tags=["openai"], response_class=JSONResponse)
async def chat(body: ChatBody, request: Request, service: Parts) -> Response:
    """Answer a conversation."""
    service.check_model(body.model)
    params = body.sampling_params()
    token_ids = await service.chat_tokens(body.template_messages())
    head = Head(new_id("chatcmpl"), service.model_name, int(time.time()))
    writer = ChatWriter(head, body, service.llm.tokenizer)
    chunks = service.generate([token_ids], params)
    return await _answer(service, request, chunks, writer, head if body.stream else None)


@router.post("/tokenize", tags=["tokens"])
async def tokenize(body: TokenizeBody, service: Parts) -> JSONResponse:
    """Return the token ids of a prompt or of a conversation."""
    service.check_model(body.model)
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        token_ids = await service.chat_tokens(messages)
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
    accept = request.headers.get("accept", "")
    body, content_type = service.metrics.exposition(accept, await _stats(service))
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


def _prompts(tokenizer: Tokenizer, body: CompletionBody) -> list[Prompt]:
    special = body.add_special_tokens is not False
    skip = body.skip_special_tokens is not False
    prompts = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            token_ids = tokenizer.encode(prompt, add_special_tokens=special)
            prompts.append(Prompt(prompt, token_ids))
        else:
            text = tokenizer.decode(prompt, skip_special_tokens=skip) if body.echo else ""
            prompts.append(Prompt(text, prompt))
    return prompts


async def _answer(
    service: Service,
    request: Request,
    chunks: PromptChunks,
    writer: Writer,
    stream_head: Head | None,
) -> Response:
    guard = service.guard
    if stream_head is None:
        body = await guard.run(whole_reply(chunks, writer), request.receive)
        return Response(body, media_type="application/json")
    events = stream_events(chunks, writer)

    async def first_event() -> bytes:
        return await anext(events)

    # Errors before the first event still get a status of their own.
    first = await guard.run(first_event(), request.receive)
    return EventStream(service, first, events, stream_head.id)
