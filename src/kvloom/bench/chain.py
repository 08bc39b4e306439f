"""The bench of a long chain of edits: what is left of a document's speed, memory and precision.

Knows: the order of things, and what is measured when.
Does not know: how an edit is carried out, or how the report is shown.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING, Any

from kvloom import DocumentLayout, RequestError, SamplingParams
from kvloom.bench.chain_lines import typed_edits
from kvloom.bench.lasting import require_lasting
from kvloom.bench.machine import describe_machine, watch_idle
from kvloom.bench.peers.wire import Progress
from kvloom.bench.prompts import source_text
from kvloom.bench.results import RunReport

if TYPE_CHECKING:
    from kvloom import LLM, Document

_DECODED = 64
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainOptions:
    """What is measured.

    Attributes:
        model: a folder, hub id, GGUF file or "default".
        edits: how many, one after the other.
        context: tokens of the document at the start.
        seed: of the choice of lines.
        settings: further keyword arguments of kvloom's `LLM`.

    Raises:
        RequestError: a number is out of range.
    """

    model: str = "default"
    edits: int = 1000
    context: int = 4000
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("edits", "context"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1.", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFigures:
    """One document.

    Attributes:
        first_token_s: median seconds to the first token behind it.
        decode_s: seconds of a token after that, likewise.
        layout: how it lies in memory.
    """

    first_token_s: float
    decode_s: float
    layout: DocumentLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport(RunReport):
    """Everything one run found out.

    Attributes:
        options: what was asked for.
        other_cores: cores that other processes kept busy before the start.
        tokens: of the document at the end.
        edit_s: seconds of every edit.
        edited: the document after all edits.
        fresh: another one of the same tokens, computed at once.
        key_deviation: largest difference of the layer-0 keys of both, as a share of the largest.
        value_deviation: of the values, likewise.
        key_deviation_after_one: that of the keys after the first edit, whose error is no other.
    """

    options: ChainOptions
    other_cores: float
    tokens: int
    edit_s: tuple[float, ...]
    edited: DocumentFigures
    fresh: DocumentFigures
    key_deviation: float
    value_deviation: float
    key_deviation_after_one: float


def run_chain(
    llm: LLM,
    options: ChainOptions,
    progress: Progress = lambda description, done, total: None,
) -> ChainReport:
    """Edit one line after the other, all `shifted`, and hold the document against a fresh one.

    Args:
        llm: without prefix caching, else one document would answer for the other, and without idle
            repairs, else it becomes the other.
        options: what is measured.
        progress: is told about every edit.

    Raises:
        RequestError: the model cannot hold the document, or has one of these settings.
    """
    require_lasting(llm, "a chain")
    started_at, begun = datetime.now().astimezone(), time.perf_counter()
    other_cores = watch_idle()
    tokens = llm.tokenizer.encode(source_text(2 * options.context))
    text = llm.retokenizer.text(tokens[: options.context])
    typed = llm.retokenizer.text(tokens[options.context : 2 * options.context]).split("\n")
    with closing(llm.document(text)) as edited:
        edit_s: list[float] = []
        for edit in typed_edits(text, typed, options.edits, options.seed):
            progress("Editing", len(edit_s), options.edits)
            before = time.perf_counter()
            edited.edit(edit.start, edit.end, edit.text, fidelity="shifted")
            edit_s.append(time.perf_counter() - before)
            if len(edit_s) == 1:
                with closing(llm.document(edited.tokens)) as fresh:
                    key_deviation_after_one, _ = edited.deviation(fresh)
        progress("Comparing", 0, 0)
        with closing(llm.document(edited.tokens)) as fresh:
            edited_figures, fresh_figures = _figures(edited, fresh)
            keys, values = edited.deviation(fresh)
        num_tokens = len(edited.tokens)
    return ChainReport(
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=time.perf_counter() - begun,
        options=options,
        machine=describe_machine(),
        other_cores=other_cores,
        tokens=num_tokens,
        edit_s=tuple(edit_s),
        edited=edited_figures,
        fresh=fresh_figures,
        key_deviation=keys,
        value_deviation=values,
        key_deviation_after_one=key_deviation_after_one,
    )


def _figures(*documents: Document) -> list[DocumentFigures]:
    """Return the figures of documents, measured in turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in documents]
    for _ in range(_ROUNDS + 1):
        for document, found in zip(documents, times, strict=True):
            found.append(_decode(document))
    figures = []
    for document, found in zip(documents, times, strict=True):
        first_s, step_s = zip(*found[1:], strict=True)  # the first round warms up
        figures.append(
            DocumentFigures(
                first_token_s=median(first_s), decode_s=median(step_s), layout=document.layout
            )
        )
    return figures


def _decode(document: Document) -> tuple[float, float]:
    """Return seconds to the first token behind a document, and the mean of those after it."""
    params = SamplingParams(max_tokens=1 + _DECODED, temperature=0.0, ignore_eos=True)
    times = [time.perf_counter()]
    for chunk in document.stream("", params):
        times += [time.perf_counter()] * len(chunk.token_ids)
    first_s, last_s = times[1] - times[0], times[-1] - times[1]
    return first_s, last_s / _DECODED
