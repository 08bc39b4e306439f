"""An engine without a model: it answers with the prompt's own text, one byte per token.

Knows: the interface of `AsyncLLM`, and how to be slow, to fail, to be full and to be cancelled.
Does not know: attention or memory; its pages are a number that must come back.
"""

from __future__ import annotations

import asyncio
import codecs
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvloom.config import EngineConfig
from kvloom.engine.joining import TokenPart
from kvloom.engine.tenants import tenant_of
from kvloom.errors import CapacityError, RequestError
from kvloom.outputs import (
    EditReceipt,
    EngineStats,
    Fidelity,
    Logprob,
    PartAction,
    Provenance,
    StreamChunk,
    Usage,
)
from kvloom.params import SamplingParams
from kvloom.reuse.edit_series import TextEdit, edit_series
from kvloom.reuse.retokenize import Retokenizer
from kvloom.types import ModelSpec

BOS, EOS, VOCAB_SIZE = 256, 257, 258
SPECIAL_TEXTS = {BOS: "<s>", EOS: "</s>"}


class FakeTokenizer:
    """Bytes as tokens, with a begin and an end token.

    Its chat template strips messages, and does odd things where one of them says SHOUT.

    Args:
        controls: spellings of further control tokens.
    """

    def __init__(self, controls: Sequence[str] = ()) -> None:
        self.controls = {text: 300 + number for number, text in enumerate(controls)}
        self.texts = SPECIAL_TEXTS | {number: text for text, number in self.controls.items()}

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.texts)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = re.split("|".join(map(re.escape, self.controls)) or "$.", text)
        names = re.findall("|".join(map(re.escape, self.controls)) or "$.", text)
        tokens = list(parts[0].encode())
        for name, part in zip(names, parts[1:], strict=True):
            tokens += [self.controls[name], *part.encode()]
        return [BOS, *tokens] if add_special_tokens else tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raw = b""
        for token_id in token_ids:
            special = "" if skip_special_tokens else self.texts.get(token_id, "")
            raw += bytes([token_id]) if token_id < BOS else special.encode()
        return raw.decode("utf-8", "replace")

    def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        if messages[-1]["role"] == "assistant":
            raise RequestError("The chat template refuses this.", param="messages")
        shout = any("SHOUT" in m["content"] for m in messages)
        text = "".join(f"{m['role']}:{m['content'].strip()}\n" for m in messages)
        return text.upper() if shout else text

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < BOS else b""


class FakeDocument:
    """A text whose KV is nothing but a note of what was done to it."""

    def __init__(
        self, llm: FakeAsyncLLM, tokens: list[int], states: dict[str, int], tenant: str
    ) -> None:
        self.llm = llm
        self.tenant = tenant
        self.tokens = tokens
        self.states = states
        self.receipt: EditReceipt | None = None
        self.kv: Any = object()
        self.closed = False

    @property
    def text(self) -> str:
        return self.llm.tokenizer.decode(self.tokens, skip_special_tokens=False)

    @property
    async def nbytes(self) -> int:
        return 64 * len(self.tokens)

    @property
    async def provenance(self) -> Provenance:
        return Provenance(self.states, {"plain": 64 * len(self.tokens)})

    async def append(self, text: str) -> None:
        await self._become(
            [*self.tokens, *self.llm.tokenizer.encode(text, add_special_tokens=False)]
        )

    async def edit_all(
        self,
        edits: Sequence[TextEdit],
        *,
        fidelity: Fidelity,
        share: float,
        selector: str,
        lossless_only: bool,
    ) -> EditReceipt:
        found = edit_series(
            Retokenizer(self.llm.tokenizer), self.tokens, edits, lossless_only=lossless_only
        )
        await self._become(found.applied(self.tokens))
        count = len(self.tokens)
        approximate = {"moved": 1, "exact": count - 1} if count else {"exact": 0}
        self.states = {"exact": count} if fidelity == "exact" else approximate
        return self._receipt(fidelity, found.num_tokens, int(fidelity == "repaired"))

    async def repair(self) -> EditReceipt:
        await self._become(self.tokens)
        self.states = {"exact": len(self.tokens)}
        return self._receipt("exact", len(self.tokens), 0)

    async def fork(self) -> FakeDocument:
        return FakeDocument(self.llm, list(self.tokens), dict(self.states), self.tenant)

    async def score(self, text: str) -> list[float]:
        if not text:
            raise RequestError("There is no text to score.", param="text")
        return [-1.0, *[-math.inf] * (len(text.encode()) - 1)]

    async def close(self) -> None:
        self.closed = True

    async def _become(self, tokens: list[int]) -> None:
        await asyncio.sleep(self.llm.delay_s)
        if self.llm.failure is not None:
            raise self.llm.failure
        self.llm._check_length(tokens)
        self.tokens, self.kv = tokens, object()

    def _receipt(self, fidelity: Fidelity, rows: int, repaired: int) -> EditReceipt:
        return EditReceipt(fidelity, dict(self.states), rows + repaired, repaired)


