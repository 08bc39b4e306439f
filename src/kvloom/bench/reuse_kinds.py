"""Kinds: the ways to join chunks that are compared.

Knows: joined documents, and what each kind takes from an earlier request.
Does not know: where chunks come from, or what their outcomes come to.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kvloom import Chunk, SamplingParams
from kvloom.bench.case_kinds import EXACT, FIRST_TOKEN, in_all_ways
from kvloom.bench.case_results import Outcome
from kvloom.bench.peers.wire import equal_start
from kvloom.bench.reuse_cases import ReuseCase
from kvloom.bench.reuse_engine import Engines

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom import LLM, Document
    from kvloom.outputs import Fidelity


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to come to the KV of joined chunks.

    Attributes:
        name: in tables and files.
        way: `join` asks kvloom to join; `prefix` reuses what an earlier order begins with alike.
        fidelity: of `join`.
        share: of `join`.
        planner: of `join`.
        sink: of `join`.
    """

    name: str
    way: Literal["join", "prefix"] = "join"
    fidelity: Fidelity = "repaired"
    share: float = 0.15
    planner: str = "blend"
    sink: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What is scored behind a prompt.

    Attributes:
        text: the answer, and what the model itself says behind it after full recompute.
        tokens: of the text.
        answered: of these, the answer's.
    """

    text: str
    tokens: int
    answered: int


def make_kinds(shares: Sequence[float]) -> tuple[Kind, ...]:
    """Return the kinds in the order of the table, the exact one first: others are held against it.

    Args:
        shares: of the chunks' rows; other planners than `blend` take the middle one.
    """
    ordered = sorted(shares, reverse=True)
    middle = ordered[len(ordered) // 2]
    return (
        Kind(EXACT, fidelity="exact"),
        Kind("prefix", "prefix"),
        # Before chunks are computed alone, which it might take instead of what it learned from.
        Kind(f"craft {middle:.0%}", share=middle, planner="craft"),
        *(Kind(f"blend {share:.0%}", share=share) for share in ordered),
        *(
            Kind(f"{planner} {middle:.0%}", share=middle, planner=planner)
            for planner in ("first", "random")
        ),
        Kind("none", planner="none"),
        # Chunks that begin with themselves, as published systems compute them.
        Kind(f"naive {middle:.0%}", share=middle, sink=""),
        Kind("naive", planner="none", sink=""),
    )


def new_order(case: ReuseCase, seed: int) -> list[str]:
    """Return the chunks in another order, which the seed and the case's name decide."""
    order = list(case.chunks)
    chance = random.Random(f"{seed}, {case.name}")
    while len(set(order)) > 1 and order == list(case.chunks):
        chance.shuffle(order)
    return order


def measure(
    engines: Engines, case: ReuseCase, kinds: Sequence[Kind], seed: int, scored: int
) -> tuple[Scored, tuple[Outcome, ...]]:
    """Join chunks in another order, in all ways.

    Args:
        engines: without prefix caching and without repairs.
        case: the prompt as an earlier request had it.
        kinds: the exact one first.
        seed: of the order.
        scored: tokens that are scored.

    Raises:
        KvloomError: the prompt cannot be computed.
    """
    joining = _Joining(engines, case, new_order(case, seed), scored)
    outcomes = in_all_ways(kinds, joining.carry_out)
    assert joining.scored is not None
    return joining.scored, outcomes


@dataclass(slots=True)
class _Joining:
    """One prompt in its new order, and what the exact kind said of it."""

    engines: Engines
    case: ReuseCase
    order: list[str]
    wanted: int
    scored: Scored | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def llm(self) -> LLM:
        """The engine of now."""
        return self.engines.llm

    def carry_out(self, kind: Kind) -> tuple[Outcome, Tensor]:
        """Join in one way; return its outcome without comparison, and the logits (s, v)."""
        kept = self._kept(kind)
        begun = time.perf_counter()
        with closing(self._joined(kind, kept)) as document:
            document.generate("", FIRST_TOKEN)
            first_token_s = time.perf_counter() - begun
            if self.scored is None:
                self.tokens, self.scored = document.tokens, self._expected(document)
            scores, logits = document.score(self.scored.text, return_logits=True)
        receipt = document.receipt
        outcome = Outcome(
            kind=kind.name,
            rows=receipt.recomputed if receipt else len(self.tokens) - self._shared(),
            repaired=receipt.repaired if receipt else 0,
            first_token_s=first_token_s,
            loaded_bytes=receipt.loaded_bytes if receipt else 0,
            nll=-sum(scores[: self.scored.answered or None]),
        )
        return outcome, logits

    def _kept(self, kind: Kind) -> Document | None:
        """Do what an earlier request did, and return what is kept of it beside its chunks."""
        if kind.way == "prefix":
            return self.llm.document(self.tokens[: self._shared()])
        if kind.planner == "craft":  # learns where a prompt is computed as one
            self._join(replace(kind, fidelity="exact"), self.case.chunks).close()
        elif kind.fidelity != EXACT:
            # Chunks that are computed alone do not depend on an order. In that of the earlier
            # request those which `craft` learned from are exact, and would be taken instead.
            self._join(replace(kind, fidelity="shifted"), self.order).close()
        if kind.fidelity != EXACT:
            self.engines.restart()
        return None

    def _joined(self, kind: Kind, kept: Document | None) -> Document:
        """Return the prompt as a document."""
        if kept is None:
            return self._join(kind, self.order)
        kept.append_tokens(self.tokens[len(kept.tokens) :])
        return kept

    def _join(self, kind: Kind, chunks: Sequence[str]) -> Document:
        case = self.case
        parts: list[str | Chunk] = [case.lead, *map(Chunk, chunks), case.question]
        return self.llm.join(
            parts, fidelity=kind.fidelity, share=kind.share, planner=kind.planner, sink=kind.sink
        )

    def _shared(self) -> int:
        """Return how many tokens the two orders begin with alike."""
        case, encode = self.case, self.llm.tokenizer.encode
        earlier = encode(case.lead)
        for text in (*case.chunks, case.question):
            earlier += encode(text, add_special_tokens=False)
        return equal_start(earlier, self.tokens)

    def _expected(self, document: Document) -> Scored:
        """Return the answer, and what the model says behind it, as many tokens as are wanted."""
        encode = self.llm.tokenizer.encode
        answer = encode(self.case.answer, add_special_tokens=False)[: self.wanted]
        text, left = self.llm.retokenizer.text(answer), self.wanted - len(answer)
        if left:
            greedy = SamplingParams(max_tokens=left, temperature=0.0, ignore_eos=True)
            text += document.generate(text, greedy).outputs[0].text
        tokens = encode(text, add_special_tokens=False)
        return Scored(text, len(tokens), equal_start(answer, tokens))
