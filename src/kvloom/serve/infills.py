"""Replies of `/infill`, as llama.cpp's server shapes them.

Knows: the fields that editors read, streamed and whole.
Does not know: HTTP or the engine.
"""

from __future__ import annotations

from typing import Any

from kvloom.outputs import StreamChunk, Usage
from kvloom.serve.backend import Tokenizer
from kvloom.serve.infill import InfillPrompt
from kvloom.serve.infill_body import InfillBody
from kvloom.serve.notes import Notes
from kvloom.serve.replies import event


class InfillWriter:
    """Writes the one completion of a gap."""

    def __init__(
        self, model: str, body: InfillBody, prompt: InfillPrompt, tokenizer: Tokenizer, notes: Notes
    ) -> None:
        self._model = model
        self._body = body
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._notes = notes
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._end: StreamChunk | None = None

    def events(self, prompt: int, chunk: StreamChunk) -> bytes:
        """Return the event that a chunk comes to; the last one is `end_event`."""
        self.add(prompt, chunk)
        if chunk.text and not self._body.only_prompt:
            tokens = list(chunk.token_ids)
            return event({"index": 0, "content": chunk.text, "tokens": tokens, "stop": False})
        return b""

    def end_event(self, usages: list[Usage]) -> bytes:
        """Return the event that ends the stream; its text was sent before."""
        return event(self._fields(usages, "", []))

    def add(self, prompt: int, chunk: StreamChunk) -> None:
        """Keep a chunk for `reply`."""
        self._texts.append(chunk.text)
        self._tokens += chunk.token_ids
        if chunk.finish_reason is not None:
            self._end = chunk

    def reply(self, usages: list[Usage]) -> dict[str, Any]:
        """Return the whole reply, after all chunks were added."""
        text = "" if self._body.only_prompt else "".join(self._texts)
        wanted = self._body.return_tokens and not self._body.only_prompt
        fields = self._fields(usages, text, self._tokens if wanted else [])
        if self._body.response_fields is None:
            return fields
        return _chosen(fields, self._body.response_fields)

    def _fields(self, usages: list[Usage], text: str, tokens: list[int]) -> dict[str, Any]:
        (usage,) = usages
        predicted = 0 if self._body.only_prompt else usage.completion_tokens
        stop_type, word = self._stop()
        return {
            "index": 0,
            "content": text,
            "tokens": tokens,
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": predicted,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.cached_tokens,
            "prompt": self._tokenizer.decode(self._prompt.token_ids, skip_special_tokens=False),
            "has_new_line": any("\n" in piece for piece in self._texts),
            "truncated": False,
            "stop_type": stop_type,
            "stopping_word": word,
            "timings": _timings(usage, predicted),
        } | self._notes.fields(usages)

    def _stop(self) -> tuple[str, str]:
        if self._body.only_prompt:
            return "limit", ""
        end = self._end
        if end is None or end.finish_reason != "stop":
            return "limit", ""
        return ("word", end.stop_reason) if isinstance(end.stop_reason, str) else ("eos", "")


def _timings(usage: Usage, predicted: int) -> dict[str, float]:
    first = usage.time_to_first_token_s or 0.0
    prompt_ms, total_ms = 1000 * first, 1000 * (usage.total_s or first)
    predicted_ms = max(0.0, total_ms - prompt_ms)
    computed = usage.prompt_tokens - usage.cached_tokens
    return {
        "cache_n": usage.cached_tokens,
        **_rates("prompt", computed, prompt_ms),
        **_rates("predicted", predicted, predicted_ms),
    }


def _rates(name: str, count: int, milliseconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / count if count else 0.0,
        f"{name}_per_second": 1000 * count / milliseconds if milliseconds else 0.0,
    }


def _chosen(fields: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the fields of these names; a slash leads into an object, whose field comes out."""
    chosen: dict[str, Any] = {}
    for name in names:
        found: Any = fields
        for step in name.split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        if found is not None:
            chosen[name.rpartition("/")[2] if name not in fields else name] = found
    if "kvloom" in fields:
        chosen["kvloom"] = fields["kvloom"]
    return chosen