class FakeAsyncLLM:
    """Echoes prompts; every knob may be turned while requests run."""

    def __init__(
        self,
        *,
        max_model_len: int = 4096,
        max_live: int = 10**6,
        controls: Sequence[str] = (),
    ) -> None:
        self.model_path = Path("models/echo")
        self.tokenizer = FakeTokenizer(controls)
        self.spec = ModelSpec((), VOCAB_SIZE, max_model_len, "movable")
        self.config = EngineConfig(max_model_len=max_model_len)
        self.store = None
        self.max_live = max_live
        self.delay_s = 0.0
        self.hold_after: int | None = None
        self.fail_after: int | None = None
        self.failure: Exception | None = None
        self.stats_failure: Exception | None = None
        self.abort_after: int | None = None
        self.closed = 0
        self.live = 0
        self.peak_live = 0
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.bases: list[tuple[Any, bool]] = []
        self.joins: list[tuple[list[TokenPart], Fidelity, float, str]] = []
        self.joined: list[FakeDocument] = []
        self._known: set[tuple[int, ...]] = set()
        self.tokens_given = 0
        self.finished: Counter[str] = Counter()
        self._seen: set[tuple[str | int, ...]] = set()

    async def stats(self) -> EngineStats:
        if self.stats_failure is not None:
            raise self.stats_failure
        return EngineStats(
            running=self.live,
            pages_total=1000,
            pages_free=1000 - self.live,
            requests_finished=dict(self.finished),
            generated_tokens=self.tokens_given,
        )

    async def close(self) -> None:
        self.closed += 1

    async def stream_tokens(
        self,
        tokens: list[int],
        params: SamplingParams,
        base: Any = None,
        *,
        exact_only: bool = False,
        tenant: str,
    ) -> AsyncGenerator[StreamChunk, None]:
        self.bases.append((base, exact_only))
        self._check(tokens)
        self.submitted.append((tokens, params))
        cached = len(tokens) - 1 if (tenant, *tokens) in self._seen else 0
        self._seen.add((tenant, *tokens))
        self.live += 1
        self.peak_live = max(self.peak_live, self.live)
        reason = "abort"
        try:
            start = time.perf_counter()
            texts = [self._answer(tokens, params, index) for index in range(params.n)]
            states = {"exact": len(tokens)}
            if isinstance(base, FakeDocument):
                assert tokens[: len(base.tokens)] == base.tokens
                assert not base.closed
                cached = len(base.tokens)
                states = {**base.states, "exact": len(tokens) - base.states["moved"]}
            usage = Usage(len(tokens), 0, cached, len(tokens) - cached)
            usage = replace(usage, provenance=Provenance(states, {"plain": 64}))
            chunks = self._chunks(tokens, params, texts)
            for count, chunk in enumerate(chunks, 1):
                await self._misbehave(count - 1)
                self.tokens_given += 1
                seconds = time.perf_counter() - start
                usage = replace(
                    usage,
                    completion_tokens=count,
                    time_to_first_token_s=usage.time_to_first_token_s or seconds,
                    total_s=seconds,
                )
                if self.abort_after is not None and count > self.abort_after:
                    yield replace(chunk, finish_reason="abort", usage=usage)
                    return
                is_last = count == sum(len(text) for text in texts)
                yield replace(chunk, usage=usage if is_last else None)
            reason = "stop"
        finally:
            self.live -= 1
            self.finished[reason] += 1

    async def document(
        self, text: str | Sequence[int], *, cache_salt: str | None = None
    ) -> FakeDocument:
        assert not isinstance(text, str)
        document = FakeDocument(self, [], {"exact": len(text)}, tenant_of(cache_salt))
        await document._become(list(text))
        return document

    async def join_tokens(
        self,
        parts: Sequence[TokenPart],
        *,
        fidelity: Fidelity,
        share: float,
        planner: str,
        tenant: str,
    ) -> FakeDocument:
        self.joins.append((list(parts), fidelity, share, planner))
        document = FakeDocument(self, [], {}, tenant)
        await document._become([token for part in parts for token in part.tokens])
        reusable = [part.tokens for part in parts if part.reusable]
        moved = sum(map(len, reusable))
        document.states = {"moved": moved, "exact": len(document.tokens) - moved}
        new = sum(len(tokens) for tokens in set(reusable) - self._known)
        repaired = len(reusable) if fidelity == "repaired" else 0
        rows = len(document.tokens) - moved + new + repaired
        self._known.update(reusable)
        actions = tuple(
            PartAction(number, "shift" if part.reusable else "compute", 0)
            for number, part in enumerate(parts)
        )
        document.receipt = EditReceipt(
            fidelity, document.states, rows, repaired, 0.5, 0.25, actions=actions
        )
        document.kv = document
        self.joined.append(document)
        return document

    def _check(self, tokens: list[int]) -> None:
        if not tokens:
            raise RequestError("The prompt is empty; send at least one token.", param="prompt")
        self._check_length(tokens)
        if 2 * len(tokens) > self.spec.max_positions:
            raise CapacityError("The prompt can never fit the KV memory.")
        if self.live >= self.max_live:
            raise CapacityError("The queue is full; ask again later.", retry_after_s=1.2)
        if self.failure is not None and self.fail_after is None:
            raise self.failure

    def _check_length(self, tokens: list[int]) -> None:
        known = self.tokenizer.texts
        if any(not 0 <= token < BOS and token not in known for token in tokens):
            raise RequestError("A token id is outside the vocabulary.", param="prompt")
        if len(tokens) >= self.spec.max_positions:
            raise RequestError("The prompt is over the model's context.", param="prompt")

    async def _misbehave(self, count: int) -> None:
        await asyncio.sleep(self.delay_s)
        while self.hold_after is not None and count >= self.hold_after:
            await asyncio.sleep(0.002)
        if self.failure is not None and self.fail_after is not None and count >= self.fail_after:
            raise self.failure

    def _answer(
        self, tokens: list[int], params: SamplingParams, index: int
    ) -> list[tuple[int, str, str | None]]:
        """Return (token, text, stop string) per token of one completion."""
        source = [token for token in tokens if token < BOS] + list(str(index or "").encode())
        endless = itertools.cycle(source) if params.ignore_eos and source else [*source, EOS]
        limit = self.spec.max_positions - len(tokens)
        limit = min(limit, params.max_tokens or limit)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        answer: list[tuple[int, str, str | None]] = []
        text = ""
        for token in itertools.islice(endless, limit):
            piece = decoder.decode(bytes([token])) if token < BOS else ""
            text += piece
            hit = next((stop for stop in params.stop if stop in text), None)
            answer.append((token, piece, hit))
            if hit:
                return self._cut(answer, text.index(hit))
        return answer

    @staticmethod
    def _cut(
        answer: list[tuple[int, str, str | None]], length: int
    ) -> list[tuple[int, str, str | None]]:
        cut = []
        for token, piece, hit in answer:
            cut.append((token, piece[: max(0, length)], hit))
            length -= len(piece)
        return cut

    def _chunks(
        self,
        tokens: list[int],
        params: SamplingParams,
        answers: list[list[tuple[int, str, str | None]]],
    ) -> list[StreamChunk]:
        """Return the chunks of all completions, interleaved."""
        chunks = []
        for step in range(max(len(answer) for answer in answers)):
            for index, answer in enumerate(answers):
                if step >= len(answer):
                    continue
                token, piece, hit = answer[step]
                chunk = StreamChunk("r", index, piece, (token,))
                if params.logprobs is not None:
                    chunk = replace(chunk, logprobs=(entries(token, params.logprobs),))
                if step == len(answer) - 1:
                    stopped = hit is not None or token == EOS
                    reason = "stop" if stopped else "length"
                    chunk = replace(chunk, finish_reason=reason, stop_reason=hit)
                chunks.append(chunk)
        if params.prompt_logprobs is not None:
            known = tuple(entries(token, params.prompt_logprobs) for token in tokens[1:])
            chunks[0] = replace(chunks[0], prompt_logprobs=(None, *known))
        return chunks


def entries(token: int, num_alternatives: int) -> dict[int, Logprob]:
    """Return a token's log-probability as second best, below the alternatives' best."""
    rows = {token: Logprob(-1.0, 2)}
    if num_alternatives >= 1:
        rows[(token + 1) % BOS] = Logprob(-0.5, 1)
    if num_alternatives >= 3:
        rows[(token + 2) % BOS] = Logprob(-math.inf, 3)
    return rows
