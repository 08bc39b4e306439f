"""The wire: JSON lines between the bench and a worker, on the standard library alone.

Knows: the messages, and the loop in which a worker answers them.
Does not know: any engine.

A request is one line `{"do": name, ...fields}`. A worker answers with any number of
`{"progress": [description, done, total]}` and then one line with `answer` or `error`, and its peak
memory. It ends when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Asks a worker to make its engine ready.

    Attributes:
        model: a name for kvloom; for every other engine the folder that kvloom loaded.
        dtype: of weights, activations and KV.
        threads: CPU threads; None leaves the engine's own choice.
        kv_memory: for engines that reserve KV memory, such as "512MiB".
        settings: further keyword arguments of kvloom's `LLM`; other engines ignore them.
        store: folder in which KV outlives the process, for engines that say `restarted`.
    """

    model: str
    dtype: str
    threads: int | None
    kv_memory: str
    settings: dict[str, Any] = field(default_factory=dict)
    store: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Says that the engine is ready.

    Attributes:
        model_path: the folder that was loaded.
        dtype: what is computed with.
        threads: CPU threads that are used.
        versions: of the engine and of what decides its speed.
        ways: how it can use what it remembers: `exact`, and more if it can keep KV behind a change
            (`shifted`, `repaired`) or beyond its process (`restarted`).
    """

    model_path: str
    dtype: str
    threads: int
    versions: dict[str, str]
    ways: tuple[str, ...] = ("exact",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """Asks for the tokens of a text; only the kvloom worker answers, all engines get token ids."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """The tokens of a text.

    Attributes:
        leading: tokens that the tokenizer puts before every text.
        tokens: the text's own.
    """

    leading: list[int]
    tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RememberRequest:
    """Asks to compute the KV of these tokens and to keep it for the completions that follow."""

    tokens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """Says that the KV is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteRequest:
    """Asks for greedy completions of all prompts at once, going on after end-of-text tokens.

    Attributes:
        prompts: token ids.
        new_tokens: tokens to generate for each prompt.
        shared_tokens: how many tokens at the start of the prompt were remembered; 0 is cold. What
            was remembered may go on differently behind them.
        way: one of the engine's ways; `shifted` and `repaired` keep of one prompt what was
            remembered behind the change as well.
    """

    prompts: list[list[int]]
    new_tokens: int
    shared_tokens: int = 0
    way: str = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated, and when; seconds count from the moment the engine got the prompts.

    Attributes:
        token_ids: generated tokens per prompt.
        first_token_s: when the first token of any prompt was there.
        total_s: when the last token was there.
        cached_tokens: prompt tokens whose KV was reused; None if the engine does not say.
    """

    token_ids: list[list[int]]
    first_token_s: float
    total_s: float
    cached_tokens: int | None = None


class Progress(Protocol):
    """Is told how far something long has come; a total of 0 means that it is not known."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Take note of `done` out of `total`."""
        ...


Operation = Callable[[dict[str, Any]], Any]


def serve(make_operations: Callable[[Progress], Mapping[str, Operation]]) -> None:
    """Answer the requests on standard input until it ends.

    Args:
        make_operations: gets the function that reports progress, and returns by name what this
            worker can do: functions from a request's fields to a message.
    """
    channel = _private_stdout()

    def report(description: str, done: int, total: int) -> None:
        _send(channel, {"progress": [description, done, total]})

    operations = make_operations(report)
    for line in sys.stdin:
        reply = _reply(operations, json.loads(line))
        _send(channel, {**reply, "peak_rss_bytes": peak_rss_bytes()})


def equal_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens are equal before the first that differs."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def peak_rss_bytes() -> int:
    """Return the most memory that this process ever had resident.

    On Linux `ru_maxrss` starts at the peak of the process that started this one, so the kernel's
    own high-water mark is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows, where no worker runs

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reply(operations: Mapping[str, Operation], request: dict[str, Any]) -> dict[str, Any]:
    name = request.pop("do")
    if name not in operations:
        return {"error": f"this worker cannot {name!r}"}
    try:
        return {"answer": asdict(operations[name](request))}
    except Exception as error:  # whatever an engine fails with is a row of the report
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _private_stdout() -> TextIO:
    """Return a stream to the bench; what libraries print goes to standard error from now on."""
    sys.stdout.flush()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()
