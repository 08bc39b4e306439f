"""Joining: one prompt out of parts, as a planner says how each of them comes about.

Knows: the order of parts, a planner, and how its actions are carried out from left to right.
Does not know: tokenizers' templates or HTTP.

Source: CacheBlend (Yao et al. 2025), section 4, and Cache-Craft (Agarwal et al. 2025), for repairs.
Deviation: what is computed anew between chunks waits for the repairs of those before it, so that
it sees them as they will be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.cost import CostModel
from kvloom.engine.building import Building
from kvloom.engine.computing import call, compute
from kvloom.engine.engine import Engine
from kvloom.engine.holdings import Holdings
from kvloom.engine.loop import EngineLoop
from kvloom.engine.plan_run import PlanRun
from kvloom.engine.request import Computed
from kvloom.errors import RequestError, UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.outputs import EditReceipt, Fidelity
from kvloom.reuse.actions import Part, Planner, Wanted
from kvloom.reuse.planner import places
from kvloom.store.key import ANYBODY, hash_tokens
from kvloom.types import ModelSpec


@dataclass(frozen=True, slots=True)
class TokenPart:
    """A part of a prompt in tokens.

    Attributes:
        tokens: token ids.
        reusable: whether its KV may be computed alone and used at any place.
        kv: a document that ends with these tokens, whose KV may be used as well, if it is
            reusable; the caller keeps it. What has been forgotten of it, or is of other tokens, is
            left alone.
    """

    tokens: tuple[int, ...]
    reusable: bool
    kv: KVDoc | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """A prompt whose parts stand in one document.

    Attributes:
        doc: the KV of the parts; held until the receiver releases it.
        tokens: the whole prompt.
        receipt: what was shown, computed and repaired.
    """

    doc: KVDoc
    tokens: list[int]
    receipt: EditReceipt


@dataclass(frozen=True, slots=True)
class Joining:
    """How parts are joined.

    Attributes:
        loop: runs what is computed.
        spec: of the model, whose positions must be movable.
        sink: tokens that a chunk is computed behind.
        fidelity: of the chunks.
        planner: says how each part comes about.
        tenant: whose chunks they are.
    """

    loop: EngineLoop
    spec: ModelSpec
    sink: tuple[int, ...]
    fidelity: Fidelity
    planner: Planner
    tenant: str = ANYBODY

    def join(self, parts: Sequence[TokenPart]) -> Joined:
        """Return the parts as one document; its last text sees what was repaired before it.

        Raises:
            RequestError: there are no tokens.
            UnsupportedModelError: the model's positions cannot be moved, or the planner must know
                what chunks attend to and the model does not show it.
            CapacityError: the KV memory cannot hold the parts.
        """
        begun = time.perf_counter()
        tokens = [token for part in parts for token in part.tokens]
        if not tokens:
            raise RequestError("The prompt has no tokens; give a part with text.", param="parts")
        body = list(parts)
        while body and not body[-1].reusable:
            body.pop()
        if not body or (self.fidelity == "exact" and not self.planner.learns):
            computed = compute(self.loop, tokens, tenant=self.tenant)
            rows = computed.usage.computed_tokens
            return Joined(computed.doc, tokens, self._receipt(computed, rows, begun))
        return self._planned(body, tokens, begun)

    def _planned(self, body: Sequence[TokenPart], tokens: list[int], begun: float) -> Joined:
        """Join parts of which at least one may be shown."""
        want, known, cost = call(self.loop, lambda engine: self._asked(engine, body, tokens))
        own = {n: part.kv for n, part in enumerate(body) if part.kv is not None and part.reusable}
        with Holdings(self.loop, self.sink, self.tenant) as holdings:
            have = holdings.of(want, own, known, computes=not self.planner.learns)
            actions = self.planner.plan(want, have, cost, self.fidelity)
            holdings.prefetch(want, actions)
            building = Building(self.loop, tokens, self.tenant)
            try:
                run = PlanRun(want, self.planner, holdings, building, self.tenant)
                for place in places(want):
                    steps = [action for action in actions if action.part == place.number]
                    run.carry_out(place, steps, is_known=place.stop <= known)
                run.repair()
                run.note_rest(tokens)
                computed = building.finish()
            except BaseException:
                building.close()
                raise
        rows = building.rows + holdings.rows
        receipt = self._receipt(computed, rows, begun)
        return Joined(computed.doc, tokens, run.added_to(receipt, holdings.loaded_bytes))

    def _asked(
        self, engine: Engine, body: Sequence[TokenPart], tokens: list[int]
    ) -> tuple[Wanted, int, CostModel]:
        """Return what a planner is asked, and how many first tokens are known exactly."""
        known = engine.memory.known_prefix(tokens, self.tenant)
        parts = tuple(
            Part(part.tokens, hash_tokens(part.tokens).hex() if part.reusable else None)
            for part in body
        )
        movable = self.spec.positions == "movable"
        want = Wanted(engine.memory.root, parts, movable=movable)
        shown = [place for place in places(want) if place.part.chunk and place.stop > known]
        if shown and not movable and self.fidelity != "exact":
            why = "; ".join(self.spec.notes) or f"its positions are {self.spec.positions}"
            raise UnsupportedModelError(
                f"Chunks would stand at other positions than they were computed at, which this "
                f"model does not allow: {why}. Join them with the fidelity `exact`."
            )
        return want, known, engine.costs()

    def _receipt(self, computed: Computed, rows: int, begun: float) -> EditReceipt:
        return EditReceipt(
            fidelity=self.fidelity,
            tokens=computed.usage.provenance.tokens,
            recomputed=rows,
            seconds=time.perf_counter() - begun,
        )
